"""Tiles and bars hold the tokens that went in."""

from __future__ import annotations

import pytest

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.tokenization import token_costs, token_cuts

PIECES = {"a": ["<s>", "␣[", "INST", "]", "⟨E2 82⟩", "⏎", "<b>"], "b & c": ["[INST]", "Hi"] + ["␣word"] * 40}


def test_every_token_has_its_tile_and_control_tokens_are_dark():
    figure = token_cuts(PIECES)
    assert [note.text for note in figure.layout.annotations] == ["<b>a: 7 tokens</b>", "<b>b &amp; c: 42 tokens</b>"]
    for bars, pieces in zip(figure.data, PIECES.values(), strict=True):
        shown = [
            text.replace("\N{NO-BREAK SPACE}", "␣").replace("&lt;", "<").replace("&gt;", ">") for text in bars.text
        ]
        assert shown == pieces
        dark = [colour == "#1b1f24" for colour in bars.marker.color]
        assert dark == [piece in ("<s>", "[INST]") for piece in pieces]
        assert all(a != b for a, b in zip(bars.marker.color, bars.marker.color[1:], strict=False))
    assert max(figure.data[1].y) == 2  # 42 tokens take three lines


def test_nothing_to_cut():
    for pieces in ({}, {"a": []}):
        with pytest.raises(FigureError):
            token_cuts(pieces)


@pytest.mark.parametrize("names", [["x"], ["x", "y"], ["x", "y", "z", "w"]])
def test_every_count_has_its_bar(names):
    counts = {name: {"English": 3 + i, "Hindi": 90} for i, name in enumerate(names)}
    figure = token_costs(counts)
    assert {bar.name: dict(zip(bar.y, bar.x, strict=True)) for bar in figure.data} == counts
    assert len({bar.marker.color for bar in figure.data}) >= min(len(names), 3)


def test_counts_of_different_texts():
    with pytest.raises(FigureError, match="different texts"):
        token_costs({"a": {"English": 3}, "b": {"French": 3}})
    with pytest.raises(FigureError, match="0 tokenizers"):
        token_costs({})
