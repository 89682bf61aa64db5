"""Recorded decisions as pictures: a trace or an array goes in, a plotly figure comes out.

Every figure is returned, never shown, and says which model and dtype it is about. An expert has one colour
in all of them. The background is white on purpose, so that a figure reads alike in a light notebook, in a dark
one and on paper.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from mixtral_lab.config import LabError
from mixtral_lab.trace import Trace

# The hues of Okabe and Ito's set for colour-blind readers (jfly.uni-koeln.de/color, 2008), wine for its black,
# which a dark page would swallow. Moved apart until every pair also differs clearly for readers without one of
# the three kinds of cones (Machado, Oliveira and Fernandes 2009): tests/test_figures.py holds the distance.
EXPERT_COLOURS = ("#F99403", "#59DAFA", "#008E73", "#D3EC6D", "#1545B3", "#ED3112", "#A06AD4", "#7B2E56")

MOST_EXPERTS = 1024  # as many have a colour of their own

WIDTH = 900  # pixels
INK, SOFT, RULE = "#1b1f24", "#57606a", "#d0d7de"  # text, lesser text, lines
PROSE = "Helvetica Neue, Arial, Liberation Sans, DejaVu Sans, sans-serif"
MONO = "DejaVu Sans Mono, Menlo, Consolas, Liberation Mono, monospace"

MARGIN = 18  # pixels left and right of a text
CHARACTER, LINE = 7.85, 22  # pixels: the pitch of `MONO` at size 13, and a line of it
LEGEND_ENTRY = 98  # pixels across
COLUMNS = int((WIDTH - 2 * MARGIN) / CHARACTER)
FAINTEST = 0.25  # how much of its colour an expert keeps at weight 0


class FigureError(LabError, ValueError):
    """A figure was asked for something that its data does not have."""


class Decisions(NamedTuple):
    """A trace's routing as arrays, checked against its tokens."""

    logits: Float[np.ndarray, "layer seq expert"]
    experts: Int[np.ndarray, "layer seq choice"]
    weights: Float[np.ndarray, "layer seq choice"]

    @property
    def n_experts(self) -> int:
        return self.logits.shape[-1]


def decisions(trace: Trace) -> Decisions:
    """What every router decided, as numpy arrays of at least float32.

    Raises `TraceError` for a dense model's trace, `FigureError` if tokens and decisions differ in number.
    """
    logits, experts, weights = trace.routing
    if experts.shape[1] != len(trace) or not len(trace):
        raise FigureError(
            f"The trace has {len(trace)} tokens but decisions for {experts.shape[1]}: each token needs its own."
        )
    return Decisions(logits.float().numpy(), experts.numpy(), weights.float().numpy())


def expert_colour(expert: int) -> str:
    """The colour of an expert, as "#RRGGBB": of `EXPERT_COLOURS`, and for each further expert the colour farthest
    from all before it, so that an expert's colour never depends on how many there are.

    Raises `FigureError` outside 0 to `MOST_EXPERTS` - 1.
    """
    if not 0 <= expert < MOST_EXPERTS:
        raise FigureError(f"Expert {expert} has no colour: experts 0 to {MOST_EXPERTS - 1} have one.")
    if expert < len(EXPERT_COLOURS):
        return EXPERT_COLOURS[expert]
    size = 64
    while size <= expert:
        size *= 4
    return _palette(size)[expert]


