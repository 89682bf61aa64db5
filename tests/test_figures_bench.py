"""Figures of what things cost: what is drawn is what the tables say."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from mixtral_lab import figures
from mixtral_lab.figures import FigureError


@pytest.fixture
def profile() -> pd.DataFrame:
    return pd.DataFrame(
        [("prefill", "norms", 0.5, 0.25), ("prefill", "gate", 1.5, 0.75), ("decode", "norms", 0.004, 0.8),
         ("decode", "<rest>", 0.001, 0.2)],
        columns=["work", "site", "seconds", "share"],
    )  # fmt: skip


@pytest.fixture
def lengths() -> pd.DataFrame:
    return pd.DataFrame(
        [("ours", 2048, 0.002, 2**20, 3 * 2**20), ("ours", 1024, 0.001, 2**20, 2 * 2**20),
         ("theirs", 1024, 0.005, 4 * 2**20, 2**30), ("at once", 1024, np.nan, 8 * 2**20, 2**30)],
        columns=["contender", "tokens", "seconds", "cache", "peak"],
    )  # fmt: skip


def test_a_bar_for_each_site_and_a_panel_for_each_work(profile):
    figure = figures.time_by_site(profile, "a model", "bfloat16")
    prefill, decode = figure.data
    assert list(prefill.x) == [0.25, 0.75]
    assert list(prefill.y) == ["norms", "gate"]
    assert list(decode.x) == [0.8, 0.2]
    assert list(decode.y) == ["norms", "&lt;rest&gt;"]
    assert list(decode.customdata) == ["4.00 ms", "1.00 ms"]
    assert "a model, bfloat16" in figure.layout.title.text
    assert [one.text for one in figure.layout.annotations] == ["<b>prefill: 2.00 s</b>", "<b>decode: 5.00 ms</b>"]
    assert list(figure.layout.yaxis.categoryarray) == ["&lt;rest&gt;", "gate", "norms"]  # plotly draws upwards
    assert all(axis.range[1] > 0.8 for axis in (figure.layout.xaxis, figure.layout.xaxis2))


def test_time_and_memory_by_length(lengths):
    figure = figures.cost_by_length(lengths, "a model")
    drawn = {(line.yaxis or "y", line.name): (list(line.x), list(line.y)) for line in figure.data}
    assert drawn == {
        ("y", "ours"): ([1024, 2048], [1.0, 2.0]),  # ms, in order of length
        ("y", "theirs"): ([1024], [5.0]),
        ("y2", "ours"): ([1024, 2048], [1.0, 1.0]),  # MiB
        ("y2", "theirs"): ([1024], [4.0]),
        ("y2", "at once"): ([1024], [8.0]),
        ("y3", "ours"): ([1024, 2048], [2.0, 3.0]),
        ("y3", "theirs"): ([1024], [1024.0]),
        ("y3", "at once"): ([1024], [1024.0]),
    }
    assert sorted(line.name for line in figure.data if line.showlegend) == ["at once", "ours", "theirs"]
    assert figure.layout.yaxis2.type == figure.layout.yaxis3.type == figure.layout.xaxis.type == "log"
    low, high = figure.layout.yaxis3.range
    assert low < math.log10(1) and high > math.log10(1024)
    assert list(figure.layout.xaxis3.ticktext) == ["1,024", "2,048"]


@pytest.mark.parametrize("draw", [figures.time_by_site, figures.cost_by_length])
def test_tables_that_are_not_what_is_needed(draw, profile, lengths):
    right, wrong = (profile, lengths) if draw is figures.time_by_site else (lengths, profile)
    with pytest.raises(FigureError, match="The table lacks"):
        draw(wrong)
    with pytest.raises(FigureError, match="empty"):
        draw(right.iloc[:0])
