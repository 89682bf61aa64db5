"""The roofline: the roof stands where bandwidth and arithmetic meet, and the dots where they were measured."""

from __future__ import annotations

import pytest

from mixtral_lab.figures import FigureError
from mixtral_lab.figures.roofline import roofline


def test_the_roof_bends_where_both_are_alike():
    fig = roofline([0.5, 64.0], [1e9, 9e10], ["1\nms", "<b>"], bandwidth=2e10, ceiling=1e11, title="T")
    slope, flat, dots = fig.data
    assert slope.x[1] == flat.x[0] == 5
    assert slope.y[1] == pytest.approx(100) == flat.y[0] == flat.y[1]
    assert slope.y[0] == pytest.approx(20 * slope.x[0])
    assert list(dots.x) == [0.5, 64]
    assert list(dots.y) == [1, 90]
    assert list(dots.text) == ["1<br>ms", "&lt;b&gt;"]
    assert "20 GB/s" in slope.name
    low, high = fig.layout.yaxis.range
    assert 10**low < 1 < 90 < 10**high


def test_large_numbers_have_no_exponent():
    fig = roofline([0.5], [1e12], ["1"], bandwidth=4e12, ceiling=5.04321e13, title="T")
    assert "4,000 GB/s" in fig.data[0].name
    assert "50,400 GFLOP/s" in fig.data[1].name


@pytest.mark.parametrize(
    "given",
    [
        ([], [], [], 1.0, 1.0),
        ([1.0], [1.0, 2.0], ["a"], 1.0, 1.0),
        ([0.0], [1.0], ["a"], 1.0, 1.0),
        ([1.0], [1.0], ["a"], 0.0, 1.0),
        ([1.0], [1.0], ["a"], 1.0, float("inf")),
        ([1.0], [float("nan")], ["a"], 1.0, 1.0),
    ],
)
def test_what_cannot_be_drawn_is_said(given):
    with pytest.raises(FigureError):
        roofline(*given, title="T")
