"""What reading and writing cost: time by place in the model, time and memory by length of the text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import INK, SOFT, framed, maker, panel_title, plain

if TYPE_CHECKING:
    import pandas as pd

GRID = "#eaeef2"
LINES = (("solid", INK, 3), ("dash", SOFT, 2), ("dot", SOFT, 2), ("dashdot", SOFT, 2))  # the first contender stands out
PANELS = (  # column, title, unit, how many of them are 1 of the frame's
    ("seconds", "time to decode one more token", "ms", 1e3),
    ("cache", "memory held by the cache after reading", "MiB", 2**-20),
    ("peak", "memory held at most while reading, beyond the weights", "MiB", 2**-20),
)


def time_by_site(profile: pd.DataFrame, model: str = "", dtype: str = "") -> go.Figure:
    """Where the time of a pass goes, one panel for each kind of work, a bar per place in the model.

    `profile` is tidy, as `bench.profile` makes it: columns work, site, seconds, share. Sites stand in the order of the frame.
    Raises `FigureError` for a frame without these columns or without rows.
    """
    _require(profile, ("work", "site", "seconds", "share"))
    works, sites = list(dict.fromkeys(profile["work"])), list(dict.fromkeys(profile["site"]))
    fig = make_subplots(1, len(works), shared_yaxes=True, horizontal_spacing=0.05)
    highest = float(profile["share"].max())
    for column, work in enumerate(works, start=1):
        rows = profile[profile["work"] == work]
        total = float(rows["seconds"].sum())
        fig.add_bar(
            orientation="h",
            x=rows["share"],
            y=[plain(site) for site in rows["site"]],
            marker={"color": INK, "line_width": 0},
            text=[f"{share:.1%}" for share in rows["share"]],
            textposition="outside",
            cliponaxis=False,
            customdata=[_duration(seconds) for seconds in rows["seconds"]],
            hovertemplate=f"{plain(str(work))}, %{{y}}<br>%{{customdata}}, %{{x:.1%}} of the pass<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        axis = fig.get_subplot(1, column)
        panel_title(fig, f"{plain(str(work))}: {_duration(total)}", 1.0, axis.xaxis.domain[0])
    fig.update_xaxes(
        range=[0, highest * 1.2], tickformat=".0%", gridcolor=GRID, zerolinecolor=INK, title="share of the time", fixedrange=True
    )  # fmt: skip
    fig.update_yaxes(
        type="category", categoryorder="array", categoryarray=[plain(site) for site in reversed(sites)],
        range=[-0.6, len(sites) - 0.4], ticks="", fixedrange=True,
    )  # fmt: skip
    fig.update_layout(bargap=0.3)
    return framed(
        fig,
        f"Where the time goes: {maker(model, dtype)}",
        "Share of one pass spent at each kind of place in the model, all layers together.",
        plot=26 * len(sites),
        left=150,
        right=30,
        below=48,
    )


def cost_by_length(lengths: pd.DataFrame, model: str = "", dtype: str = "") -> go.Figure:
    """What one more token costs after a text of rising length: time, and memory.

    `lengths` is tidy, as a benchmark report's `lengths` makes it: columns contender, tokens, seconds (to decode one token
    after so many), cache and peak (bytes held after reading so many, and at most while reading them); what was not measured
    is NaN. The first contender is drawn in full. Raises `FigureError` for a frame without these columns or without rows.
    """
    _require(lengths, ("contender", "tokens", *(column for column, *_ in PANELS)))
    fig = make_subplots(len(PANELS), 1, shared_xaxes=True, vertical_spacing=0.09)
    named: set[str] = set()
    ticks = sorted({int(tokens) for tokens in lengths["tokens"]})
    for row, (column, title, unit, scale) in enumerate(PANELS, start=1):
        for number, contender in enumerate(dict.fromkeys(lengths["contender"])):
            rows = lengths[(lengths["contender"] == contender) & lengths[column].notna()].sort_values("tokens")
            if rows.empty:
                continue
            dash, colour, width = LINES[min(number, len(LINES) - 1)]
            fig.add_scatter(
                x=rows["tokens"],
                y=rows[column] * scale,
                mode="lines+markers",
                line={"dash": dash, "color": colour, "width": width},
                marker={"size": 7},
                name=plain(str(contender)),
                legendgroup=str(contender),
                showlegend=contender not in named,
                hovertemplate=f"{plain(str(contender))}<br>%{{x:,}} tokens: %{{y:,.2f}} {unit}<extra></extra>",
                row=row,
                col=1,
            )
            named.add(contender)
        panel_title(fig, title, fig.get_subplot(row, 1).yaxis.domain[1])
        fig.update_yaxes(title=unit, gridcolor=GRID, rangemode="tozero", row=row, col=1)
    memory = lengths[["cache", "peak"]].to_numpy(dtype=float) * 2**-20
    least, most = float(memory[memory > 0].min(initial=1.0)), float(memory[memory > 0].max(initial=1.0))
    for row in (2, 3):
        fig.update_yaxes(
            type="log", range=[math.log10(least) - 0.15, math.log10(most) + 0.15], dtick=1, row=row, col=1
        )  # fmt: skip
    fig.update_xaxes(
        type="log", tickvals=ticks, ticktext=[f"{one:,}" for one in ticks], gridcolor=GRID, showticklabels=True, ticks=""
    )  # fmt: skip
    fig.update_xaxes(title="tokens read before", row=len(PANELS), col=1)
    return framed(
        fig,
        f"What length costs: {maker(model, dtype)}",
        "A window bounds what must be kept, whatever the length of the text.",
        plot=3 * 190,
        left=70,
        right=30,
        below=48,
    )


def _require(frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise FigureError(f"The table lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}.")
    if not len(frame):
        raise FigureError("The table is empty: was that part of the benchmark run?")


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.0f} µs"
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
