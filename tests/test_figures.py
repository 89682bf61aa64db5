"""What a figure holds is what the trace holds; colours can be told apart and read on."""

from __future__ import annotations

import html
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab.analysis import as_shares, assignment_counts, choices
from mixtral_lab.figures import (
    COLUMNS,
    EXPERT_COLOURS,
    MOST_EXPERTS,
    FigureError,
    colours,
    expert_colour,
    expert_shares,
    text_colour,
    token_layer_map,
    tokens_by_expert,
)
from mixtral_lab.figures.tokens import typeset
from mixtral_lab.model.moe import route
from mixtral_lab.trace import Trace, TraceError

ODD = (
    "<s>",
    "<b>",
    "␣$x^2$",
    "&amp;",
    "日本語",
    "⏎⏎",
    "␣שלום",
    "🙂",
    "⟨E2 82⟩",
    "␣" * 30,
    "x" * 150,
    "⇥",
    "%{x}",
    "␣end",
)

# What eyes without one kind of cone see (Machado, Oliveira and Fernandes 2009, severity 1.0), on amounts of light.
EYES = {
    "all cones": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def made_up(tokens=ODD, layers=5, experts=8, choices=2, n_prompt=None, model="made-up", dtype=torch.float32) -> Trace:
    routing = route(torch.randn(layers, len(tokens), experts).to(dtype), choices)
    n_prompt = len(tokens) if n_prompt is None else n_prompt
    name = str(dtype).removeprefix("torch.")
    return Trace.from_arrays(
        tokens, routing.experts, routing.weights, routing.logits, n_prompt=n_prompt, model=model, dtype=name
    )


def dense() -> Trace:
    return Trace(torch.arange(2), ("a", "b"), 2, "mini-mistral", "float32", n_layers=3)


def light(colour: str) -> np.ndarray:
    share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted(float(light(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def title_of(figure) -> str:
    return html.unescape(figure.layout.title.text)


# Colours


@pytest.mark.parametrize("eyes", EYES)
def test_the_eight_colours_differ_for_every_eye(eyes):
    seen = [colours.oklab(np.clip(light(colour) @ np.array(EYES[eyes]).T, 0, 1)) for colour in EXPERT_COLOURS]
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert nearest > 0.135  # Okabe and Ito's own eight: 0.076; a just noticeable step is about 0.02


def test_every_expert_has_a_colour_of_its_own_and_readable_text():
    all_of_them = [expert_colour(expert) for expert in range(MOST_EXPERTS)]
    assert all_of_them[:8] == list(EXPERT_COLOURS) and len(set(all_of_them)) == MOST_EXPERTS
    for colour in all_of_them:
        assert re.fullmatch("#[0-9A-F]{6}", colour)
        assert contrast(colour, text_colour(colour)) >= 4.5
    few = [colours.oklab(light(colour)) for colour in all_of_them[:64]]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(few, 2)) > 0.06


def test_a_colour_does_not_depend_on_what_was_asked_before():
    colours.palette.cache_clear()
    later_first = expert_colour(700), expert_colour(9)
    colours.palette.cache_clear()
    assert (expert_colour(9), expert_colour(700)) == later_first[::-1]


@pytest.mark.parametrize("expert", [-1, MOST_EXPERTS])
def test_no_colour(expert):
    with pytest.raises(FigureError, match="has no colour"):
        expert_colour(expert)


# Tokens by expert


def tiles(figure, trace):
    """Position and colour, shown text and customdata of every token, panel by panel."""
    panels: dict[str, dict] = {}
    for bar in figure.data:
        if bar.type == "bar":
            panel = panels.setdefault(bar.yaxis or "y", {})
            for i, label in enumerate(bar.hovertext):
                position = int(re.match(r"token (\d+) ", label)[1])
                assert position not in panel
                panel[position] = (bar.marker.color, html.unescape(bar.text[i]), np.array(bar.customdata[i]), bar)
    return [panels[key] for key in sorted(panels, key=lambda key: int(key[1:] or 1))]


@pytest.mark.parametrize("layers", [None, [4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_is_its_token_and_its_expert(layers, dtype):
    trace = made_up(dtype=dtype)
    panels = tiles(tokens_by_expert(trace, layers), trace)
    shown = layers or [0, 2, 4]
    assert len(panels) == len(shown)
    for layer, panel in zip(shown, panels, strict=True):
        assert sorted(panel) == list(range(len(trace)))
        for position, (colour, text, pairs, bar) in panel.items():
            experts = trace.routing.experts[layer, position].tolist()
            assert colour == expert_colour(experts[0])
            assert bar.insidetextfont.color == text_colour(colour)
            assert bar.name == f"expert {experts[0]}"
            np.testing.assert_array_equal(pairs[0::2], experts)
            np.testing.assert_array_equal(pairs[1::2], trace.routing.weights[layer, position].float())
            whole = trace.tokens[position].replace("␣", "\N{NO-BREAK SPACE}")
            assert text == whole or (text.endswith("…") and whole.startswith(text[:-1]))


@given(st.lists(st.sampled_from([*ODD, "word", "␣a", "⏎"]), min_size=1, max_size=80))
def test_tiles_never_overlap_nor_leave_the_line(tokens):
    text = typeset(tokens)
    assert len(text.shown) == len(tokens)
    for i in range(len(tokens)):
        assert text.start[i] >= 0 and text.start[i] + text.width[i] <= COLUMNS
        if i:
            same = text.line[i] == text.line[i - 1]
            assert same or text.line[i] == text.line[i - 1] + 1
            assert text.start[i] >= text.start[i - 1] + text.width[i - 1] if same else text.start[i] == 0
            assert not (same and "⏎" in tokens[i - 1])


def test_the_start_of_writing_is_marked():
    assert not tokens_by_expert(made_up()).layout.shapes
    assert not tokens_by_expert(made_up(n_prompt=0)).layout.shapes
    assert len(tokens_by_expert(made_up(n_prompt=5)).layout.shapes) == 3
    figure = token_layer_map(made_up(n_prompt=5))
    assert figure.layout.shapes[0].x0 == figure.layout.shapes[0].x1 == 4.5
    assert not token_layer_map(made_up()).layout.shapes


def test_three_hundred_tokens_stay_light():
    trace = made_up([f"␣word{i}" for i in range(300)], layers=8)
    assert len(tokens_by_expert(trace).to_json()) < 200_000
    assert len(token_layer_map(trace).to_json()) < 400_000


def test_only_the_chosen_experts_are_known():
    trace = made_up(layers=3)
    imported = Trace.from_arrays(trace.tokens, trace.experts, n_experts=8)
    for panel, of_whole in zip(
        tiles(tokens_by_expert(imported), imported), tiles(tokens_by_expert(trace), trace), strict=True
    ):
        assert {at: tile[:2] for at, tile in panel.items()} == {at: tile[:2] for at, tile in of_whole.items()}
        assert "takes" not in panel[0][3].hovertemplate and "takes" in of_whole[0][3].hovertemplate
    heat, whole = token_layer_map(imported).data[0], token_layer_map(trace).data[0]
    np.testing.assert_array_equal(np.floor(np.array(heat.z)), np.floor(np.array(whole.z)))
    assert "takes" not in heat.hovertemplate


# The map


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_the_map_holds_every_decision(layers, experts, data):
    choices = data.draw(st.integers(1, experts))
    trace = made_up(ODD[: data.draw(st.integers(1, len(ODD)))], layers, experts, choices)
    heat = token_layer_map(trace).data[0]
    drawn = min(choices, 2)
    z, about = np.array(heat.z), np.array(heat.customdata)
    assert z.shape == (layers * (drawn + 1), len(trace))
    assert len(heat.x) == len(set(heat.x)) == len(trace)  # a category per token, even where tokens repeat
    assert len(heat.y) == len(z) + 1 and heat.y[0] == 0 and heat.y[-1] == pytest.approx(layers)
    for layer in range(layers):
        rows = slice(layer * (drawn + 1), (layer + 1) * (drawn + 1))
        *choices_drawn, gap = z[rows]
        assert np.isnan(gap).all()
        for choice, row in enumerate(reversed(choices_drawn)):  # the first choice is drawn above the second
            chosen = trace.routing.experts[layer, :, choice].numpy()
            np.testing.assert_array_equal(np.floor(row), chosen)
            np.testing.assert_allclose(row - chosen, trace.routing.weights[layer, :, choice], atol=1.01e-3)
        for row in about[rows]:
            assert (row[:, 0] == layer).all()
            np.testing.assert_array_equal(row[:, 1::2], trace.routing.experts[layer])
            np.testing.assert_array_equal(row[:, 2::2], trace.routing.weights[layer])


def test_the_map_has_the_experts_colours():
    figure = token_layer_map(made_up(experts=16))
    stops = figure.data[0].colorscale
    for expert in range(16):
        faint, full = stops[2 * expert], stops[2 * expert + 1]
        assert (faint[0], full[0]) == (expert / 16, (expert + 1) / 16)
        assert full[1] == expert_colour(expert) and contrast(faint[1], "#ffffff") < contrast(full[1], "#ffffff")
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 16)


# Shares


def test_bars_are_the_shares():
    shares = np.stack([as_shares(assignment_counts(*choices(made_up(layers=6)))) for _ in range(3)])
    figure = expert_shares(shares, ["code", "a < b", "prose"], model="made-up", dtype="float32")
    bars = [bar for bar in figure.data if bar.type == "bar"]
    assert len(bars) == 3 * 8
    for i, bar in enumerate(bars):
        layer, expert = (0, 2, 5)[i // 8], i % 8
        assert [html.unescape(name) for name in bar.x] == ["code", "a < b", "prose"]
        np.testing.assert_array_equal(bar.y, shares[:, layer, expert])
        assert bar.marker.color == expert_colour(expert)
    lines = figure.layout.shapes
    assert [line.y0 for line in lines] == [line.y1 for line in lines] == [1 / 8] * 3
    assert all(line.line.dash == "dash" for line in lines)
    assert "made-up, float32" in title_of(figure)


@pytest.mark.parametrize(
    ("shares", "domains", "message"),
    [
        (np.full((2, 1, 4), 0.25), ["one"], "values of 2 domains but names of 1"),
        (np.zeros((0, 1, 4)), [], "0 domains"),
        (np.full((2, 1, 4), 0.25), ["one", "one"], "same name"),
        (np.full((1, 1, 4), 0.5), ["one"], "sum to 1"),
        (np.array([[[1.5, -0.5]]]), ["one"], "0 or more"),
        (np.array([[[np.nan, 1.0]]]), ["one"], "0 or more"),
    ],
)
def test_not_shares(shares, domains, message):
    with pytest.raises(FigureError, match=message):
        expert_shares(shares, domains)


# All of them


def each_figure(trace):
    shares = as_shares(assignment_counts(*choices(trace)))[None]
    return [
        tokens_by_expert(trace),
        token_layer_map(trace),
        expert_shares(shares, ["text"], model=trace.model, dtype=trace.dtype),
    ]


@pytest.mark.parametrize(
    "shape",
    [{"tokens": ("<s>",), "layers": 1, "experts": 4, "choices": 1}, {"experts": 64, "choices": 8}, {"layers": 40}],
)
def test_titles_legends_and_odd_shapes(shape):
    trace = made_up(**shape, model="<i>odd</i> $m$", dtype=torch.bfloat16)
    experts = trace.routing.logits.shape[-1]
    for figure in each_figure(trace):
        assert "<i>odd</i> $m$, bfloat16" in title_of(figure) and "$" not in figure.layout.title.text
        legend = [entry for entry in figure.data if entry.type == "scatter"]
        assert [(e.name, e.marker.color) for e in legend] == [(f"expert {n}", expert_colour(n)) for n in range(experts)]
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "white"
        assert figure.layout.height - figure.layout.margin.t - figure.layout.margin.b >= 10
        assert "http" not in json.dumps(figure.to_dict(), default=str)


def test_the_default_layers_are_the_papers():
    figure = tokens_by_expert(made_up(("a",), layers=32))
    assert [note.text for note in figure.layout.annotations] == ["<b>layer 0</b>", "<b>layer 15</b>", "<b>layer 31</b>"]
    assert len(tokens_by_expert(made_up(("a",), layers=1)).layout.annotations) == 1


@pytest.mark.parametrize(("layers", "message"), [([5], "no layer 5.*0 to 4"), ([-1], "no layer -1"), ([], "No layer")])
def test_layers_that_are_not_there(layers, message):
    trace = made_up()
    with pytest.raises(FigureError, match=message):
        tokens_by_expert(trace, layers)
    with pytest.raises(FigureError, match=message):
        expert_shares(as_shares(assignment_counts(*choices(trace)))[None], ["text"], layers)


@pytest.mark.parametrize("figure", [tokens_by_expert, token_layer_map])
def test_what_cannot_be_drawn(figure):
    with pytest.raises(TraceError, match="dense model"):
        figure(dense())
    whole = made_up()
    short = replace(whole, tokens=whole.tokens[:-1])
    with pytest.raises(FigureError, match="13 tokens but decisions for 14"):
        figure(short)
