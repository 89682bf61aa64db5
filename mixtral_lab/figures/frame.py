"""What all figures share: sizes, fonts, title, legend of experts, and texts that plotly shows as they are."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import plotly.graph_objects as go

from mixtral_lab.figures.colours import FigureError, expert_colour

WIDTH = 900  # pixels
INK, SOFT, RULE = "#1b1f24", "#57606a", "#d0d7de"  # text, lesser text, lines
GRID = "#eaeef2"
ACCENT = "#542788"  # what is drawn besides experts: no expert has this purple
PROSE = "Helvetica Neue, Arial, Liberation Sans, DejaVu Sans, sans-serif"
MONO = "DejaVu Sans Mono, Menlo, Consolas, Liberation Mono, monospace"
MARGIN = 18  # pixels left and right of a text
LEGEND_ENTRY = 98  # pixels across


def framed(
    fig: go.Figure,
    title: str,
    subtitle: str,
    n_experts: int = 0,
    *,
    plot: int,
    toggles: bool = False,
    width: int = WIDTH,
    left: int = MARGIN,
    right: int = MARGIN,
    below: int = 14,
) -> go.Figure:
    """Round off a figure whose plots are `plot` pixels high: sizes, fonts, title, and a legend.

    `title` and `subtitle` are plotly's HTML (`plain` and `maker` make foreign words safe); `left`, `right` and `below`
    are margins in pixels. The legend has an entry for each of `n_experts` (with `toggles` a click on it hides what that
    expert has chosen); where that is 0, it has the figure's own traces with `showlegend=True`, in one row.
    """
    per_row = int((width - 2 * MARGIN) / LEGEND_ENTRY)
    rows = -(-n_experts // per_row) if n_experts else int(any(trace.showlegend for trace in fig.data))
    top = 60 + 21 * rows + 30
    height = top + plot + below
    for expert in range(n_experts):
        fig.add_scatter(
            x=[None], y=[None], mode="markers", name=f"expert {expert}", legendgroup=str(expert), hoverinfo="skip",
            marker={"color": expert_colour(expert), "size": 13, "symbol": "square"},
        )  # fmt: skip
    fig.update_xaxes(title_font_size=13, linecolor=RULE)
    fig.update_yaxes(title_font_size=13, linecolor=RULE)
    return fig.update_layout(
        template="none",
        width=width,
        height=height,
        margin={"l": left, "r": right, "t": top, "b": below},
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": PROSE, "size": 13, "color": INK},
        title={
            "text": f"<b>{title}</b>", "font_size": 17, "x": 0, "xref": "container", "pad": {"l": MARGIN},
            "y": 1 - 26 / height, "yref": "container", "yanchor": "bottom",
            "subtitle": {"text": subtitle, "font": {"size": 13, "color": SOFT}},
        },
        legend={
            "orientation": "h", "x": (MARGIN - 8) / width, "xref": "container", "y": 1 - 56 / height,
            "yref": "container", "yanchor": "top", "itemclick": "toggle" if toggles else False,
            "itemdoubleclick": "toggleothers" if toggles else False, "groupclick": "togglegroup",
            "entrywidth": LEGEND_ENTRY - 45 if n_experts else None, "entrywidthmode": "pixels", "font_size": 12,
            "tracegroupgap": 0,
        },
        hoverlabel={"font_family": PROSE, "font_size": 13, "bgcolor": "white", "font_color": INK},
    )  # fmt: skip


def expert_name(expert: int) -> str:
    """An expert's number after a square of its colour, for the ticks of an axis."""
    return f'<span style="color:{expert_colour(expert)}">■</span> {expert}'


def panel_title(fig: go.Figure, text: str, y: float, x: float = 0.0) -> None:
    """Write a plot's title above its upper left corner; `x` and `y` are shares of the figure's plotting area."""
    fig.add_annotation(
        text=f"<b>{text}</b>", x=x, xref="paper", xanchor="left", y=y, yref="paper", yanchor="bottom", yshift=1,
        showarrow=False, font={"size": 13},
    )  # fmt: skip


def distinct(names: Sequence[str], n: int, what: str) -> list[str]:
    """The names as plotly shows them. Raises `FigureError` unless there are `n` of them, one at least, all different."""
    if len(names) != n or not len(names):
        raise FigureError(f"There are values of {n} {what}s but names of {len(names)}: {list(names)}.")
    if len(set(names)) < len(names):
        raise FigureError(f"Two {what}s have the same name, so they would stand on each other: {list(names)}.")
    return [plain(name) for name in names]


def layers_shown(asked: Sequence[int] | None, n_layers: int) -> list[int]:
    if asked is None:
        return sorted({0, (n_layers - 1) // 2, n_layers - 1})
    if not len(asked):
        raise FigureError("No layer was asked for: give at least one, or None for the first, middle and last.")
    for layer in asked:
        if not 0 <= layer < n_layers:
            raise FigureError(f"There is no layer {layer}: this model's layers are 0 to {n_layers - 1}.")
    return [int(layer) for layer in asked]


def maker(model: str, dtype: str) -> str:
    return plain(", ".join(part for part in (model, dtype) if part) or "model and dtype not given")


def cells(text: str) -> int:
    """How many columns a text takes in a fixed-pitch font: East Asian signs two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)


def short(text: str, most: int) -> str:
    """A text cut to `most` columns of a fixed-pitch font, with a sign that it was cut."""
    if cells(text) <= most:
        return text
    while cells(text) > most - 1:
        text = text[:-1]
    return text + "…"


def plain(text: str) -> str:
    """A text that plotly shows as it is: neither its HTML nor its TeX is read."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(sign, entity)
    return text
