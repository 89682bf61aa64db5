"""Which experts go together: in one token, from layer to layer, and between two states of one model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Integer

from mixtral_lab.analysis import company
from mixtral_lab.figures.colours import FigureError, blend
from mixtral_lab.figures.frame import ACCENT, GRID, INK, MARGIN, RULE, distinct, framed, layers_shown, maker
from mixtral_lab.figures.heat import heat_panels


def coactivation(
    counts: Integer[np.ndarray, "layer expert other"],
    layers: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Of the tokens that chose an expert (row), the share that also chose another (column), one panel per layer.

    `counts` are the summed `analysis.coactivation_counts`. White is what blind choice gives, (k - 1) / (E - 1). `layers`
    are the first, the middle and the last if not given. Source: OLMoE (arXiv 2409.02060, section 5). Raises
    `FigureError` if tokens chose one expert only.
    """
    shown, n_experts = layers_shown(layers, len(counts)), counts.shape[1]
    tokens = np.diagonal(counts, axis1=1, axis2=2)
    others = counts[0].sum() / max(tokens[0].sum(), 1) - 1  # k - 1
    if others <= 0:
        raise FigureError("Every token chose one expert only, so no two experts were chosen together.")
    shares = company.coactivation(counts)[shown]
    shares[:, np.arange(n_experts), np.arange(n_experts)] = np.nan
    chance = others / (n_experts - 1)
    heat = heat_panels(
        shares,
        [f"layer {layer}" for layer in shown],
        n_experts,
        n_experts,
        middle=chance,
        row_title="expert",
        column_title="also chosen",
        hover="{panel}: of {note} tokens of expert {row},<br>{value} also chose expert {column}",
        notes=np.broadcast_to(tokens[shown][:, :, None], shares.shape),
    )
    return framed(
        heat.figure,
        f"Which experts are chosen together? {maker(model, dtype)}",
        f"Of the tokens that chose the row's expert, how many % also chose the column's. White: {chance:.1%}, blind choice.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def transitions(
    counts: Integer[np.ndarray, "pair expert next"],
    layers: Sequence[int] | None = None,
    step: int = 1,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Of what comes from an expert (row), the share that goes to each expert of the layer `step` above (column).

    `counts` are the summed `analysis.transition_counts`, of first choices or of all. Colours say how many points that is
    above (purple) or below (orange) the column's share of all. `layers` are those to start from: the first, a
    middle and the last but `step` if not given. Raises `FigureError` for a layer that is not there.
    """
    shown, n_experts = layers_shown(layers, len(counts)), counts.shape[1]
    shares = company.transitions(counts)[shown]
    usual = counts[shown].sum(1, keepdims=True) / counts[shown].sum((1, 2), keepdims=True)
    heat = heat_panels(
        shares - usual,
        [f"layer {layer} → {layer + step}" for layer in shown],
        n_experts,
        n_experts,
        middle=0.0,
        written=shares,
        row_title="from expert",
        column_title="to expert",
        hover="{panel}: from expert {row},<br>{note} goes to expert {column}, {value} against its share of all",
        notes=[[[f"{share:.1%}" for share in row] for row in panel] for panel in shares],
    )
    return framed(
        heat.figure,
        f"From layer to layer: {maker(model, dtype)}",
        "Share of a row that goes to each column, in %. Purple: more than goes there from all experts together; orange: less.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def saturation(
    shares: Float[np.ndarray, "checkpoint layer"],
    checkpoints: Sequence[str],
    n_experts: int,
    n_choices: int,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """The share of choices that an earlier checkpoint already makes as the final one does, a line per checkpoint.

    Rows of `shares` come from `analysis.saturation`, from the earliest (faint) to the latest (strong); dashed: k / E, what
    unrelated choices share. Source: OLMoE (arXiv 2409.02060, section 5). Raises `FigureError` if the array is not
    such shares.
    """
    names = distinct(checkpoints, len(shares), "checkpoint")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise FigureError("A share of choices in common lies between 0 and 1.")
    fig = go.Figure()
    for at, (name, row) in enumerate(zip(names, shares, strict=True), start=1):
        fig.add_scatter(
            x=list(range(shares.shape[1])),
            y=row,
            mode="lines+markers",
            name=name,
            showlegend=True,
            line={"color": blend(ACCENT, 0.3 + 0.7 * at / len(names)), "width": 2},
            hovertemplate=f"{name}, layer %{{x}}<br>%{{y:.1%}} of choices as in the final model<extra></extra>",
        )
    fig.add_hline(y=n_choices / n_experts, line={"color": INK, "width": 1.2, "dash": "dash"})
    every = max(1, -(-shares.shape[1] // 16))
    fig.update_xaxes(
        title="layer", title_standoff=6, dtick=every, tick0=0, showgrid=False, zeroline=False, fixedrange=True
    )
    fig.update_yaxes(
        title="choices in common",
        range=[0, 1.03],
        tickformat=".0%",
        gridcolor=GRID,
        zerolinecolor=RULE,
        fixedrange=True,
    )
    return framed(
        fig,
        f"When did the routers settle? {maker(model, dtype)}",
        f"Share of choices that are the final model's. Dashed: {n_choices / n_experts:.1%}, what unrelated choices share.",
        plot=300,
        left=70,
        right=MARGIN,
        below=46,
    )
