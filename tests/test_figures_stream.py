"""The figure of the residual stream draws what it is given, and refuses what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_lab.figures import FigureError
from mixtral_lab.figures.stream import stream_sizes


def test_lines_and_bars_are_the_numbers():
    fig = stream_sizes(np.array([0.1, 2.0, 3.0]), np.array([0.5, 1.0]), np.array([1.5, 0.2]), "<b>", "float32")
    attention, experts, stream = fig.data
    assert list(attention.y) == [0.5, 1.0]
    assert list(experts.y) == [1.5, 0.2]
    assert list(stream.y) == [0.1, 2.0, 3.0]
    assert list(stream.x) == [-0.5, 0.5, 1.5], "between the bars of two layers"
    assert list(stream.customdata) == ["the embedding", "after layer 0", "after layer 1"]
    assert "&lt;b&gt;, float32" in fig.layout.title.subtitle.text


@pytest.mark.parametrize(("depths", "layers", "others"), [(2, 2, 2), (3, 1, 1), (1, 0, 0)])
def test_numbers_that_do_not_fit(depths, layers, others):
    with pytest.raises(FigureError, match="one size more"):
        stream_sizes(np.ones(depths), np.ones(layers), np.ones(others))
