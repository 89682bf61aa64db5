"""What fits a machine: memory and speed of each way to keep a model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import ACCENT, GRID, INK, RULE, SOFT, framed, panel_title, plain

if TYPE_CHECKING:
    import pandas as pd


def what_fits(fits: pd.DataFrame, memory: float, model: str = "") -> go.Figure:
    """How much memory each way of keeping the weights needs, and how fast it could write at most.

    `fits` is tidy, as `machine.what_fits` makes it; `memory` is the machine's, in bytes. Ways that do not fit have pale bars
    and no rate. Raises `FigureError` for a table without rows.
    """
    if not len(fits):
        raise FigureError("The table is empty: there is nothing to compare.")
    names = [
        f"{row.dtype}" + ("" if row.experts == "as the rest" else f", experts {row.experts}")
        for row in fits.itertuples()
    ]
    runs = fits["resident"].to_numpy() > 0
    whole = fits["resident"].to_numpy() == fits["n_experts"].to_numpy()
    fig = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06, column_widths=[0.6, 0.4])
    for column, colour, name in (("weights", INK, "weights"), ("cache", ACCENT, "cache of keys and values")):
        fig.add_bar(
            orientation="h", y=names, x=fits[column] / 1e9, name=name, showlegend=True,
            marker={"color": colour, "line_width": 0, "opacity": np.where(runs, 1.0, 0.25)},
            hovertemplate=f"%{{y}}<br>{name}: %{{x:,.2f}} GB<extra></extra>", row=1, col=1,
        )  # fmt: skip
    said = [
        "does not fit" if not fit else f"{rate:,.3g} tokens/s" + ("" if all_ else f", {kept} of {total} experts kept")
        for fit, all_, rate, kept, total in zip(
            runs, whole, fits["rate"], fits["resident"], fits["n_experts"], strict=True
        )
    ]
    fig.add_bar(
        orientation="h", y=names, x=fits["rate"].fillna(0), text=said, textposition="outside", cliponaxis=False,
        marker={"color": SOFT, "line_width": 0}, showlegend=False, hovertemplate="%{y}<br>%{text}<extra></extra>",
        row=1, col=2,
    )  # fmt: skip
    fig.add_vline(x=memory / 1e9, line={"color": ACCENT, "dash": "dash", "width": 2}, row=1, col=1)
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=RULE, rangemode="tozero", fixedrange=True)
    fig.update_xaxes(title="GB", row=1, col=1)
    most = float(fits["rate"].max()) if runs.any() else 1.0
    fig.update_xaxes(title="tokens per second, at most", range=[0, 2.9 * most], row=1, col=2)
    fig.update_yaxes(categoryorder="array", categoryarray=names[::-1], ticks="", fixedrange=True)
    fig.update_layout(barmode="stack", bargap=0.35)
    panel_title(fig, f"memory: the machine has {memory / 1e9:,.0f} GB (dashed)", 1.0)
    panel_title(fig, "speed, by the bytes each token reads", 1.0, fig.get_subplot(1, 2).xaxis.domain[0])
    return framed(
        fig,
        f"What fits: {plain(model) or 'model not given'}",
        "Pale: does not fit. Experts that are not kept in memory are fetched when chosen; how often is taken as by chance.",
        plot=40 * len(names),
        left=160,
        right=30,
        below=48,
    )
