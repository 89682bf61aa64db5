"""The figures of the routing analyses hold the numbers that they are given."""

from __future__ import annotations

import html
import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from mixtral_lab import analysis, figures
from mixtral_lab.figures import FigureError, expert_colour
from mixtral_lab.figures.heat import heat_panels

ODD = ["code", "a < b", "$x^2$"]  # what plotly would read as HTML or TeX


def routed(layers=5, seq=60, experts=8, n_choices=2, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((layers, seq, experts)).argsort(-1)[..., :n_choices]


def logits(layers=5, seq=60, experts=8) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(layers, seq, experts))


def domain_counts(domains=3, experts=8, **shape) -> np.ndarray:
    texts = [routed(experts=experts, seed=seed, **shape) for seed in range(domains)]
    return np.stack([analysis.assignment_counts(text, experts) for text in texts])


def repeated(layers=5, experts=8, n_choices=2, texts=4) -> analysis.Repetition:
    several = [routed(layers, 20, experts, n_choices, seed) for seed in range(texts)]
    return analysis.repetition(np.stack([analysis.repetition_counts(text, experts) for text in several]))


def favourites(layers=5, experts=8, n_choices=2) -> pd.DataFrame:
    ids = np.random.default_rng(2).integers(0, 6, 60)
    counts = analysis.vocabulary_counts(routed(layers, 60, experts, n_choices), experts, ids, 6)
    return analysis.vocabulary(counts, n_choices, ["␣a", "<b>", "$", "日本", "x" * 40, "⏎"], minimum=2)


def maps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def titles(figure) -> list[str]:
    return [html.unescape(note.text).removeprefix("<b>").removesuffix("</b>") for note in figure.layout.annotations]


def each_figure(layers=5, experts=8, n_choices=2, **about):
    shape = {"layers": layers, "experts": experts, "n_choices": n_choices}
    names, counts = ODD, domain_counts(**shape)
    shares = analysis.as_shares(counts)
    entropies = analysis.binned_counts(analysis.router_entropy(logits(layers, 60, experts)), np.log2(experts))
    margins = analysis.binned_counts(analysis.near_tie_margin(logits(layers, 60, experts), n_choices), 1 / n_choices)
    ranks = np.stack([analysis.rank_counts(routed(**shape, seed=seed), experts) for seed in range(3)])
    profiles = np.random.default_rng(0).dirichlet(np.ones(experts), (3, 4, layers))
    drawn = {
        "domain_experts": figures.domain_experts(shares, names, **about),
        "rank_shares": figures.rank_shares(analysis.as_shares(ranks), names, layers - 1, **about),
        "repetition": figures.repetition({name: repeated(**shape) for name in names}, experts, n_choices, **about),
        "router_certainty": figures.router_certainty(entropies, margins, experts, n_choices, **about),
        "vocabulary": figures.vocabulary(favourites(**shape), layers - 1, **about),
        "domain_information": figures.domain_information(np.ones(layers), np.zeros((5, layers)), **about),
        "domain_divergence": figures.domain_divergence(analysis.domain_divergence(shares), names, **about),
        "language_or_topic": figures.language_or_topic(analysis.language_or_topic(profiles), **about),
        "saturation": figures.saturation(np.full((3, layers), 0.5), names, experts, n_choices, **about),
    }
    if n_choices > 1:
        drawn["coactivation"] = figures.coactivation(analysis.coactivation_counts(routed(**shape), experts), **about)
    if layers > 1:
        drawn["transitions"] = figures.transitions(analysis.transition_counts(routed(**shape), experts), **about)
    return drawn


# All of them


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"layers": 1, "experts": 4, "n_choices": 1},
        {"layers": 2, "experts": 64, "n_choices": 8},
        {"layers": 32, "experts": 8, "n_choices": 2},
    ],
)
def test_titles_sizes_and_odd_shapes(shape):
    for name, figure in each_figure(**shape, model="<i>odd</i> $m$", dtype="bfloat16").items():
        title = html.unescape(figure.layout.title.text)
        assert "<i>odd</i> $m$, bfloat16" in title and "$" not in figure.layout.title.text, name
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "white"
        assert figure.layout.width == 900
        plot = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
        assert plot >= 13 and figure.layout.margin.l + figure.layout.margin.r < 800, name
        text = json.dumps(figure.to_dict(), default=lambda value: np.asarray(value).tolist())
        assert "http" not in text and "a < b" not in text and "$x^2$" not in text and "<b>," not in text, name
        assert len(text) < 800_000
        for one, other in pairwise(
            sorted(axis.domain for axis in figure.select_xaxes() if axis.domain and axis.anchor == "y")
        ):
            assert one[1] <= other[0]


