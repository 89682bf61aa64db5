"""What an expert likes: tokens, kinds of text, languages or topics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mixtral_lab.analysis.specialisation import LanguageOrTopic
from mixtral_lab.figures.colours import FigureError, expert_colour, text_colour
from mixtral_lab.figures.frame import (
    ACCENT,
    GRID,
    MARGIN,
    MONO,
    RULE,
    SOFT,
    WIDTH,
    distinct,
    expert_name,
    framed,
    layers_shown,
    maker,
    panel_title,
    plain,
    short,
)
from mixtral_lab.figures.heat import LESS, heat_panels

if TYPE_CHECKING:
    import pandas as pd


def vocabulary(table: pd.DataFrame, layer: int, n: int = 10, model: str = "", dtype: str = "") -> go.Figure:
    """The `n` favourite tokens of every expert of a layer: bars are the share of a token's occurrences that it reads.

    `table` is what `analysis.vocabulary` returns, whose order decides who is a favourite: the lift, then the count. Source:
    OLMoE (arXiv 2409.02060, section 5). Raises `FigureError` for a layer that is not in the table.
    """
    rows = table[table.layer == layer]
    if rows.empty:
        raise FigureError(
            f"The table has no tokens of layer {layer}; it has layers {sorted(set(table.layer.tolist()))}."
        )
    experts = sorted(rows.expert.unique().tolist())
    across = min(4, len(experts))
    down = -(-len(experts) // across)
    panel, between = 18 * n, 40
    height = down * panel + (down - 1) * between
    names = 84  # pixels left of every plot
    fig = make_subplots(
        down,
        across,
        horizontal_spacing=names / (WIDTH - 2 * MARGIN - names),
        vertical_spacing=between / height if down > 1 else 0,
    )
    for at, expert in enumerate(experts):
        place = {"row": at // across + 1, "col": at % across + 1}
        best = rows[rows.expert == expert].head(n)
        colour = expert_colour(expert)
        fig.add_bar(
            orientation="h",
            x=best.share,
            y=list(range(len(best))),
            marker={"color": colour, "line_width": 0},
            text=[f"{row.share:.0%} of {row.occurrences:,}" for row in best.itertuples()],
            textposition=["inside" if share > 0.5 else "outside" for share in best.share],
            insidetextanchor="start",
            insidetextfont={"size": 11, "color": text_colour(colour)},
            textangle=0,
            outsidetextfont_size=11,
            constraintext="none",
            cliponaxis=False,
            customdata=list(zip(best["count"], best.occurrences, best.lift, map(plain, best.token), strict=True)),
            hovertemplate=f"“%{{customdata[3]}}”<br>expert {expert} of layer {layer} reads %{{customdata[0]:,}} of "
            "%{customdata[1]:,}, %{x:.1%},<br>%{customdata[2]:.1f} times its share of all tokens<extra></extra>",
            showlegend=False,
            **place,
        )
        axes = fig.get_subplot(place["row"], place["col"])
        axes.yaxis.update(
            tickvals=list(range(len(best))), ticktext=[plain(short(token, 10)) for token in best.token], ticks="",
            tickfont={"family": MONO, "size": 12}, range=[n - 0.5, -0.5],
        )  # fmt: skip
        panel_title(fig, f"expert {expert_name(expert)}", axes.yaxis.domain[1], axes.xaxis.domain[0])
    fig.update_xaxes(range=[0, 1], visible=False, fixedrange=True)
    fig.update_yaxes(showgrid=False, zeroline=False, fixedrange=True)
    return framed(
        fig,
        f"Favourite tokens of the experts in layer {layer}: {maker(model, dtype)}",
        "Of all occurrences of a token, the share that the expert reads, as one of its choices. Sorted by lift, then count.",
        plot=height,
        left=MARGIN + names,
        below=18,
    )


def domain_information(
    bits: Float[np.ndarray, " layer"],
    shuffled: Float[np.ndarray, "shuffle layer"],
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """What the chosen expert tells about the kind of text, layer by layer, beside what chance would tell.

    `bits` are `analysis.domain_information` of every layer, `shuffled` comes from `analysis.shuffled_information`.
    """
    layers = list(range(len(bits)))
    low, high = np.percentile(shuffled, [2.5, 97.5], axis=0)
    fig = go.Figure()
    fig.add_bar(
        x=layers, y=bits, marker_color=ACCENT, name="measured", showlegend=True, width=0.6,
        hovertemplate="layer %{x}: %{y:.3f} bits<extra></extra>",
    )  # fmt: skip
    fig.add_scatter(
        x=layers,
        y=shuffled.mean(0),
        error_y={"type": "data", "array": high - shuffled.mean(0), "arrayminus": shuffled.mean(0) - low, "width": 6},
        mode="markers",
        marker={"color": LESS[2], "size": 8},
        name="domains dealt out to the texts at random: mean and 95 %",
        showlegend=True,
        customdata=np.stack([low, high], 1),
        hovertemplate="layer %{x}, by chance: %{y:.3f} bits<br>95 %: %{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>",
    )
    fig.update_xaxes(
        title="layer", title_standoff=6, dtick=max(1, -(-len(bits) // 16)), tick0=0, showgrid=False, fixedrange=True
    )
    fig.update_yaxes(title="bits", rangemode="tozero", gridcolor=GRID, zerolinecolor=RULE, fixedrange=True)
    return framed(
        fig,
        f"Does the expert tell what kind of text it is? {maker(model, dtype)}",
        "Mutual information of the chosen expert and the domain.",
        plot=300,
        left=70,
        below=46,
    )


def domain_divergence(
    divergences: Float[np.ndarray, "layer domain other"],
    domains: Sequence[str],
    layers: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """How differently any two kinds of text use the experts: Jensen-Shannon divergence in bits, one panel per layer.

    `divergences` come from `analysis.domain_divergence`; `layers` are the first, the middle and the last if not given.
    """
    names = distinct(domains, divergences.shape[1], "domain")
    shown = layers_shown(layers, len(divergences))
    values = divergences[shown]
    values[:, np.arange(len(names)), np.arange(len(names))] = np.nan
    heat = heat_panels(
        values,
        [f"layer {layer}" for layer in shown],
        names,
        names,
        percent=False,
        row_title="domain",
        column_title="domain",
        hover="{row} and {column}, {panel}:<br>{value} bits",
    )
    return framed(
        heat.figure,
        f"How differently do domains use the experts? {maker(model, dtype)}",
        "Jensen-Shannon divergence of their shares of assignments, in bits: 0 if equal, 1 if no expert in common.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def language_or_topic(found: LanguageOrTopic, model: str = "", dtype: str = "") -> go.Figure:
    """Above, how much of the difference between parallel texts goes with their language and with their topic, by layer.

    Below, how far apart two texts are that share the one or the other. `found` is what `analysis.language_or_topic`
    returns.
    """
    n_layers = len(found.language)
    layers = list(range(n_layers))
    parts = (
        ("language", found.language, ACCENT, found.language_by_chance),
        ("topic", found.topic, LESS[2], found.topic_by_chance),
        ("rest", found.rest, RULE, None),
    )
    pairs = (
        ("same language, other topic", found.same_language, ACCENT),
        ("same topic, other language", found.same_topic, LESS[1]),
        ("neither in common", found.neither, SOFT),
    )
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.13)
    for name, share, colour, chance in parts:
        expected = "" if chance is None else f"<br>by chance {chance:.1%}"
        fig.add_bar(
            x=layers, y=share, marker_color=colour, name=name, width=0.7, showlegend=True, row=1, col=1,
            text=[f"{value:.0%}" if value > 0.05 else "" for value in share] if n_layers <= 16 else None,
            textposition="inside", insidetextanchor="middle", textangle=0, constraintext="none",
            insidetextfont={"size": 12, "color": text_colour(colour)},
            hovertemplate=f"layer %{{x}}<br>{name}: %{{y:.1%}}{expected}<extra></extra>",
        )  # fmt: skip
    for name, bits, colour in pairs:
        fig.add_scatter(
            x=layers, y=bits, mode="lines+markers", line={"color": colour, "width": 2}, name=name, showlegend=False,
            hovertemplate=f"layer %{{x}}, {name}:<br>%{{y:.3f}} bits apart<extra></extra>", row=2, col=1,
        )  # fmt: skip
    panel_title(fig, "share of the squared differences between texts", fig.layout.yaxis.domain[1])
    named = " · ".join(f'<span style="color:{colour}">{name}</span>' for name, _, colour in pairs)
    panel_title(fig, f"mean divergence of two texts, in bits: {named}", fig.layout.yaxis2.domain[1])
    fig.update_layout(barmode="stack", legend_traceorder="normal")
    fig.update_xaxes(
        range=[-0.5, n_layers - 0.5],
        dtick=max(1, -(-n_layers // 16)),
        tick0=0,
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    fig.update_xaxes(title="layer", title_standoff=6, row=2, col=1)
    fig.update_yaxes(tickformat=".0%", range=[0, 1], row=1, col=1)
    fig.update_yaxes(rangemode="tozero", row=2, col=1)
    fig.update_yaxes(gridcolor=GRID, zerolinecolor=RULE, fixedrange=True)
    return framed(
        fig,
        f"Language or topic? {maker(model, dtype)}",
        f"The same passages in several languages. If labels meant nothing, language would explain {found.language_by_chance:.0%}, "
        f"topic {found.topic_by_chance:.0%}.",
        plot=460,
        left=70,
        below=46,
    )
