"""Figures of masks, caches and reach: what is drawn is what was given, and what cannot be drawn is said."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_lab.figures import FigureError
from mixtral_lab.figures.window import attention_by_distance, growth, kinds_map, ripple


def test_kinds_have_their_colours_and_names():
    fig = kinds_map(np.array([[1, 0], [2, 1]]), ["seen", "<b>"], "Mask", text=[["a", ""], ["c", "d"]])
    heat = fig.data[-1]
    assert np.asarray(heat.z).tolist() == [[1, 0], [2, 1]]
    assert np.asarray(heat.customdata).tolist() == [["seen", ""], ["<b>", "seen"]]
    assert [trace.name for trace in fig.data[:-1]] == ["seen", "&lt;b&gt;"]
    assert [note.text for note in fig.layout.annotations] == ["a", "", "c", "d"]
    stops = [at for at, _ in heat.colorscale]
    assert stops == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])


@pytest.mark.parametrize("kinds", [np.array([[3]]), np.array([[-1]]), np.zeros((0, 2), int)])
def test_kinds_that_cannot_be_drawn(kinds):
    with pytest.raises(FigureError):
        kinds_map(kinds, ["one", "two"], "")


def test_names_of_places_must_fit():
    with pytest.raises(FigureError, match="2 places"):
        kinds_map(np.ones((1, 2), int), ["one"], "", columns=["a"])


@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (3, 200), (64, 64)])
def test_any_size_fits_the_page(shape):
    fig = kinds_map(np.ones(shape, int), ["one"], "")
    assert fig.layout.width == 900
    assert 0 < fig.layout.xaxis.domain[1] <= 1


def test_ripple_is_white_where_nothing_changed():
    fig = ripple(np.array([[1.0, 0.1, 0.0], [1.0, 0.1, 0.01]]), [1, 2])
    assert np.asarray(fig.data[0].z)[0, :2] == pytest.approx([0, -1])
    assert np.isnan(np.asarray(fig.data[0].z)[0, 2])
    assert list(fig.data[1].x) == [1.5, 1.5, 2.5, 2.5]
    with pytest.raises(FigureError):
        ripple(np.zeros((2, 2)), [1, 2])


def test_attention_by_distance_wants_shares():
    assert attention_by_distance(np.array([[0.25, 0.75]]), ["near", "far"]).data
    with pytest.raises(FigureError):
        attention_by_distance(np.array([[0.25, 0.25]]), ["near", "far"])


def test_growth_draws_every_curve():
    fig = growth([1, 2], {"a": [1.0, 4.0], "b": [1.0, 2.0]}, "")
    assert [list(trace.y) for trace in fig.data] == [[1, 4], [1, 2]]
