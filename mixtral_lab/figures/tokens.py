"""A text and who reads it: every token on the colour of its expert, or all decisions of all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from mixtral_lab.analysis.routing import choices
from mixtral_lab.figures.colours import FAINTEST, FigureError, blend, expert_colour, text_colour
from mixtral_lab.figures.frame import (
    INK,
    MARGIN,
    MONO,
    WIDTH,
    cells,
    framed,
    layers_shown,
    maker,
    panel_title,
    plain,
    short,
)
from mixtral_lab.trace import Trace

CHARACTER, LINE = 7.85, 22  # pixels: the pitch of `MONO` at size 13, and a line of it
COLUMNS = int((WIDTH - 2 * MARGIN) / CHARACTER)


class Decisions(NamedTuple):
    """A trace's routing as arrays, checked against its tokens; what another engine did not record is not-a-number."""

    logits: Float[np.ndarray, "layer seq expert"]
    experts: Int[np.ndarray, "layer seq choice"]
    weights: Float[np.ndarray, "layer seq choice"]

    @property
    def n_experts(self) -> int:
        return self.logits.shape[-1]


def decisions(trace: Trace) -> Decisions:
    """What every router decided, as numpy arrays of at least float32.

    Raises `TraceError` if the chosen experts are not known, `FigureError` if tokens and decisions differ in number.
    """
    if trace.experts.shape[1] != len(trace) or not len(trace):
        raise FigureError(
            f"The trace has {len(trace)} tokens but decisions for {trace.experts.shape[1]}: each token needs its own."
        )
    experts, n_experts = choices(trace)
    logits, weights = trace.get("layers.*.router.logits"), trace.get("layers.*.router.weights")
    return Decisions(
        np.full((*experts.shape[:2], n_experts), np.nan, np.float32)
        if logits is None
        else logits.float().cpu().numpy(),
        experts.astype(np.int64),
        np.full(experts.shape, np.nan, np.float32) if weights is None else weights.float().cpu().numpy(),
    )


def tokens_by_expert(trace: Trace, layers: Sequence[int] | None = None) -> go.Figure:
    """The text, once per layer, every token on the colour of its first-choice expert.

    `layers` are the first, the middle and the last if not given. Lines break where the text does. Source: Mixtral
    of Experts (arXiv 2401.04088, Figure 8). Raises `TraceError` for a dense model, `FigureError` for a layer that
    is not there.
    """
    decided = decisions(trace)
    shown = layers_shown(layers, len(decided.experts))
    text = typeset(trace.tokens)
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
                text=[plain(text.shown[position]) for position in at],
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
        panel_title(fig, f"layer {layer}", axis.domain[1])
    fig.update_xaxes(range=[-0.4, COLUMNS], visible=False, fixedrange=True)
    fig.update_layout(barmode="overlay", dragmode=False)
    return framed(
        fig,
        f"Tokens by first-choice expert: {maker(trace.model, trace.dtype)}",
        "Each token stands on the colour of its first choice: the expert that weighs most, unless routing was forced."
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
                weight = np.nan_to_num(decided.weights[layer, :, choice], nan=1.0)
                weight = np.clip(weight, 0, 0.999)  # 1 would be the next expert's 0
                z[row] = decided.experts[layer, :, choice] + weight

    scale = []
    for expert in range(decided.n_experts):
        colour = expert_colour(expert)
        scale += [
            [expert / decided.n_experts, blend(colour, FAINTEST)],
            [(expert + 1) / decided.n_experts, colour],
        ]

    names = [f"{position} {short(token, 12)}" for position, token in enumerate(trace.tokens)]
    cell = min((WIDTH - 90) / seq, 60)
    layer_height = min(max(560 / layers, 15), 36)
    below = 36 + int(6.4 * max(cells(name) for name in names))
    fig = go.Figure(
        go.Heatmap(
            x=[plain(name) for name in names],
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
    return framed(
        fig,
        f"Who reads each token, layer by layer: {maker(trace.model, trace.dtype)}",
        f"{meaning} The fainter, the less weight.",
        decided.n_experts,
        plot=round(layers * layer_height),
        toggles=False,
        width=width,
        left=60,
        right=30 + width - natural,
        below=below,
    )


class Typeset(NamedTuple):
    """Where each token of a running text stands, in characters and lines."""

    line: np.ndarray
    start: np.ndarray
    width: np.ndarray
    shown: list[str]


def typeset(tokens: Sequence[str], columns: int = COLUMNS) -> Typeset:
    """Set tokens in lines of `columns` characters, as running text; a token with a line break ends its line."""
    lines, starts, widths, shown = [], [], [], []
    line, at = 0, 0.0
    for token in tokens:
        text = short(token.replace("␣", "\N{NO-BREAK SPACE}"), columns - 2)
        width = max(cells(text), 1) + 0.5
        if at and at + width > columns:
            line, at = line + 1, 0.0
        lines.append(line)
        starts.append(at)
        widths.append(width - 0.12)  # a hair of white between tokens
        shown.append(text)
        at += width
        if "⏎" in token:
            line, at = line + 1, 0.0
    return Typeset(np.array(lines), np.array(starts), np.array(widths), shown)


def _label(trace: Trace, position: int) -> str:
    written = "written" if position >= trace.n_prompt else "given"
    return f"token {position} “{plain(short(trace.tokens[position], 60))}”, {written}"


def _pairs(decided: Decisions, layer: int) -> np.ndarray:
    """`seq (choice 2)`: expert and weight of each choice, for hovering."""
    both = np.stack([decided.experts[layer].astype(np.float32), decided.weights[layer]], axis=-1)
    return both.reshape(len(both), -1)


def _in_words(decided: Decisions, offset: int = 0) -> str:
    """A hover template that says what a row of `_pairs` holds."""
    phrases = []
    for choice in range(decided.experts.shape[-1]):
        expert, weight = offset + 2 * choice, offset + 2 * choice + 1
        takes = "" if np.isnan(decided.weights).any() else f" takes %{{customdata[{weight}]:.0%}}"
        phrases.append(f"expert %{{customdata[{expert}]:d}}{takes}")
    return ",<br>".join(phrases) if len(phrases) > 3 else ", ".join(phrases)
