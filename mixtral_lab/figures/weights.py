"""Experts by their weights and the size of their answers, as pictures."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mixtral_lab.analysis.weights import ROLES
from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import GRID, INK, RULE, SOFT, framed, layers_shown, maker
from mixtral_lab.figures.heat import heat_panels


def expert_similarity(
    similarity: Float[np.ndarray, "role layer expert expert"],
    layers: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """How alike the experts of a layer are in their weights: a map of cosines for each matrix and layer.

    `similarity` is `analysis.weights.expert_similarity`'s; `layers` are the first, the middle and the last if not
    given. The diagonal, which is 1, is left empty. Source: arXiv 2406.18219. Raises `FigureError` for a layer that is
    not there, or other numbers than cosines.
    """
    if len(similarity) != len(ROLES) or not (np.abs(similarity) <= 1.001).all():
        raise FigureError(f"Cosines between -1 and 1 are needed for each of {', '.join(ROLES)}.")
    n_experts = similarity.shape[-1]
    if n_experts < 2:
        raise FigureError("There is one expert only, and nothing to compare it with.")
    shown = layers_shown(layers, similarity.shape[1])
    panels = similarity[:, shown].reshape(-1, n_experts, n_experts).copy()
    panels[:, np.arange(n_experts), np.arange(n_experts)] = np.nan
    heat = heat_panels(
        panels,
        [f"{role}, layer {layer}" for role in ROLES for layer in shown],
        n_experts,
        n_experts,
        row_title="expert",
        column_title="expert",
        hover="{panel}<br>experts {row} and {column}: cosine {value}",
        middle=0.0,
        percent=False,
        written=np.round(panels, 2) + 0.0,  # not "-0.00"
    )
    return framed(
        heat.figure,
        f"How alike the experts' weights are: {maker(model, dtype)}",
        "Cosine of the two matrices read as long vectors: 1 for copies, 0 for unrelated ones.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def norm_and_score(
    within: Float[np.ndarray, " layer"], pooled: Float[np.ndarray, " layer"], model: str = "", dtype: str = ""
) -> go.Figure:
    """Whether routers favour experts with large answers: rank correlation of the two, layer by layer.

    Both arrays are `analysis.weights.norm_and_score`'s. Source: arXiv 2406.18219. Raises `FigureError` if they differ
    in length or hold no number.
    """
    if len(within) != len(pooled) or not np.isfinite([*within, *pooled]).any():
        raise FigureError(f"One number per layer is needed in each array; these have {len(within)} and {len(pooled)}.")
    fig = go.Figure()
    layers = np.arange(len(within))
    for name, values, colour, dash, symbol in (
        ("experts of one token", within, INK, "solid", "circle"),
        ("all tokens and experts in one list", pooled, "#8c959f", "dot", "square"),
    ):
        fig.add_scatter(
            x=layers, y=values, mode="lines+markers", name=name, showlegend=True,
            line={"color": colour, "dash": dash, "width": 2}, marker={"size": 8, "symbol": symbol},
            hovertemplate=f"layer %{{x}}, {name}<br>rank correlation %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": SOFT, "width": 1.2})
    fig.update_yaxes(range=[-1.05, 1.05], title="rank correlation", gridcolor=GRID, zeroline=False, fixedrange=True)
    fig.update_xaxes(
        title="layer", title_standoff=6, dtick=max(1, len(layers) // 16), range=[-0.3, len(layers) - 0.7],
        showgrid=False, zeroline=False, ticks="outside", tickcolor=RULE, fixedrange=True,
    )  # fmt: skip
    return framed(
        fig,
        f"Does the router favour experts with large answers? {maker(model, dtype)}",
        "Above 0: the longer an expert's answer, the higher its score.",
        plot=280,
        left=76,
        below=46,
    )


def expert_peaks(
    peaks: Float[np.ndarray, "layer expert"],
    outstanding: Collection[tuple[int, int]] = (),
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """The largest number in any answer of each expert; framed: those found to be super experts, as (layer, expert).

    `peaks` are `analysis.weights.output_peaks`'s, the frames come from the columns layer and expert of its
    `super_experts`. Source: arXiv 2507.23279. Raises `FigureError` for an expert that is not there.
    """
    layers, n_experts = peaks.shape
    notes = np.full(peaks.shape, "", dtype=object)
    for layer, expert in outstanding:
        if not (0 <= layer < layers and 0 <= expert < n_experts):
            raise FigureError(f"There is no expert {expert} in layer {layer}: {layers} layers have {n_experts} each.")
        notes[layer, expert] = "<br>a super expert"
    heat = heat_panels(
        peaks[None, ::-1].astype(np.float64),
        [""],
        [str(layer) for layer in reversed(range(layers))],
        n_experts,
        row_title="layer",
        column_title="expert",
        hover="layer {row}, expert {column}<br>largest number in any answer: {value}{note}",
        percent=False,
        notes=notes[None, ::-1],
    )
    for layer, expert in outstanding:
        row = layers - 1 - layer  # layer 0 is at the bottom
        heat.figure.add_shape(
            type="rect", x0=expert - 0.5, x1=expert + 0.5, y0=row - 0.5, y1=row + 0.5,
            line={"color": INK, "width": 3},
        )  # fmt: skip
    said = "Framed: super experts." if len(outstanding) else "None of them counts as a super expert."
    return framed(
        heat.figure,
        f"The largest number in any answer, by expert: {maker(model, dtype)}",
        f"Largest magnitude that the expert's output took over all tokens that chose it. {said}",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )
