"""Tables of shares as maps of colour: several panels that share one scale and one set of rows and columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError, rgb
from mixtral_lab.figures.frame import WIDTH, cells, expert_name, panel_title

# ColorBrewer's PuOr (Brewer, Harrower and Penn State, colorbrewer2.org), safe for colour-blind readers, with white
# in the middle; its upper half alone where nothing is less than the least.
LESS, MORE = (
    ("#7F3B08", "#B35806", "#E08214", "#FDB863", "#FEE0B6"),
    ("#D8DAEB", "#B2ABD2", "#8073AC", "#542788", "#2D004B"),
)


class Heat(NamedTuple):
    """A figure of panels, and what `framed` needs to know of it, in pixels."""

    figure: go.Figure
    height: int
    left: int
    right: int
    below: int


def heat_panels(
    values: Float[np.ndarray, "panel row column"],
    titles: Sequence[str],
    rows: Sequence[str] | int,
    columns: Sequence[str] | int,
    *,
    row_title: str,
    column_title: str,
    hover: str,
    middle: float | None = None,
    percent: bool = True,
    written: Float[np.ndarray, "panel row column"] | None = None,
    notes: Sequence | np.ndarray | None = None,
) -> Heat:
    """One map of colour per panel, side by side, all on one scale; not-a-number stays empty.

    `rows` and `columns` are names that plotly shows as they are, or a number of experts. With a `middle` the colours
    part there: white is the middle, orange less, purple more; without one, white is 0. Values, or those of `written`, stand
    in the cells where these are wide enough, as whole percents or, if not `percent`, with two decimals. `hover` is
    written with {row}, {column}, {panel}, {value} and {note}; `notes`, shaped like `values`, holds the last.
    """
    n_panels, n_rows, n_columns = values.shape
    if not n_panels or not np.isfinite(values).any():
        raise FigureError("There is nothing to draw: no panel has a value.")
    down_names, across_names = _names(rows), _names(columns)
    left = 34 + round(6.9 * max(map(_width, down_names)))
    longest = max(map(_width, across_names))
    below = 46 if longest <= 4 else 46 + round(6.6 * longest)
    gap, bar = 18, 92
    text = values if written is None else written
    numbers = [[[_short(value, percent) for value in line] for line in panel] for panel in text]
    digit = 7  # pixels
    room = 20 if percent else digit * max(len(number) for panel in numbers for line in panel for number in line)
    least = 9 if isinstance(columns, int) else 14
    if written is not None:  # what is written is there to be read
        least = max(least, room)
    across = min(n_panels, max(1, (WIDTH - left - bar) // max(165, least * n_columns)))
    cell = min((WIDTH - left - bar - (across - 1) * gap) / across / n_columns, 46)
    tall = min(cell, 30) if isinstance(rows, int) and isinstance(columns, int) else 21
    down = -(-n_panels // across)
    between = below + 24
    width, height = across * cell * n_columns + (across - 1) * gap, down * tall * n_rows + (down - 1) * between
    fig = make_subplots(
        down,
        across,
        horizontal_spacing=gap / width if across > 1 else 0,
        vertical_spacing=between / height if down > 1 else 0,
        shared_yaxes=True,
    )
    in_words = cell >= room and tall >= 15
    for panel, title in enumerate(titles):
        row, column = panel // across + 1, panel % across + 1
        number = "%{z:.1%}" if percent else "%{z:.3f}"
        words = hover.format(row="%{y}", column="%{x}", panel=title, value=number, note="%{customdata}")
        fig.add_heatmap(
            x=list(range(n_columns)) if isinstance(columns, int) else across_names,
            y=list(range(n_rows)) if isinstance(rows, int) else down_names,
            z=values[panel],
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            customdata=None if notes is None else notes[panel],
            hovertemplate=words + "<extra></extra>",
            text=numbers[panel] if in_words else None,
            texttemplate="%{text}" if in_words else None,
            textfont={"size": 11},
            row=row,
            col=column,
        )
        axes = fig.get_subplot(row, column)
        panel_title(fig, title, axes.yaxis.domain[1], axes.xaxis.domain[0])
        if panel + across >= n_panels:
            axes.xaxis.update(title=column_title, title_standoff=6)
    fig.update_xaxes(**_ticks(columns, across_names, every=max(1, -(-27 // int(cell)))))
    fig.update_yaxes(autorange="reversed", **_ticks(rows, down_names, every=max(1, -(-16 // int(tall)))))
    fig.update_xaxes(tickangle=0 if longest <= 4 else -90)
    fig.update_yaxes(title=row_title, title_standoff=8, row=(down + 1) // 2, col=1)
    scale = max(60, min(160, height))  # pixels
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if middle is None:
        low = 0.0
    fig.update_layout(
        coloraxis={
            "colorscale": _scale(low, middle, high),
            "cmin": low,
            "cmax": high if high > low else low + 1,
            "colorbar": {
                "thickness": 12, "len": scale, "lenmode": "pixels", "y": 1, "yanchor": "top",
                "x": 1, "xpad": 14, "outlinewidth": 0, "tickformat": ".0%" if percent else ".2f",
                "nticks": min(6, round(scale / 20)), "tickfont_size": 11,
            },
        }
    )  # fmt: skip
    return Heat(fig, round(height), left, round(WIDTH - left - width), below)


def _names(given: Sequence[str] | int) -> list[str]:
    return [expert_name(expert) for expert in range(given)] if isinstance(given, int) else list(given)


def _width(name: str) -> int:
    """Columns of a name as shown: an expert's colour is no text."""
    return cells(re.sub("<[^>]*>", "", name))


def _ticks(given: Sequence[str] | int, names: Sequence[str], every: int) -> dict:
    """Settings of an axis: all names, or the number of every so many experts where all would not fit."""
    quiet = {"ticks": "", "showgrid": False, "zeroline": False, "fixedrange": True, "tickfont_size": 12}
    if not isinstance(given, int):
        return {"type": "category", "dtick": 1, **quiet}
    shown = range(0, given, every)
    return {"tickvals": list(shown), "ticktext": [names[expert] for expert in shown], **quiet}


def _short(value: float, percent: bool) -> str:
    if not np.isfinite(value):
        return ""
    return f"{100 * value:.0f}" if percent else f"{value:.2f}"


def _scale(low: float, middle: float | None, high: float) -> list[tuple[float, str]]:
    """Colours from `low` to `high`. With a middle, equal distances from it have equally strong colours."""
    if middle is None:
        return [(at / len(MORE), colour) for at, colour in enumerate(("#FFFFFF", *MORE))]
    reach = max(high - middle, middle - low) or 1.0
    stops = np.linspace(-1, 1, 2 * len(MORE) + 1)  # of all colours
    parts = np.array([rgb(colour) for colour in (*LESS, "#FFFFFF", *MORE)]).T
    wanted = np.unique([-min(1, (middle - low) / reach), *stops, (high - middle) / reach])
    wanted = wanted[(wanted >= (low - middle) / reach) & (wanted <= (high - middle) / reach)]
    red, green, blue = (np.interp(wanted, stops, part).round().astype(int) for part in parts)
    places = (wanted - wanted[0]) / (wanted[-1] - wanted[0] or 1)
    return [(float(at), f"rgb({r},{g},{b})") for at, r, g, b in zip(places, red, green, blue, strict=True)]
