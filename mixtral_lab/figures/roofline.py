"""What a machine can do, by how often each byte it reads is used: the roofline, and what was measured beneath it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import ACCENT, GRID, INK, RULE, SOFT, framed, plain


def roofline(
    intensities: Sequence[float],
    rates: Sequence[float],
    names: Sequence[str],
    bandwidth: float,
    ceiling: float,
    title: str,
    subtitle: str = "",
) -> go.Figure:
    """Measured rates of work beneath what bandwidth and arithmetic allow, both axes in powers of two or ten.

    A dot for each piece of work: `intensities` in operations per byte, `rates` in operations per second. `bandwidth` is in
    bytes, `ceiling` in operations per second. A name may have two lines. Raises `FigureError` for numbers that are not above 0.
    Source: Williams, Waterman and Patterson 2009.
    """
    if not len(intensities) == len(rates) == len(names) or not len(names):
        raise FigureError(f"There are {len(intensities)} intensities, {len(rates)} rates and {len(names)} names.")
    numbers = [*intensities, *rates, bandwidth, ceiling]
    if not all(0 < number < math.inf for number in numbers):
        raise FigureError("Intensities, rates, bandwidth and ceiling must be above 0, and not infinite.")
    ridge = ceiling / bandwidth
    left, right = min(*intensities, ridge) / 1.6, max(*intensities, ridge) * 1.6
    low = min(*rates, bandwidth * left) / 1e9 / 1.8
    high = max(*rates, ceiling) / 1e9
    fig = go.Figure()
    for x, name, colour in (
        ([left, ridge], f"what memory allows: {_short(bandwidth / 1e9)} GB/s", INK),
        ([ridge, right], f"what arithmetic allows: {_short(ceiling / 1e9)} GFLOP/s", SOFT),
    ):
        fig.add_scatter(
            x=x, y=[min(bandwidth * at, ceiling) / 1e9 for at in x], mode="lines", name=name, showlegend=True,
            line={"color": colour, "width": 3}, hoverinfo="skip",
        )  # fmt: skip
    fig.add_vline(x=ridge, line={"color": RULE, "dash": "dash", "width": 2})
    fig.add_annotation(
        x=math.log10(ridge), y=0, yref="paper", text=f"both alike: {_short(ridge)}", showarrow=False, font={"color": SOFT},
        xanchor="left", yanchor="bottom", xshift=5, yshift=3,
    )  # fmt: skip
    fig.add_scatter(
        x=list(intensities), y=[rate / 1e9 for rate in rates], mode="markers+text", name="measured", showlegend=True,
        text=[plain(name).replace("\n", "<br>") for name in names], textposition="bottom center",
        marker={"color": ACCENT, "size": 10}, textfont={"color": ACCENT},
        hovertemplate="%{text}<br>%{x:,.3~r} operations per byte<br>%{y:,.3~r} GFLOP/s<extra></extra>",
    )  # fmt: skip
    fig.update_xaxes(
        title="operations for each byte that is read", type="log", gridcolor=GRID, fixedrange=True,
        range=[math.log10(left), math.log10(right * 1.5)], tickvals=[2.0**power for power in range(-3, 13)],
        ticktext=[f"1/{2**-power}" if power < 0 else f"{2**power:,}" for power in range(-3, 13)],
    )  # fmt: skip
    fig.update_yaxes(
        title="GFLOP per second", type="log", gridcolor=GRID, fixedrange=True, dtick=1, exponentformat="none",
        separatethousands=True, range=[math.log10(low), math.log10(high) + 0.15],
    )  # fmt: skip
    return framed(fig, plain(title), plain(subtitle), plot=330, left=78, right=40, below=52).update_layout(
        legend={"entrywidth": 228}
    )


def _short(number: float) -> str:
    """Three figures, and never an exponent: 18.2, 4,000."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
