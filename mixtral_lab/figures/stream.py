"""How the residual stream grows: what it carries into each layer, and what that layer's two parts write into it."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import ACCENT, GRID, INK, framed, maker

ATTENTION = "#B2ABD2"  # the pale purple beside ACCENT


def stream_sizes(
    stream: Float[np.ndarray, " depth"],
    attention: Float[np.ndarray, " layer"],
    experts: Float[np.ndarray, " layer"],
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """The size of the stream as a line, before the first layer and after each, and of what each layer adds as bars.

    `stream` has one number more than there are layers: depth 0 is the embedding, depth n is after layer n - 1. Sizes are
    root mean squares over `dim`. Bars do not sum to the line: vectors that point elsewhere add less. Raises `FigureError` if
    the lengths do not fit.
    """
    layers = list(range(len(attention)))
    if not layers or len(experts) != len(layers) or len(stream) != len(layers) + 1:
        raise FigureError(
            f"There are {len(attention)} and {len(experts)} additions and {len(stream)} sizes of the stream: give as many "
            "of each addition as there are layers, and one size more."
        )
    fig = go.Figure()
    for name, values, colour in (("attention adds", attention, ATTENTION), ("experts add", experts, ACCENT)):
        fig.add_bar(
            x=layers, y=values, name=name, marker={"color": colour, "line_width": 0}, showlegend=True,
            hovertemplate=f"layer %{{x}}<br>{name}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    fig.add_scatter(
        x=[depth - 0.5 for depth in range(len(stream))], y=stream, mode="lines+markers", name="the stream between layers",
        line={"color": INK, "width": 2}, marker={"size": 7}, showlegend=True,
        customdata=["the embedding", *(f"after layer {layer}" for layer in layers)],
        hovertemplate="%{customdata}<br>the stream: %{y:.2f}<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(title="layer", tickvals=layers, showgrid=False, zeroline=False, fixedrange=True)
    fig.update_yaxes(title="size (root mean square)", gridcolor=GRID, rangemode="tozero", fixedrange=True)
    fig.update_layout(bargap=0.35, bargroupgap=0.05)
    return framed(fig, "The residual stream, layer by layer", maker(model, dtype), plot=300, left=60, below=48)