def text_colour(background: str) -> str:
    """Black or white, whichever reads better on a colour; their contrast is at least 4.58, above the 4.5 of WCAG 2.2."""
    luminance = float(_linear([_rgb(background)])[0] @ [0.2126, 0.7152, 0.0722])
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def tokens_by_expert(trace: Trace, layers: Sequence[int] | None = None) -> go.Figure:
    """The text, once per layer, every token on the colour of its first-choice expert.

    `layers` are the first, the middle and the last if not given. Lines break where the text does. Source: Mixtral
    of Experts (arXiv 2401.04088, Figure 8). Raises `TraceError` for a dense model, `FigureError` for a layer that
    is not there.
    """
    decided = decisions(trace)
    shown = _layers(layers, len(decided.experts))
    text = _typeset(trace.tokens)
    lines = int(text.line.max()) + 1
    labels = [_label(trace, position) for position in range(len(trace))]
    gap, panel = 34, lines * LINE
    height = len(shown) * panel + (len(shown) - 1) * gap
    fig = make_subplots(len(shown), 1, vertical_spacing=gap / height if len(shown) > 1 else 0)
    for row, layer in enumerate(shown, start=1):
        first = decided.experts[layer, :, 0]
        for expert in np.unique(first).tolist():
            at = np.flatnonzero(first == expert)
            colour = expert_colour(expert)
            fig.add_bar(
                orientation="h",
                base=text.start[at],
                x=text.width[at],
                y=text.line[at],
                width=0.88,
                marker={"color": colour, "line_width": 0},
                text=[_plain(text.shown[position]) for position in at],
                hovertext=[labels[position] for position in at],
                customdata=_pairs(decided, layer)[at],
                hovertemplate=f"%{{hovertext}}<br>layer {layer}: {_in_words(decided)}<extra></extra>",
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                constraintext="none",
                insidetextfont={"family": MONO, "size": 13, "color": text_colour(colour)},
                name=f"expert {expert}",
                legendgroup=str(expert),
                showlegend=False,
                row=row,
                col=1,
            )
        if 0 < trace.n_prompt < len(trace):
            x, y = text.start[trace.n_prompt] - 0.2, text.line[trace.n_prompt]
            fig.add_shape(
                type="line",
                x0=x,
                x1=x,
                y0=y - 0.5,
                y1=y + 0.5,
                line={"color": INK, "width": 3},
                row=row,
                col=1,
            )
        axis = fig.get_subplot(row, 1).yaxis
        axis.update(range=[lines - 0.5, -0.5], visible=False, fixedrange=True)
        _panel_title(fig, f"layer {layer}", axis.domain[1])
    fig.update_xaxes(range=[-0.4, COLUMNS], visible=False, fixedrange=True)
    fig.update_layout(barmode="overlay", dragmode=False)
    return _frame(
        fig,
        f"Tokens by first-choice expert: {_maker(trace.model, trace.dtype)}",
        "Each token stands on the colour of the expert that weighs most."
        + (" ┃ marks where the model starts to write." if 0 < trace.n_prompt < len(trace) else ""),
        decided.n_experts,
        plot=height,
        toggles=True,
    )


