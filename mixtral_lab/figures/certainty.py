"""How sure the routers are, layer by layer."""

from __future__ import annotations

from math import log2

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Integer
from plotly.subplots import make_subplots

from mixtral_lab.analysis.certainty import binned_quantile, near_ties
from mixtral_lab.figures.colours import FigureError, blend
from mixtral_lab.figures.frame import ACCENT, GRID, WIDTH, framed, maker, panel_title

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def router_certainty(
    entropies: Integer[np.ndarray, "layer bin"],
    margins: Integer[np.ndarray, "_ _"],
    n_experts: int,
    n_choices: int,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Per layer, where most tokens' router entropy lies, and their margin between the last choice and the next best.

    A dot is the median, a thick line the middle half of the tokens, a thin one the middle 90 %. `entropies` and `margins`
    are `analysis.binned_counts` of `router_entropy` up to log2 E and of `near_tie_margin` up to 1/k. Raises `FigureError`
    if they are of different layers.
    """
    if entropies.shape != margins.shape:
        raise FigureError(f"Entropies and margins are of different layers or bins: {entropies.shape}, {margins.shape}.")
    n_layers = len(entropies)
    ties = near_ties(margins, n_choices)
    step = min(max(420 / n_layers, 13), 26)
    fig = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05)
    for column, (counts, top, unit, number) in enumerate(
        ((entropies, log2(n_experts), "bits", ".2f"), (margins, 1 / n_choices, "", ".3f")), start=1
    ):
        low, lower, median, upper, high = (binned_quantile(counts, top, share) for share in QUANTILES)
        layers = np.arange(n_layers)
        for start, end, width in ((low, high, 2), (lower, upper, 7)):
            fig.add_scatter(
                x=np.stack([start, end, np.full(n_layers, np.nan)], 1).ravel(),
                y=np.repeat(layers, 3),
                mode="lines",
                line={"color": blend(ACCENT, 0.45), "width": width},
                hoverinfo="skip",
                showlegend=False,
                row=1,
                col=column,
            )
        fig.add_scatter(
            x=median,
            y=layers,
            customdata=np.stack([low, lower, upper, high, ties], 1),
            mode="markers",
            marker={"color": ACCENT, "size": 9, "line": {"color": "white", "width": 1}},
            showlegend=False,
            hovertemplate=f"layer %{{y}}<br>median %{{x:{number}}} {unit}<br>half of the tokens: %{{customdata[1]:{number}}} to "
            f"%{{customdata[2]:{number}}}<br>90 %: %{{customdata[0]:{number}}} to %{{customdata[3]:{number}}}"
            + ("<br>near ties: %{customdata[4]:.1%}" if column == 2 else "")
            + "<extra></extra>",
            row=1,
            col=column,
        )
    for layer in range(n_layers):
        fig.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=8, y=layer, yref="y", text=f"{ties[layer]:.1%}", showarrow=False,
            font={"size": 12 if step > 15 else 10},
        )  # fmt: skip
    fig.add_annotation(
        x=1, xref="paper", xanchor="left", xshift=8, y=1, yref="paper", yanchor="bottom", yshift=1, text="<b>near ties</b>",
        showarrow=False, font={"size": 13},
    )  # fmt: skip
    panel_title(fig, "entropy of the router's probabilities", 1.0)
    panel_title(fig, "probability of the last choice less that of the next best", 1.0, fig.layout.xaxis2.domain[0])
    fig.update_xaxes(gridcolor=GRID, zeroline=False, fixedrange=True, title_standoff=6)
    fig.update_xaxes(title_text=f"bits, of {log2(n_experts):.3g}", range=[0, log2(n_experts) * 1.02], col=1)
    widest = binned_quantile(margins, 1 / n_choices, QUANTILES[-1]).max()
    fig.update_xaxes(title_text="probability", range=[0, widest * 1.06], col=2)
    fig.update_yaxes(
        range=[-0.6, n_layers - 0.4], dtick=max(1, -(-n_layers // 16)), tick0=0, showgrid=False, zeroline=False,
        fixedrange=True,
    )  # fmt: skip
    fig.update_yaxes(title="layer", col=1)
    return framed(
        fig,
        f"How sure are the routers? {maker(model, dtype)}",
        "Dot: median over tokens; thick: the middle half; thin: 90 %. Near ties: margin below 0.01, where a coarser "
        "dtype may choose differently.",
        plot=round(n_layers * step),
        left=60,
        right=96,
        below=46,
        width=WIDTH,
    )