def test_the_default_layers_are_the_papers():
    for name in ("domain_experts", "domain_divergence", "coactivation"):
        assert titles(each_figure(layers=32)[name]) == ["layer 0", "layer 15", "layer 31"]
    assert titles(each_figure(layers=32)["transitions"]) == ["layer 0 → 1", "layer 15 → 16", "layer 30 → 31"]


@pytest.mark.parametrize(("layers", "message"), [([5], "no layer 5.*0 to 4"), ([], "No layer")])
def test_layers_that_are_not_there(layers, message):
    shares = analysis.as_shares(domain_counts())
    for draw in (
        lambda: figures.domain_experts(shares, ODD, layers),
        lambda: figures.domain_divergence(analysis.domain_divergence(shares), ODD, layers),
        lambda: figures.coactivation(analysis.coactivation_counts(routed(), 8), layers),
        lambda: figures.transitions(analysis.transition_counts(routed(layers=6), 8), layers),
    ):
        with pytest.raises(FigureError, match=message):
            draw()


@pytest.mark.parametrize(
    ("names", "message"), [(ODD[:2], "3 domains but names of 2"), (["a", "b", "a"], "have the same name")]
)
def test_names_that_do_not_fit(names, message):
    shares = analysis.as_shares(domain_counts())
    for draw in (figures.domain_experts, figures.expert_shares):
        with pytest.raises(FigureError, match=message):
            draw(shares, names)
    with pytest.raises(FigureError, match=message):
        figures.domain_divergence(analysis.domain_divergence(shares), names)
    with pytest.raises(FigureError, match="3 checkpoints" if len(names) < 3 else "same name"):
        figures.saturation(np.full((3, 2), 0.5), names, 8, 2)


# Shares


def test_bars_are_the_shares_of_each_rank():
    counts = np.stack([analysis.rank_counts(routed(n_choices=3, seed=seed), 8) for seed in range(3)])
    shares = analysis.as_shares(counts)
    figure = figures.rank_shares(shares, ODD, 4)
    bars = [bar for bar in figure.data if bar.type == "bar"]
    assert len(bars) == 3 * 8 and titles(figure) == ["first choice", "second choice", "third choice"]
    for i, bar in enumerate(bars):
        rank, expert = divmod(i, 8)
        np.testing.assert_array_equal(bar.y, shares[:, 4, rank, expert])
        assert bar.marker.color == expert_colour(expert)
        assert [html.unescape(name) for name in bar.x] == ODD
    assert [line.y0 for line in figure.layout.shapes] == [1 / 8] * 3


def test_the_map_of_domains_parts_at_even_use():
    counts = domain_counts()
    for values, even, what in (
        (analysis.as_shares(counts), 1 / 8, "assignments"),
        (analysis.domain_specialisation(counts, 2), 2 / 8, "tokens"),
    ):
        figure = figures.domain_experts(values, ODD, layers=[1, 3])
        for heat, layer in zip(maps(figure), (1, 3), strict=True):
            np.testing.assert_array_equal(heat.z, values[:, layer])
            assert [html.unescape(name) for name in heat.y] == ODD
            assert [list(row) for row in heat.text] == [[f"{100 * x:.0f}" for x in row] for row in values[:, layer]]
            assert what in heat.hovertemplate
        assert white_at(figure) == pytest.approx(even)


def white_at(figure) -> float:
    """The value that is drawn white."""
    axis = figure.layout.coloraxis
    (place,) = [place for place, colour in axis.colorscale if colour in ("rgb(255,255,255)", "#FFFFFF")]
    return axis.cmin + place * (axis.cmax - axis.cmin)


@pytest.mark.parametrize("total", [0.5, 9.0, np.nan])
def test_a_map_of_no_shares(total):
    with pytest.raises(FigureError, match="sum to 1"):
        figures.domain_experts(np.full((3, 2, 8), total / 8), ODD)


