"""Shares over training steps: one area for each expert, in its own colour, in a panel for each run and layer."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_lab.figures.colours import FigureError, expert_colour
from mixtral_lab.figures.training import shares_over_steps


def runs() -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0).random((2, 5, 3, 4))
    without, balanced = drawn / drawn.sum(-1, keepdims=True)  # step layer expert
    return {"without": without, "<balanced>": balanced}


def test_areas_are_the_shares_in_the_experts_colours():
    found = runs()
    fig = shares_over_steps(found, every=10)
    areas = [trace for trace in fig.data if trace.stackgroup]
    assert len(areas) == 2 * 3 * 4
    assert list(areas[5].y) == list(found["without"][:, 1, 1])
    assert areas[5].fillcolor == expert_colour(1)
    assert list(areas[5].x) == [0, 10, 20, 30, 40]
    assert len({area.stackgroup for area in areas}) == 6
    assert "&lt;balanced&gt;, layer 2" in " ".join(note.text for note in fig.layout.annotations)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "at least one run"),
        ({"a": np.ones((2, 1, 4))}, "sum to 1"),
        ({"a": np.full((0, 1, 4), 0.25)}, "step, layer, expert"),
        ({"a": np.full((2, 1, 4), 0.25), "b": np.full((2, 1, 2), 0.5)}, "as many layers and experts"),
    ],
)
def test_what_is_wrong_is_named(wrong, says):
    with pytest.raises(FigureError, match=says):
        shares_over_steps(wrong)
