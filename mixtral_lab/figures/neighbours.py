"""Do neighbours share an expert? Repetition by layer, one small plot for every kind of text."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mixtral_lab.analysis.neighbours import Repetition, random_repetition
from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import ACCENT, GRID, INK, RULE, WIDTH, distinct, framed, maker, panel_title

LINES = (("same first choice", INK), ("any choice in common", ACCENT))


def repetition(
    found: Mapping[str, Repetition], n_experts: int, n_choices: int, model: str = "", dtype: str = ""
) -> go.Figure:
    """The share of neighbouring tokens that repeat an expert, layer by layer, a plot for each domain.

    Lines are the two definitions, bands their 95 % intervals, dashes what blind choice of `n_choices` among `n_experts`
    gives. `found` holds what `analysis.repetition` makes of each domain. Source: Mixtral of Experts (arXiv
    2401.04088, Table 5 and Figure 10). Raises `FigureError` if there is nothing to draw or layers differ in number.
    """
    domains = distinct(tuple(found), len(found), "domain")
    layers = {repeats.share.shape[1] for repeats in found.values()}
    if len(layers) > 1:
        raise FigureError(f"The domains have different numbers of layers, {sorted(layers)}: compare one model's.")
    n_layers = layers.pop()
    across = min(5, len(domains))
    down = -(-len(domains) // across)
    gap, between, left = 14, 44, 62
    height = down * 150 + (down - 1) * between
    fig = make_subplots(
        down,
        across,
        shared_yaxes=True,
        horizontal_spacing=gap / (WIDTH - left - 24),
        vertical_spacing=between / height if down > 1 else 0,
    )
    for at, (domain, repeats) in enumerate(zip(domains, found.values(), strict=True)):
        row, column = at // across + 1, at % across + 1
        for definition, (name, colour) in enumerate(LINES):
            x, place = list(range(n_layers)), {"row": row, "col": column}
            share, low, high = (part[definition] for part in repeats[:3])
            fig.add_scatter(
                x=x + x[::-1], y=[*high, *low[::-1]], fill="toself", fillcolor=colour, opacity=0.2, line_width=0,
                mode="lines", hoverinfo="skip", showlegend=False, legendgroup=name, **place,
            )  # fmt: skip
            fig.add_scatter(
                x=x,
                y=share,
                customdata=list(zip(low, high, strict=True)),
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker_size=5 if n_layers <= 16 else 3,
                name=name,
                legendgroup=name,
                showlegend=at == 0,
                hovertemplate=f"{domain}, layer %{{x}}<br>{name}: %{{y:.1%}} of {repeats.pairs:,} pairs"
                "<br>95 %: %{customdata[0]:.1%} to %{customdata[1]:.1%}<extra></extra>",
                **place,
            )
            fig.add_hline(
                y=random_repetition(n_experts, n_choices)[definition],
                line={"color": colour, "width": 1.2, "dash": "dash"},
                **place,
            )
        axes = fig.get_subplot(row, column)
        panel_title(fig, domain, axes.yaxis.domain[1], axes.xaxis.domain[0])
        if at + across >= len(domains):
            axes.xaxis.update(title="layer", title_standoff=4)
    every = max(1, -(-n_layers // 8))
    fig.update_xaxes(
        range=[-0.4, n_layers - 0.6], dtick=every, tick0=0, showgrid=False, zeroline=False, fixedrange=True
    )
    fig.update_yaxes(range=[0, 1.02], tickformat=".0%", dtick=0.25, gridcolor=GRID, zerolinecolor=RULE, fixedrange=True)
    fig.update_yaxes(title="share of neighbours", title_standoff=8, row=(down + 1) // 2, col=1)
    return framed(
        fig,
        f"Do neighbouring tokens share an expert? {maker(model, dtype)}",
        f"Bands: 95 % intervals. Dashed: blind choice of {n_choices} among {n_experts} experts; more where some are busier.",
        plot=height,
        left=left,
        right=24,
        below=46,
    )
