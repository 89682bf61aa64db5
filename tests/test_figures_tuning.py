"""The pictures of fine-tuning: what is drawn is what was given."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_lab import figures
from mixtral_lab.figures import FigureError

LOG = [
    {"step": 0, "held_out": 3.0, "best": True}, {"step": 1, "loss": 2.5, "lr": 0.1}, {"step": 2, "loss": 2.0, "lr": 0.1},
    {"step": 2, "held_out": 1.5, "best": True}, {"step": 3, "loss": 1.0, "lr": 0.1}, {"step": 3, "held_out": 1.75, "best": False},
]  # fmt: skip


def test_losses_show_every_step_and_ring_the_best():
    learned, held_out, kept = figures.tuning_losses(LOG).data
    assert (list(learned.x), list(learned.y)) == ([1, 2, 3], [2.5, 2.0, 1.0])
    assert (list(held_out.x), list(held_out.y)) == ([0, 2, 3], [3.0, 1.5, 1.75])
    assert (list(kept.x), list(kept.y)) == ([2], [1.5])
    assert all(trace.showlegend for trace in (learned, held_out, kept))
    with pytest.raises(FigureError, match="no held-out loss"):
        figures.tuning_losses(LOG[1:2])


def test_moved_choices_has_a_bar_for_each_layer_of_each_run():
    bars = figures.moved_choices({"frozen": np.array([0.0, 0.25]), "<b>trained": np.array([0.5, 1.0])}).data
    assert [(bar.name, list(bar.x), list(bar.y)) for bar in bars] == [
        ("frozen", ["0", "1"], [0.0, 0.25]), ("&lt;b&gt;trained", ["0", "1"], [0.5, 1.0]),
    ]  # fmt: skip
    assert bars[0].marker.color != bars[1].marker.color


@pytest.mark.parametrize(
    "runs",
    [
        {},
        {"a": np.array([0.1, 1.2])},
        {"a": np.array([-0.1])},
        {"a": np.array([0.1]), "b": np.array([0.1, 0.2])},
        {"a": np.array([np.nan])},
        {str(n): np.array([0.1]) for n in range(5)},
    ],
)
def test_shares_that_cannot_be_drawn(runs):
    with pytest.raises(FigureError, match="a share from 0 to 1"):
        figures.moved_choices(runs)
