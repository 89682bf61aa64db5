"""A cache of experts, replayed: how often it holds the one asked for, and what it has to move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import ACCENT, GRID, INK, RULE, SOFT, framed, maker, panel_title, plain

if TYPE_CHECKING:
    import pandas as pd

STYLES = (  # one for each policy; none is an expert's colour
    {"color": INK, "dash": "solid", "symbol": "circle"},
    {"color": "#8c959f", "dash": "solid", "symbol": "square"},
    {"color": ACCENT, "dash": "dot", "symbol": "diamond"},
    {"color": "#bf3989", "dash": "dash", "symbol": "triangle-up"},
    {"color": "#7d4e00", "dash": "dashdot", "symbol": "cross"},
)
COLUMNS_NEEDED = {"policy", "capacity", "layer", "tokens", "asked", "hits", "bytes"}


def expert_cache(frame: pd.DataFrame, model: str = "", dtype: str = "") -> go.Figure:
    """How often a cache of 1 to all experts per layer holds the one asked for, and what it moves, by policy.

    `frame` is `analysis.offload.offload_frame`'s; layers are taken together. Dashed: experts drawn at random, c / E.
    Source: Fast Inference of Mixture-of-Experts Language Models with Offloading (arXiv 2312.17238, Figure 2 and
    section 3). Raises `FigureError` for a table without its columns or rows.
    """
    policies = _policies(frame)
    counts = frame.groupby(["policy", "capacity"], sort=False)[["asked", "hits", "bytes"]].sum()
    tokens = frame.groupby(["policy", "capacity", "layer"], sort=False).tokens.sum().iloc[0]
    n_experts = int(frame.capacity.max())
    panel, gap = 250, 62
    height = 2 * panel + gap
    fig = make_subplots(2, 1, vertical_spacing=gap / height, shared_xaxes=True)
    for policy, style in zip(policies, STYLES, strict=False):
        part = counts.loc[policy]
        look = {
            "mode": "lines+markers", "name": plain(policy), "legendgroup": policy,
            "line": {"color": style["color"], "dash": style["dash"], "width": 2},
            "marker": {"symbol": style["symbol"], "size": 8},
        }  # fmt: skip
        fig.add_scatter(
            x=part.index, y=part.hits / part.asked, row=1, col=1, showlegend=True, **look,
            hovertemplate="%{x} of " + f"{n_experts} experts per layer, {plain(policy)}<br>"
            "%{y:.1%} of those asked for are there<extra></extra>",
        )  # fmt: skip
        fig.add_scatter(
            x=part.index, y=part.bytes / tokens / 1e6, row=2, col=1, showlegend=False, **look,
            hovertemplate="%{x} of " + f"{n_experts} experts per layer, {plain(policy)}<br>"
            "%{y:,.2f} MB copied per token<extra></extra>",
        )  # fmt: skip
    fig.add_scatter(
        x=[1, n_experts], y=[1 / n_experts, 1], mode="lines", name="drawn at random", showlegend=True,
        line={"color": SOFT, "width": 1.5, "dash": "dash"},
        hoverinfo="skip", row=1, col=1,
    )  # fmt: skip
    fig.update_yaxes(range=[0, 1.03], tickformat=".0%", title="found at hand", row=1, col=1)
    fig.update_yaxes(rangemode="tozero", title="MB copied per token", row=2, col=1)
    fig.update_xaxes(title="experts kept per layer", title_standoff=6, row=2, col=1)
    fig.update_xaxes(dtick=max(1, n_experts // 16), range=[0.8, n_experts + 0.2], showticklabels=True, ticks="outside")
    _ruled(fig)
    panel_title(fig, "asked for and found", fig.get_subplot(1, 1).yaxis.domain[1])
    panel_title(
        fig, "moved into the cache, guesses that came to nothing included", fig.get_subplot(2, 1).yaxis.domain[1]
    )
    return framed(
        fig,
        f"A cache of experts, replayed: {maker(model, dtype)}",
        f"All layers together, {tokens:,} tokens, every cache empty at first. An expert fetched on a right guess counts as found.",
        plot=height,
        left=76,
        below=46,
    )


def expert_cache_by_layer(
    frame: pd.DataFrame,
    policy: str = "LRU",
    capacities: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """How often a cache holds the expert asked for in each layer, a line for each number of experts kept.

    `capacities` are 2, 4 and 6 if not given (as far as there are that many). Source: arXiv 2312.17238, Figure 2 (left).
    Raises `FigureError` for a policy or a capacity that the table does not have.
    """
    policies = _policies(frame)
    if policy not in policies:
        raise FigureError(f"The table has no policy {policy!r}: it has {', '.join(policies)}.")
    known = sorted(set(frame.capacity.tolist()))
    shown = [c for c in (2, 4, 6) if c in known] or known if capacities is None else list(capacities)
    for capacity in shown:
        if capacity not in known:
            raise FigureError(f"The table has no cache of {capacity} experts: it has {known}.")
    counts = frame[frame.policy == policy].groupby(["capacity", "layer"])[["asked", "hits"]].sum()
    n_experts, fig = known[-1], go.Figure()
    greys = [INK, SOFT, "#8c959f", "#b6bec7"]
    for number, capacity in enumerate(shown):
        part, grey = counts.loc[capacity], greys[number % len(greys)]
        of_all = f"{capacity} of {n_experts} experts kept"
        fig.add_scatter(
            x=part.index, y=part.hits / part.asked, mode="lines+markers", name=of_all, showlegend=True,
            line={"color": grey, "width": 2}, marker={"symbol": STYLES[number % len(STYLES)]["symbol"], "size": 8},
            hovertemplate=f"layer %{{x}}, {of_all}<br>%{{y:.1%}} of those asked for are there<extra></extra>",
        )  # fmt: skip
        fig.add_hline(y=capacity / n_experts, line={"color": grey, "width": 1.2, "dash": "dash"})
    fig.update_yaxes(range=[0, 1.03], tickformat=".0%", title="found in the cache")
    layers = int(frame.layer.max()) + 1
    fig.update_xaxes(
        title="layer", title_standoff=6, dtick=max(1, layers // 16), range=[-0.3, layers - 0.7], ticks="outside"
    )
    _ruled(fig)
    return framed(
        fig,
        f"Which layers' experts a cache holds ({plain(policy)}): {maker(model, dtype)}",
        "Share of the experts asked for that were in the cache. Dashed, in the same grey: experts drawn at random.",
        plot=300,
        left=76,
        below=46,
    )


def _policies(frame: pd.DataFrame) -> list[str]:
    missing = COLUMNS_NEEDED - set(frame.columns)
    if missing or frame.empty:
        raise FigureError(
            f"The table lacks {', '.join(sorted(missing)) or 'rows'}: analysis.offload.offload_frame makes one."
        )
    policies = list(dict.fromkeys(frame.policy))
    if len(policies) > len(STYLES):
        raise FigureError(
            f"{len(policies)} policies are more than the {len(STYLES)} that can be told apart: show fewer."
        )
    return policies


def _ruled(fig: go.Figure) -> None:
    fig.update_xaxes(showgrid=False, zeroline=False, showline=True, fixedrange=True, tickcolor=RULE)
    fig.update_yaxes(gridcolor=GRID, zerolinecolor=RULE, fixedrange=True)
