"""What happens to a mixture while it is trained: the experts' shares from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError, expert_colour
from mixtral_lab.figures.frame import GRID, framed, panel_title, plain

PANEL, GAP = 170, 62  # pixels: height of a panel, and between two rows of them


def shares_over_steps(
    runs: Mapping[str, Float[np.ndarray, "step layer expert"]],
    every: int = 1,
    title: str = "Who is chosen, step by step",
) -> go.Figure:
    """Each expert's share of the assignments as training goes on: a column per run, a row per layer, areas stacked.

    `every` is how many training steps lie between two rows of an array. In each panel the areas sum to 1; expert 0 lies
    at the bottom. Raises `FigureError` if an array is not such shares, or if two runs differ in layers or experts.
    """
    arrays = {plain(name): np.asarray(shares, dtype=float) for name, shares in runs.items()}
    if not arrays or len(arrays) != len(runs):
        raise FigureError(f"Give at least one run, each with a name of its own, not {list(runs)}.")
    for name, shares in arrays.items():
        if shares.ndim != 3 or not shares.size or not np.allclose(shares.sum(-1), 1, atol=1e-3) or shares.min() < 0:
            raise FigureError(f"The shares of {name} must be (step, layer, expert) and sum to 1 over the experts.")
    shapes = {shares.shape[1:] for shares in arrays.values()}
    if len(shapes) > 1:
        raise FigureError(f"The runs must have as many layers and experts as each other, but have {sorted(shapes)}.")
    ((n_layers, n_experts),) = shapes
    plot = PANEL * n_layers + GAP * (n_layers - 1)
    fig = make_subplots(
        rows=n_layers, cols=len(arrays), horizontal_spacing=0.06,
        vertical_spacing=GAP / plot if n_layers > 1 else 0, shared_yaxes=True,
    )  # fmt: skip
    for column, (name, shares) in enumerate(arrays.items(), start=1):
        steps = [every * n for n in range(len(shares))]
        for layer in range(n_layers):
            for expert in range(n_experts):
                fig.add_scatter(
                    x=steps, y=shares[:, layer, expert], mode="lines", line={"width": 0.4, "color": "white"},
                    fillcolor=expert_colour(expert), stackgroup=f"{column} {layer}", name=f"expert {expert}",
                    showlegend=False, row=layer + 1, col=column,
                    hovertemplate=f"{name}, layer {layer}, step %{{x}}<br>expert {expert}: %{{y:.0%}}<extra></extra>",
                )  # fmt: skip
            subplot = fig.get_subplot(layer + 1, column)
            panel_title(fig, f"{name}, layer {layer}", y=subplot.yaxis.domain[1], x=subplot.xaxis.domain[0])
            last = layer == n_layers - 1
            fig.update_xaxes(
                title="step" if last else None, range=[steps[0], max(steps[-1], every)], showgrid=False, zeroline=False,
                fixedrange=True, row=layer + 1, col=column,
            )  # fmt: skip
    fig.update_yaxes(range=[0, 1], tickformat=".0%", dtick=0.25, gridcolor=GRID, zeroline=False, fixedrange=True)
    return framed(
        fig,
        plain(title),
        f"Share of assignments of each of {n_experts} experts; if all were used alike, each would have {1 / n_experts:.1%}.",
        n_experts,
        plot=plot,
        left=58,
        right=24,
        below=48,
    )
