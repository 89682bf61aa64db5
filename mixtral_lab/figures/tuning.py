"""What fine-tuning did: the loss from step to step, and which layers' routers changed their minds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import GRID, RULE, framed, plain

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by every reader


def tuning_losses(log: Sequence[Mapping[str, object]], title: str = "What was learned, step by step") -> go.Figure:
    """The loss of every step and, with marks, of the held-out conversations, from the lines of a run's `log.jsonl`.

    The best of the marks, whose adapter was kept, is ringed. Raises `FigureError` if there is no held-out loss.
    """
    steps = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["held_out"]) for entry in log if "held_out" in entry]
    if not held_out:
        raise FigureError("The log has no held-out loss: give the lines of a run's log.jsonl, each as a dictionary.")
    best = min(held_out, key=lambda pair: pair[1])  # type: ignore[arg-type,return-value]
    fig = go.Figure()
    hover = "step %{x}: %{y:.2f} nats<extra></extra>"
    for name, pairs, colour, marks in (
        ("learned from", steps, SERIES[0], "lines"),
        ("held out", held_out, SERIES[1], "lines+markers"),
    ):
        fig.add_scatter(
            x=[x for x, _ in pairs], y=[y for _, y in pairs], mode=marks, name=name, showlegend=True,
            line={"color": colour, "width": 2}, marker={"size": 8}, hovertemplate=f"{name}, {hover}",
        )  # fmt: skip
    fig.add_scatter(
        x=[best[0]], y=[best[1]], mode="markers", name="kept", showlegend=True, hoverinfo="skip",
        marker={"size": 16, "color": "rgba(0,0,0,0)", "line": {"width": 2, "color": SERIES[1]}},
    )  # fmt: skip
    fig.update_xaxes(title="step", showgrid=False, zeroline=False)
    fig.update_yaxes(title="nats per learned token", rangemode="tozero", gridcolor=GRID, zerolinecolor=RULE)
    return framed(
        fig, plain(title), "Loss on the assistant's words. Ringed: the lowest held-out loss, whose adapter was kept.",
        plot=300, left=64, below=52,
    )  # fmt: skip


def moved_choices(
    runs: Mapping[str, Float[np.ndarray, " layer"]], title: str = "Whose experts changed, layer by layer"
) -> go.Figure:
    """For each run, the share of tokens in each layer that other experts read than before: `analysis.moved_share`.

    Raises `FigureError` for shares outside 0 to 1, for no run, or for runs of different depth.
    """
    arrays = {plain(name): np.asarray(share, dtype=float) for name, share in runs.items()}
    depths = {share.shape for share in arrays.values()}
    inside = all(share.ndim == 1 and share.size and 0 <= share.min() <= share.max() <= 1 for share in arrays.values())
    if len(depths) != 1 or not inside or len(arrays) > len(SERIES):
        raise FigureError(
            f"Give one to {len(SERIES)} runs, each with a share from 0 to 1 for every layer, of as many layers as each other."
        )
    fig = go.Figure()
    for (name, share), colour in zip(arrays.items(), SERIES, strict=False):
        fig.add_bar(
            x=[str(layer) for layer in range(len(share))], y=share, name=name, showlegend=True, marker={"color": colour},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.0%}} of the tokens<extra></extra>",
        )  # fmt: skip
    fig.update_xaxes(title="layer", type="category", ticks="", showgrid=False)
    fig.update_yaxes(title="share of tokens", tickformat=".0%", rangemode="tozero", gridcolor=GRID, zerolinecolor=RULE)
    fig.update_layout(bargap=0.25, bargroupgap=0.06)
    return framed(
        fig, plain(title), "Tokens of which at least one expert is another than before.", plot=280, left=64, below=52
    )  # fmt: skip