def token_layer_map(trace: Trace) -> go.Figure:
    """Every decision at once: a column per token, a row per layer, layer 0 at the bottom.

    The tall upper part of a cell is the first choice, the low part under it the second; the fainter, the less weight.
    Pointing at a cell names all choices. Raises `TraceError` for a dense model.
    """
    decided = decisions(trace)
    layers, seq, choices = decided.experts.shape
    drawn = min(choices, 2)
    # Rows of unequal height, from the bottom: per layer the second choice, the first choice, a gap.
    parts = [(1, 0.30), (0, 0.62), (None, 0.08)] if drawn == 2 else [(0, 0.92), (None, 0.08)]
    z = np.full((layers * len(parts), seq), np.nan)
    about = np.zeros((layers * len(parts), seq, 2 * choices + 1), np.float32)
    edges = np.cumsum([0.0] + [share for _ in range(layers) for _, share in parts])
    for layer in range(layers):
        pairs = _pairs(decided, layer)
        for part, (choice, _) in enumerate(parts):
            row = layer * len(parts) + part
            about[row, :, 0], about[row, :, 1:] = layer, pairs
            if choice is not None:
                weight = np.clip(decided.weights[layer, :, choice], 0, 0.999)  # 1 would be the next expert's 0
                z[row] = decided.experts[layer, :, choice] + weight

    scale = []
    for expert in range(decided.n_experts):
        colour = expert_colour(expert)
        scale += [
            [expert / decided.n_experts, _blend(colour, FAINTEST)],
            [(expert + 1) / decided.n_experts, colour],
        ]

    names = [f"{position} {_short(token, 12)}" for position, token in enumerate(trace.tokens)]
    cell = min((WIDTH - 90) / seq, 60)
    layer_height = min(max(560 / layers, 15), 36)
    below = 36 + int(6.4 * max(_cells(name) for name in names))
    fig = go.Figure(
        go.Heatmap(
            x=[_plain(name) for name in names],
            y=edges,
            z=z,
            zmin=0,
            zmax=decided.n_experts,
            colorscale=scale,
            showscale=False,
            hoverongaps=False,
            xgap=1 if cell >= 5 else 0,
            customdata=about,
            hovertemplate=f"token %{{x}}<br>layer %{{customdata[0]:d}}: {_in_words(decided, offset=1)}<extra></extra>",
        )
    )
    if 0 < trace.n_prompt < seq:
        at = trace.n_prompt - 0.5
        fig.add_shape(
            type="line",
            x0=at,
            x1=at,
            y0=0,
            y1=1.0,
            yref="paper",
            line={"color": INK, "width": 2},
            layer="above",
        )
        fig.add_annotation(
            x=at, y=1, yref="paper", text="written by the model →", showarrow=False, xanchor="left", yanchor="bottom",
            font={"size": 12, "color": INK}, xshift=-3,
        )  # fmt: skip
        if at > 0.8 * seq:
            fig.layout.annotations[-1].update(text="written by the model ↘", xanchor="right", xshift=3)
    fig.update_xaxes(
        title="token",
        title_standoff=6,
        type="category",
        range=[-0.5, seq - 0.5],
        dtick=1 if seq <= 72 else None,  # past that plotly thins the labels, and brings them back on zooming in
        showgrid=False,
        tickangle=-90,
        tickfont={"family": MONO, "size": 10 if cell < 16 else 11},
    )
    labelled = range(0, layers, -(-layers // 16))
    fig.update_yaxes(
        title="layer",
        range=[0, layers],
        tickvals=[layer + 0.46 for layer in labelled],
        ticktext=[str(layer) for layer in labelled],
        showgrid=False,
        zeroline=False,
        fixedrange=True,
    )
    meaning = "Upper part of a cell: first choice; lower part: second." if drawn == 2 else "A cell: the expert chosen."
    natural = round(90 + cell * seq)
    width = max(natural, 620)  # below that the title would not fit
    return _frame(
        fig,
        f"Who reads each token, layer by layer: {_maker(trace.model, trace.dtype)}",
        f"{meaning} The fainter, the less weight.",
        decided.n_experts,
        plot=round(layers * layer_height),
        toggles=False,
        width=width,
        left=60,
        right=30 + width - natural,
        below=below,
    )


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
    if len(shares) != len(domains) or not len(domains):
        raise FigureError(f"There are shares of {len(shares)} domains but names of {len(domains)}: {list(domains)}.")
    if len(set(domains)) < len(domains):
        raise FigureError(f"Two domains have the same name, so their bars would stand on each other: {list(domains)}.")
    if not np.isfinite(shares).all() or (shares < 0).any() or not np.allclose(shares.sum(-1), 1, atol=1e-3):
        raise FigureError("Shares must be 0 or more and sum to 1 over the experts, for every domain and layer.")
    shown, n_experts = _layers(layers, shares.shape[1]), shares.shape[2]
    names = [_plain(domain) for domain in domains]
    longest = max(_cells(domain) for domain in domains)
    upright = longest * 7.3 < (WIDTH - 96) / len(domains)  # else names stand on end, below the last panel only
    panel, gap, below = 170, 46 if upright else 34, 52 if upright else 44 + round(7.3 * longest)
    height = len(shown) * panel + (len(shown) - 1) * gap
    fig = make_subplots(len(shown), 1, shared_xaxes=True, vertical_spacing=gap / height if len(shown) > 1 else 0)
    highest = float(shares[:, shown].max())
    for row, layer in enumerate(shown, start=1):
        for expert in range(n_experts):
            fig.add_bar(
                x=names,
                y=shares[:, layer, expert],
                marker={"color": expert_colour(expert), "line_width": 0},
                name=f"expert {expert}",
                legendgroup=str(expert),
                showlegend=False,
                hovertemplate=f"%{{x}}, layer {layer}<br>expert {expert}: %{{y:.1%}} of assignments<extra></extra>",
                row=row,
                col=1,
            )
        fig.add_shape(
            type="line", x0=0, x1=1, xref="x domain" if row == 1 else f"x{row} domain", y0=1 / n_experts,
            y1=1 / n_experts, line={"color": INK, "width": 1.5, "dash": "dash"}, row=row, col=1,
        )  # fmt: skip
        axis = fig.get_subplot(row, 1).yaxis
        axis.update(
            range=[0, highest * 1.06], tickformat=".0%", gridcolor="#eaeef2", zerolinecolor=RULE, nticks=5,
            fixedrange=True,
        )  # fmt: skip
        _panel_title(fig, f"layer {layer}", axis.domain[1])
    fig.update_yaxes(title="share of assignments", row=(len(shown) + 1) // 2, col=1)
    fig.update_xaxes(title="domain", title_standoff=6, row=len(shown), col=1)
    fig.update_xaxes(type="category", tickangle=0 if upright else -90, ticks="", fixedrange=True)
    if upright:
        fig.update_xaxes(showticklabels=True)
    fig.update_layout(bargap=0.18, bargroupgap=0.04)
    return _frame(
        fig,
        f"Which experts read what: {_maker(model, dtype)}",
        f"Share of assignments, first choices and others alike. Dashed: what each of {n_experts} experts has if all "
        "are used alike.",
        n_experts,
        plot=height,
        toggles=True,
        left=76,
        below=below,
    )


class _Typeset(NamedTuple):
    """Where each token of a running text stands, in characters and lines."""

    line: np.ndarray
    start: np.ndarray
    width: np.ndarray
    shown: list[str]


def _typeset(tokens: Sequence[str], columns: int = COLUMNS) -> _Typeset:
    """Set tokens in lines of `columns` characters, as running text; a token with a line break ends its line."""
    lines, starts, widths, shown = [], [], [], []
    line, at = 0, 0.0
    for token in tokens:
        text = _short(token.replace("␣", "\N{NO-BREAK SPACE}"), columns - 2)
        width = max(_cells(text), 1) + 0.5
        if at and at + width > columns:
            line, at = line + 1, 0.0
        lines.append(line)
        starts.append(at)
        widths.append(width - 0.12)  # a hair of white between tokens
        shown.append(text)
        at += width
        if "⏎" in token:
            line, at = line + 1, 0.0
    return _Typeset(np.array(lines), np.array(starts), np.array(widths), shown)


def _cells(text: str) -> int:
    """How many columns a text takes in a fixed-pitch font: East Asian signs two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)


def _short(text: str, cells: int) -> str:
    """A text cut to a number of columns, with a sign that it was cut."""
    if _cells(text) <= cells:
        return text
    while _cells(text) > cells - 1:
        text = text[:-1]
    return text + "…"


def _plain(text: str) -> str:
    """A text that plotly shows as it is: neither its HTML nor its TeX is read."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(sign, entity)
    return text


def _label(trace: Trace, position: int) -> str:
    written = "written" if position >= trace.n_prompt else "given"
    return f"token {position} “{_plain(_short(trace.tokens[position], 60))}”, {written}"


def _maker(model: str, dtype: str) -> str:
    return _plain(", ".join(part for part in (model, dtype) if part) or "model and dtype not given")


def _pairs(decided: Decisions, layer: int) -> np.ndarray:
    """`seq (choice 2)`: expert and weight of each choice, for hovering."""
    both = np.stack([decided.experts[layer].astype(np.float32), decided.weights[layer]], axis=-1)
    return both.reshape(len(both), -1)


def _in_words(decided: Decisions, offset: int = 0) -> str:
    """A hover template that says what a row of `_pairs` holds."""
    phrases = []
    for choice in range(decided.experts.shape[-1]):
        expert, weight = offset + 2 * choice, offset + 2 * choice + 1
        phrases.append(f"expert %{{customdata[{expert}]:d}} takes %{{customdata[{weight}]:.0%}}")
    return ",<br>".join(phrases) if len(phrases) > 3 else ", ".join(phrases)


def _layers(asked: Sequence[int] | None, n_layers: int) -> list[int]:
    if asked is None:
        return sorted({0, (n_layers - 1) // 2, n_layers - 1})
    if not len(asked):
        raise FigureError("No layer was asked for: give at least one, or None for the first, middle and last.")
    for layer in asked:
        if not 0 <= layer < n_layers:
            raise FigureError(f"There is no layer {layer}: this model's layers are 0 to {n_layers - 1}.")
    return [int(layer) for layer in asked]


def _frame(
    fig: go.Figure,
    title: str,
    subtitle: str,
    n_experts: int,
    plot: int,
    toggles: bool,
    width: int = WIDTH,
    left: int = MARGIN,
    right: int = MARGIN,
    below: int = 14,
) -> go.Figure:
    """Round off a figure whose plots are `plot` pixels high: sizes, fonts, title, and one legend entry per expert.

    With `toggles` a click on an entry hides what that expert has chosen.
    """
    per_row = int((width - 2 * MARGIN) / LEGEND_ENTRY)
    top = 60 + 21 * -(-n_experts // per_row) + 30
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
            "entrywidth": LEGEND_ENTRY - 45, "entrywidthmode": "pixels", "font_size": 12, "tracegroupgap": 0,
        },
        hoverlabel={"font_family": PROSE, "font_size": 13, "bgcolor": "white", "font_color": INK},
    )  # fmt: skip


def _panel_title(fig: go.Figure, text: str, y: float) -> None:
    fig.add_annotation(
        text=f"<b>{text}</b>", x=0, xref="paper", xanchor="left", y=y, yref="paper", yanchor="bottom", yshift=1,
        showarrow=False, font={"size": 13},
    )  # fmt: skip


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _blend(colour: str, share: float) -> str:
    """That share of a colour on white."""
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in _rgb(colour))


def _linear(rgb: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Bytes of sRGB to amounts of light between 0 and 1 (IEC 61966-2-1)."""
    share = np.asarray(rgb) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def _oklab(light: np.ndarray) -> np.ndarray:
    """Amounts of light to a space where distance is difference as seen. Source: Ottosson 2020, bottosson.github.io."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(light @ cones.T) @ opponents.T


@cache
def _palette(size: int) -> tuple[str, ...]:
    """`EXPERT_COLOURS`, then always the one of many colours, not too light or dark, that is farthest from those so far."""
    steps = np.arange(0, 256, 17)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = _oklab(_linear(rgb))
    middling = (seen[:, 0] > 0.35) & (seen[:, 0] < 0.92)
    rgb, seen = rgb[middling], seen[middling]
    colours = list(EXPERT_COLOURS)
    taken = _oklab(_linear([_rgb(colour) for colour in colours]))
    distance = np.linalg.norm(seen[:, None] - taken, axis=-1).min(1)
    while len(colours) < size:
        best = int(distance.argmax())
        colours.append("#{:02X}{:02X}{:02X}".format(*rgb[best].tolist()))
        distance = np.minimum(distance, np.linalg.norm(seen - seen[best], axis=-1))
    return tuple(colours)
