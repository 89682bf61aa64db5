"""Who sees whom, what a cache holds, and how far a change travels: tables of kinds and of distances as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from mixtral_lab.figures.colours import FigureError, text_colour
from mixtral_lab.figures.frame import ACCENT, GRID, INK, SOFT, WIDTH, cells, framed, maker, plain
from mixtral_lab.figures.heat import MORE, heat_panels

KIND_COLOURS = ("#542788", "#B2ABD2", "#E08214", "#B35806", "#8A9099")  # ends and middle of PuOr, and a grey
NOTHING = "#F6F8FA"  # a cell of kind 0


def kinds_map(
    kinds: Int[np.ndarray, "row column"],
    names: Sequence[str],
    title: str,
    subtitle: str = "",
    *,
    row_title: str = "query",
    column_title: str = "key",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    text: Sequence[Sequence[str]] | None = None,
) -> go.Figure:
    """A table whose cells are of a few kinds, such as a mask: who sees whom.

    A cell of kind `n` has the colour of `names[n - 1]`; kind 0 is pale and has no name. `rows` and `columns` name the axes'
    places (their numbers, if not given); `text` stands in the cells. Raises `FigureError` for a kind without a name.
    """
    if not kinds.size:
        raise FigureError(f"There is nothing to draw: the table has the shape {kinds.shape}.")
    if kinds.min() < 0 or kinds.max() > len(names) or len(names) > len(KIND_COLOURS):
        raise FigureError(
            f"Kinds run from {kinds.min()} to {kinds.max()} and {len(names)} have a name: name 1 to {len(KIND_COLOURS)} of them."
        )
    n_rows, n_columns = kinds.shape
    down, across = _places(rows, n_rows), _places(columns, n_columns)
    left = 58 + round(7.2 * max(map(cells, down)))
    turned = max(map(cells, across)) > 4
    below = 52 + (round(7.2 * max(map(cells, across))) if turned else 0)
    room = WIDTH - left - 30
    cell = min(32.0, room / n_columns, max(14.0, 560 / n_rows))
    colours = (NOTHING, *KIND_COLOURS[: len(names)])
    fig = go.Figure()
    for number, name in enumerate(names, start=1):
        fig.add_scatter(
            x=[None], y=[None], mode="markers", name=plain(name), hoverinfo="skip", showlegend=True,
            marker={"color": colours[number], "size": 13, "symbol": "square"},
        )  # fmt: skip
    steps = len(colours)
    fig.add_heatmap(
        z=kinds,
        zmin=-0.5,
        zmax=steps - 0.5,
        colorscale=[(at / steps, colour) for n, colour in enumerate(colours) for at in (n, n + 1)],
        showscale=False,
        xgap=1,
        ygap=1,
        customdata=[[("", *names)[kind] for kind in line] for line in kinds],
        hovertemplate=f"{row_title} %{{y}}, {column_title} %{{x}}<br>%{{customdata}}<extra></extra>",
    )
    if text is not None:
        for (row, column), kind in np.ndenumerate(kinds):
            fig.add_annotation(
                x=column, y=row, text=plain(text[row][column]), showarrow=False,
                font={"size": 12, "color": text_colour(colours[kind])},
            )  # fmt: skip
    quiet = {"ticks": "", "showgrid": False, "zeroline": False, "fixedrange": True, "tickfont_size": 11}
    every_row, every_column = max(1, round(15 / cell)), max(1, round(24 / cell))
    fig.update_xaxes(
        title=column_title, tickvals=list(range(0, n_columns, every_column)), ticktext=across[::every_column],
        tickangle=-90 if turned else 0, range=[-0.5, n_columns - 0.5],
        domain=[0, min(1.0, cell * n_columns / room)], **quiet,
    )  # fmt: skip
    fig.update_yaxes(
        title=row_title, tickvals=list(range(0, n_rows, every_row)), ticktext=down[::every_row],
        range=[n_rows - 0.5, -0.5], **quiet,
    )  # fmt: skip
    return framed(
        fig,
        plain(title),
        plain(subtitle),
        plot=round(cell * n_rows),
        left=left,
        right=30,
        below=below,
    ).update_layout(legend={"entrywidth": 12 + round(5.9 * max(map(cells, names)))})


def ripple(
    change: Float[np.ndarray, "layer seq"], reach: Sequence[int], model: str = "", dtype: str = "", start: int = 0
) -> go.Figure:
    """How much every position of every layer changed after one token was replaced: white where nothing changed at all.

    `change` is 0 or more; its powers of ten are coloured. `start` is the replaced token's position, and `reach[layer]` says
    how many positions further a change can be seen after that layer: the black stairs. Layer 0 is at the
    bottom. Raises `FigureError` if nothing changed. Source: Mistral 7B (arXiv 2310.06825, Figure 1).
    """
    change = np.asarray(change, dtype=float)
    if not (change > 0).any():
        raise FigureError("Nothing changed anywhere: there is nothing to draw.")
    power = np.log10(change, out=np.full_like(change, np.nan), where=change > 0)
    low, high = int(np.floor(np.nanmin(power))), int(np.ceil(np.nanmax(power)))
    fig = go.Figure()
    fig.add_heatmap(
        z=power,
        zmin=low,
        zmax=high,
        hoverongaps=False,
        colorscale=[(at / (len(MORE) - 1), colour) for at, colour in enumerate(MORE)],
        hovertemplate="layer %{y}, position %{x}<br>changed by 10 to the power %{z:.1f} of itself<extra></extra>",
        colorbar={
            "tickvals": list(range(low, high + 1)), "ticktext": [_power(n) for n in range(low, high + 1)], "thickness": 12,
            "outlinewidth": 0, "tickfont_size": 11, "x": 1, "xpad": 12,
        },
    )  # fmt: skip
    edges = [start + far + 0.5 for far in reach]
    fig.add_scatter(
        x=[edge for edge in edges for _ in (0, 1)],
        y=[layer + side for layer in range(len(edges)) for side in (-0.5, 0.5)],
        mode="lines", line={"color": INK, "width": 2}, name="as far as the window lets it", showlegend=True,
        hoverinfo="skip",
    )  # fmt: skip
    quiet = {"ticks": "", "showgrid": False, "zeroline": False, "fixedrange": True}
    fig.update_xaxes(title="position", range=[start - 0.5, change.shape[1] - 0.5], **quiet)
    fig.update_yaxes(title="after layer", dtick=1, range=[-0.5, len(change) - 0.5], **quiet)
    return framed(
        fig,
        f"How far one replaced token reaches: {maker(model, dtype)}",
        "Change of the residual stream, as a share of its length. White: exactly nothing.",
        plot=30 * len(change),
        left=62,
        right=96,
        below=48,
    ).update_layout(legend={"entrywidth": 220})


def attention_by_distance(
    shares: Float[np.ndarray, "layer bin"], bins: Sequence[str], model: str = "", dtype: str = ""
) -> go.Figure:
    """How far back each layer looks: its share of attention by distance from the query.

    Every row of `shares` sums to 1; `bins` names the distances. Raises `FigureError` if a row does not.
    """
    shares = np.asarray(shares, dtype=float)
    if shares.ndim != 2 or not np.allclose(shares.sum(-1), 1, atol=1e-2):
        raise FigureError("The shares of every layer must sum to 1 over the distances.")
    heat = heat_panels(
        shares[None],
        [""],
        [f"layer {layer}" for layer in range(len(shares))],
        list(bins),
        row_title="",
        column_title="tokens back",
        hover="{row}, {column} tokens back<br>{value} of its attention",
    )
    return framed(
        heat.figure,
        f"How far back each layer looks: {maker(model, dtype)}",
        "Share of attention in %, averaged over heads and positions.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def growth(
    lengths: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, subtitle: str = "", unit: str = ""
) -> go.Figure:
    """What grows with the length of a text, one line for each name, both axes in powers of two or ten."""
    fig = go.Figure()
    for (name, values), colour in zip(curves.items(), (SOFT, ACCENT, "#E08214"), strict=False):
        fig.add_scatter(
            x=list(lengths), y=list(values), mode="lines+markers", name=plain(name), showlegend=True,
            line={"color": colour, "width": 3}, marker={"size": 7},
            hovertemplate=f"{plain(name)}<br>%{{x:,}} tokens: %{{y:,.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    fig.update_xaxes(
        title="tokens in the text", type="log", gridcolor=GRID, tickvals=list(lengths),
        ticktext=[f"{n:,}" for n in lengths], fixedrange=True,
    )  # fmt: skip
    fig.update_yaxes(
        title=unit, type="log", gridcolor=GRID, fixedrange=True, dtick=1, exponentformat="SI", rangemode="tozero"
    )
    longest = max(map(cells, curves))
    return framed(fig, plain(title), plain(subtitle), plot=300, left=78, right=40, below=52).update_layout(
        legend={"entrywidth": 30 + round(6.6 * longest)}
    )


def _places(names: Sequence[str] | None, n: int) -> list[str]:
    if names is None:
        return [str(place) for place in range(n)]
    if len(names) != n:
        raise FigureError(f"There are {n} places on an axis, but {len(names)} names.")
    return [plain(name) for name in names]


def _power(n: int) -> str:
    return "1" if n == 0 else f"10<sup>{n}</sup>"
