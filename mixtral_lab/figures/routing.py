"""Who reads what: each expert's share of a domain's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError, expert_colour
from mixtral_lab.figures.frame import GRID, INK, RULE, WIDTH, cells, distinct, framed, layers_shown, maker, panel_title
from mixtral_lab.figures.heat import heat_panels

RANKS = ("first", "second", "third")


def expert_shares(
    shares: Float[np.ndarray, "domain layer expert"],
    domains: Sequence[str],
    layers: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Each expert's share of the assignments in every domain, one panel per layer; dashed: all experts alike.

    Every row of `shares` sums to 1 over `expert`: `analysis.domain_shares` makes such an array. `layers` are the
    first, the middle and the last if not given; `model` and `dtype` go into the title. Source: Mixtral of Experts
    (arXiv 2401.04088, Figure 7). Raises `FigureError` if the array is not such shares.
    """
    names = distinct(domains, len(shares), "domain")
    _check(shares)
    shown, n_experts = layers_shown(layers, shares.shape[1]), shares.shape[2]
    titles = [f"layer {layer}" for layer in shown]
    fig, height, below = _bars(shares[:, shown].transpose(1, 0, 2), titles, names, "assignments")
    return framed(
        fig,
        f"Which experts read what: {maker(model, dtype)}",
        f"Share of assignments, first choices and others alike. Dashed: what each of {n_experts} experts has if all "
        "are used alike.",
        n_experts,
        plot=height,
        toggles=True,
        left=76,
        below=below,
    )


def rank_shares(
    shares: Float[np.ndarray, "domain layer choice expert"],
    domains: Sequence[str],
    layer: int,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Each expert's share of the first choices in every domain, below it of the second, and so on, in one layer.

    Every row of `shares` sums to 1 over `expert`: `as_shares(domain_counts(traces, rank_counts)[1])` makes such an
    array. Source: Mixtral of Experts (arXiv 2401.04088, Figure 9). Raises `FigureError` if the array is not such
    shares, or the layer is not there.
    """
    names = distinct(domains, len(shares), "domain")
    _check(shares)
    (layer,), ranks, n_experts = layers_shown([layer], shares.shape[1]), shares.shape[2], shares.shape[3]
    titles = [f"{RANKS[rank] if rank < len(RANKS) else f'{rank + 1}th'} choice" for rank in range(ranks)]
    fig, height, below = _bars(shares[:, layer].transpose(1, 0, 2), titles, names, "these choices")
    return framed(
        fig,
        f"First and other choices in layer {layer}: {maker(model, dtype)}",
        f"Share of the tokens that choose an expert at each rank. Dashed: what each of {n_experts} experts has if all "
        "are used alike.",
        n_experts,
        plot=height,
        toggles=True,
        left=76,
        below=below,
    )


def domain_experts(
    shares: Float[np.ndarray, "domain layer expert"],
    domains: Sequence[str],
    layers: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Domains against experts as a map, one panel per layer: more or less than if all experts were used alike.

    For many domains, where the bars of `expert_shares` grow thin. `shares` are such shares, or those of
    `analysis.domain_specialisation`, which sum to k. Source: OLMoE (arXiv 2409.02060, section 5). Raises `FigureError`
    if the rows do not all sum to one whole number.
    """
    names = distinct(domains, len(shares), "domain")
    choices = _check(shares, whole=shares.shape[2])
    shown, n_experts = layers_shown(layers, shares.shape[1]), shares.shape[2]
    share_of = "assignments" if choices == 1 else "tokens"
    heat = heat_panels(
        shares[:, shown].transpose(1, 0, 2),
        [f"layer {layer}" for layer in shown],
        names,
        n_experts,
        middle=choices / n_experts,
        row_title="domain",
        column_title="expert",
        hover=f"{{row}}, {{panel}}<br>expert {{column}}: {{value}} of {share_of}",
    )
    return framed(
        heat.figure,
        f"Which experts read what: {maker(model, dtype)}",
        f"Share of {share_of} in %. White: {choices / n_experts:.1%}, what each expert has if all are used alike.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def _check(shares: Float[np.ndarray, "domain *layer expert"], whole: int = 1) -> int:
    """What every row sums to, a number from 1 to `whole`; raises `FigureError` otherwise."""
    total = round(float(shares.flat[: shares.shape[-1]].sum())) if np.isfinite(shares).all() and shares.size else 0
    if (shares < 0).any() or not 1 <= total <= whole or not np.allclose(shares.sum(-1), total, atol=1e-3):
        raise FigureError("Shares must be 0 or more and sum to 1 over the experts, for every domain and layer.")
    return total


def _bars(
    panels: Float[np.ndarray, "panel domain expert"], titles: Sequence[str], names: Sequence[str], share_of: str
) -> tuple[go.Figure, int, int]:
    """A row of bars for every panel, the domains side by side; also the height of all panels and the margin below."""
    n_panels, _, n_experts = panels.shape
    longest = max(cells(name) for name in names)
    upright = longest * 7.3 < (WIDTH - 96) / len(names)  # else names stand on end, below the last panel only
    panel, gap, below = 170, 46 if upright else 34, 52 if upright else 44 + round(7.3 * longest)
    height = n_panels * panel + (n_panels - 1) * gap
    fig = make_subplots(n_panels, 1, shared_xaxes=True, vertical_spacing=gap / height if n_panels > 1 else 0)
    highest = float(panels.max())
    for row, (shares, title) in enumerate(zip(panels, titles, strict=True), start=1):
        for expert in range(n_experts):
            fig.add_bar(
                x=names,
                y=shares[:, expert],
                marker={"color": expert_colour(expert), "line_width": 0},
                name=f"expert {expert}",
                legendgroup=str(expert),
                showlegend=False,
                hovertemplate=f"%{{x}}, {title}<br>expert {expert}: %{{y:.1%}} of {share_of}<extra></extra>",
                row=row,
                col=1,
            )
        fig.add_shape(
            type="line", x0=0, x1=1, xref="x domain" if row == 1 else f"x{row} domain", y0=1 / n_experts,
            y1=1 / n_experts, line={"color": INK, "width": 1.5, "dash": "dash"}, row=row, col=1,
        )  # fmt: skip
        axis = fig.get_subplot(row, 1).yaxis
        axis.update(
            range=[0, highest * 1.06], tickformat=".0%", gridcolor=GRID, zerolinecolor=RULE, nticks=5, fixedrange=True
        )
        panel_title(fig, title, axis.domain[1])
    fig.update_yaxes(title=f"share of {share_of}", row=(n_panels + 1) // 2, col=1)
    fig.update_xaxes(title="domain", title_standoff=6, row=n_panels, col=1)
    fig.update_xaxes(type="category", tickangle=0 if upright else -90, ticks="", fixedrange=True)
    if upright:
        fig.update_xaxes(showticklabels=True)
    fig.update_layout(bargap=0.18, bargroupgap=0.04)
    return fig, height, below