def test_colours_are_as_strong_on_both_sides():
    values = np.array([[[0.1, 0.5, 0.6]]])
    figure = heat_panels(values, ["one"], ["row"], 3, middle=0.5, row_title="", column_title="", hover="{value}").figure
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax, white_at(figure)) == (0.1, 0.6, 0.5)
    assert axis.colorscale[0][1] == "rgb(127,59,8)"  # 0.4 below: the strongest orange
    assert axis.colorscale[-1][1] != "rgb(45,0,75)"  # 0.1 above: a faint purple, not the strongest
    even = heat_panels(
        np.full((1, 1, 3), 0.5), ["one"], ["row"], 3, middle=0.5, row_title="", column_title="", hover=""
    )
    assert even.figure.layout.coloraxis.cmax > even.figure.layout.coloraxis.cmin
    with pytest.raises(FigureError, match="nothing to draw"):
        heat_panels(np.full((1, 1, 3), np.nan), ["one"], ["row"], 3, row_title="", column_title="", hover="")


# Repetition and certainty


def test_lines_bands_and_dashes_of_repetition():
    found = {name: repeated(texts=n) for n, name in enumerate(ODD, start=1)}
    figure = figures.repetition(found, 8, 2)
    assert titles(figure) == ODD
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert len(lines) == len(bands) == 6
    for i, (line, band) in enumerate(zip(lines, bands, strict=True)):
        repeats, definition = found[ODD[i // 2]], i % 2
        np.testing.assert_array_equal(line.y, repeats.share[definition])
        np.testing.assert_array_equal(line.customdata, np.stack([repeats.low, repeats.high], -1)[definition])
        np.testing.assert_array_equal(band.y, [*repeats.high[definition], *repeats.low[definition][::-1]])
    dashes = [shape.y0 for shape in figure.layout.shapes]
    assert dashes == pytest.approx([0.125, 1 - 15 / 28] * 3)
    assert [line.name for line in lines if line.showlegend] == ["same first choice", "any choice in common"]
    with pytest.raises(FigureError, match=r"different numbers of layers, \[2, 5\]"):
        figures.repetition({"a": repeated(), "b": repeated(layers=2)}, 8, 2)
    with pytest.raises(FigureError, match="0 domains"):
        figures.repetition({}, 8, 2)


def test_dots_and_lines_of_certainty():
    entropies = analysis.binned_counts(analysis.router_entropy(logits()), 3.0)
    margins = analysis.binned_counts(analysis.near_tie_margin(logits(), 2), 0.5)
    figure = figures.router_certainty(entropies, margins, 8, 2)
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    for dot, counts, top in zip(dots, (entropies, margins), (3.0, 0.5), strict=True):
        np.testing.assert_array_equal(dot.x, analysis.binned_quantile(counts, top, 0.5))
        about = [analysis.binned_quantile(counts, top, share) for share in (0.05, 0.25, 0.75, 0.95)]
        np.testing.assert_array_equal(dot.customdata, np.stack([*about, analysis.near_ties(margins, 2)], 1))
        assert list(dot.y) == [0, 1, 2, 3, 4]
    thin, thick, *_ = [trace for trace in figure.data if trace.mode == "lines"]
    about = [analysis.binned_quantile(entropies, 3.0, share) for share in (0.05, 0.25, 0.75, 0.95)]
    np.testing.assert_array_equal(np.array(thin.x).reshape(5, 3)[:, :2], np.stack([about[0], about[3]], 1))
    np.testing.assert_array_equal(np.array(thick.x).reshape(5, 3)[:, :2], np.stack([about[1], about[2]], 1))
    assert [f"{share:.1%}" for share in analysis.near_ties(margins, 2)] == titles(figure)[:5]
    with pytest.raises(FigureError, match="different layers"):
        figures.router_certainty(entropies[:2], margins, 8, 2)


# Company


def test_the_map_of_company():
    counts = analysis.coactivation_counts(routed(n_choices=3), 8)
    shares = analysis.coactivation(counts)
    figure = figures.coactivation(counts, layers=[0, 4])
    for heat, layer in zip(maps(figure), (0, 4), strict=True):
        expected = np.where(np.eye(8, dtype=bool), np.nan, shares[layer])
        np.testing.assert_array_equal(heat.z, expected)
        np.testing.assert_array_equal(heat.customdata, np.repeat(np.diagonal(counts[layer])[:, None], 8, axis=1))
        assert all(heat.text[i][i] == "" for i in range(8))
        assert expert_colour(5) in figure.layout.xaxis.ticktext[5]
    assert white_at(figure) == pytest.approx(2 / 7)
    with pytest.raises(FigureError, match="one expert only"):
        figures.coactivation(analysis.coactivation_counts(routed(n_choices=1), 8))


def test_the_map_of_transitions():
    counts = analysis.transition_counts(routed()[:, :, :1], 8, step=2)
    figure = figures.transitions(counts, layers=[0, 2], step=2)
    assert titles(figure) == ["layer 0 → 2", "layer 2 → 4"]
    for heat, pair in zip(maps(figure), (0, 2), strict=True):
        shares = analysis.transitions(counts)[pair]
        usual = counts[pair].sum(0) / counts[pair].sum()
        np.testing.assert_allclose(heat.z, shares - usual)
        assert [list(row) for row in heat.text] == [[f"{100 * x:.0f}" for x in row] for row in shares]
        assert heat.customdata[3][4] == f"{shares[3, 4]:.1%}"
    assert white_at(figure) == pytest.approx(0, abs=1e-12)


def test_an_expert_that_nobody_chose_stays_empty():
    experts = routed(experts=7)
    for figure in (
        figures.coactivation(analysis.coactivation_counts(experts, 8)),
        figures.transitions(analysis.transition_counts(experts, 8)),
    ):
        assert np.isnan(np.array(maps(figure)[0].z, float)[7]).all()
        assert not any(maps(figure)[0].text[7])


def test_lines_of_saturation():
    shares = np.linspace(0, 1, 15).reshape(3, 5)
    figure = figures.saturation(shares, ["early", "middle", "late"], 8, 2)
    assert [line.name for line in figure.data] == ["early", "middle", "late"]
    for line, row in zip(figure.data, shares, strict=True):
        np.testing.assert_array_equal(line.y, row)
    assert len({line.line.color for line in figure.data}) == 3
    assert figure.layout.shapes[0].y0 == 0.25
    with pytest.raises(FigureError, match="between 0 and 1"):
        figures.saturation(shares * 2, ["early", "middle", "late"], 8, 2)


# Specialisation


def test_bars_of_the_vocabulary():
    table = favourites()
    figure = figures.vocabulary(table, 3, n=4)
    bars = [bar for bar in figure.data if bar.type == "bar"]
    assert len(bars) == 8
    for expert, bar in enumerate(bars):
        best = table[(table.layer == 3) & (table.expert == expert)].head(4)
        np.testing.assert_array_equal(bar.x, best.share)
        assert bar.marker.color == expert_colour(expert)
        assert [row[0] for row in bar.customdata] == best["count"].tolist()
        assert [html.unescape(row[3]) for row in bar.customdata] == best.token.tolist()
    labels = [html.unescape(name) for axis in figure.select_yaxes() for name in axis.ticktext]
    assert "<b>" in labels and "$" in labels and all(len(name) <= 10 for name in labels)
    with pytest.raises(FigureError, match=r"no tokens of layer 9; it has layers \[0, 1, 2, 3, 4\]"):
        figures.vocabulary(table, 9)


def test_information_and_what_chance_gives():
    bits, shuffled = np.array([0.5, 0.1]), np.random.default_rng(0).random((40, 2)) / 10
    bar, dots = figures.domain_information(bits, shuffled).data
    np.testing.assert_array_equal(bar.y, bits)
    np.testing.assert_array_equal(dots.y, shuffled.mean(0))
    low, high = np.percentile(shuffled, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(np.array(dots.y) + dots.error_y.array, high)
    np.testing.assert_allclose(np.array(dots.y) - dots.error_y.arrayminus, low)


def test_the_map_of_divergence():
    apart = analysis.domain_divergence(analysis.as_shares(domain_counts()))
    figure = figures.domain_divergence(apart, ODD, layers=[2])
    (heat,) = maps(figure)
    np.testing.assert_array_equal(heat.z, np.where(np.eye(3, dtype=bool), np.nan, apart[2]))
    assert heat.text[0][1] == f"{apart[2, 0, 1]:.2f}" and figure.layout.coloraxis.cmin == 0
    assert apart[2, 0, 0] == 0  # the array given was left alone


def test_bars_and_lines_of_language_or_topic():
    found = analysis.language_or_topic(np.random.default_rng(0).dirichlet(np.ones(8), (3, 4, 5)))
    figure = figures.language_or_topic(found)
    drawn = {trace.name: np.array(trace.y) for trace in figure.data}
    for part in ("language", "topic", "rest"):
        np.testing.assert_array_equal(drawn[part], getattr(found, part))
    for name, values in (
        ("same language, other topic", found.same_language),
        ("same topic, other language", found.same_topic),
        ("neither in common", found.neither),
    ):
        np.testing.assert_array_equal(drawn[name], values)
    assert "27%" in figure.layout.title.subtitle.text  # 3 of 11 by chance
