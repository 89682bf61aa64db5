"""How tokenizers cut a text, and what a text costs in each: nothing here needs a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError, text_colour
from mixtral_lab.figures.frame import ACCENT, GRID, INK, MONO, WIDTH, distinct, framed, panel_title, plain
from mixtral_lab.figures.tokens import COLUMNS, LINE, typeset

CONTROL = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]")
TILES = ("#EDE9F4", "#D3CBE6")  # neighbours alternate, so that one sees where a token ends
BARS = ("#C9C1E0", "#8E7CBF", ACCENT)


def token_cuts(pieces: Mapping[str, Sequence[str]], control: Collection[str] = CONTROL) -> go.Figure:
    """One running text per name, every token on a tile of its own; those named in `control` are dark.

    `pieces` are what `Tokenizer.pieces` gives: `⟨E2 82⟩` for bytes that are no whole character.
    Raises `FigureError` for a text without tokens.
    """
    names = distinct(list(pieces), len(pieces), "text")
    if not all(len(row) for row in pieces.values()):
        raise FigureError("A text has no tokens: there is nothing to draw.")
    set_in_lines = [typeset(row) for row in pieces.values()]
    lines = [int(text.line.max()) + 1 for text in set_in_lines]
    gap = 30
    height = sum(lines) * LINE + (len(lines) - 1) * gap
    fig = make_subplots(
        len(lines), 1, vertical_spacing=gap / height if len(lines) > 1 else 0, row_heights=[float(n) for n in lines]
    )
    for row, (name, tokens, text) in enumerate(zip(names, pieces.values(), set_in_lines, strict=True), start=1):
        colours = [INK if token in control else TILES[i % 2] for i, token in enumerate(tokens)]
        hover = [f"token {i} “{plain(token)}”" for i, token in enumerate(tokens)]
        fig.add_bar(
            orientation="h", base=text.start, x=text.width, y=text.line, width=0.88,
            marker={"color": colours, "line_width": 0}, text=[plain(shown) for shown in text.shown],
            textposition="inside", insidetextanchor="middle", textangle=0, constraintext="none",
            insidetextfont={"family": MONO, "size": 13, "color": [text_colour(colour) for colour in colours]},
            hovertext=hover, hovertemplate="%{hovertext}<extra></extra>", showlegend=False, row=row, col=1,
        )  # fmt: skip
        axis = fig.get_subplot(row, 1).yaxis
        axis.update(range=[lines[row - 1] - 0.5, -0.5], visible=False, fixedrange=True)
        panel_title(fig, f"{name}: {len(tokens)} tokens", axis.domain[1])
    fig.update_xaxes(range=[-0.4, COLUMNS], visible=False, fixedrange=True)
    fig.update_layout(barmode="overlay", dragmode=False)
    return framed(
        fig,
        "The same text, cut into tokens",
        "A tile is a token. Dark: a control token. ⟨E2⟩: a byte that is not a whole character.",
        plot=height,
    )


def token_costs(counts: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """How many tokens each text costs: `counts` is `{tokenizer: {text: tokens}}`, one bar for each.

    Raises `FigureError` unless every tokenizer has the same texts.
    """
    names = distinct(list(counts), len(counts), "tokenizer")
    texts = list(next(iter(counts.values())))
    if any(list(row) != texts for row in counts.values()):
        raise FigureError("The tokenizers have counts of different texts.")
    fig = go.Figure()
    colours = [BARS[round(i)] for i in np.linspace(0, len(BARS) - 1, len(names))] if len(names) > 1 else [ACCENT]
    for name, row, colour in zip(names, counts.values(), colours, strict=True):
        fig.add_bar(
            orientation="h", y=[plain(text) for text in texts], x=list(row.values()), name=name, marker_color=colour,
            text=list(row.values()), textposition="outside", textfont_size=11, cliponaxis=False, showlegend=True,
            hovertemplate=f"%{{y}}, {name}: %{{x}} tokens<extra></extra>",
        )  # fmt: skip
    fig.update_yaxes(autorange="reversed", ticks="", fixedrange=True, showgrid=False)
    fig.update_xaxes(title="tokens", gridcolor=GRID, showgrid=True, zeroline=False, fixedrange=True, rangemode="tozero")
    fig.update_layout(barmode="group", bargap=0.25, bargroupgap=0.05, dragmode=False)
    left = 30 + round(7.5 * max(map(len, texts)))
    return framed(
        fig,
        "What the same sentence costs",
        "Tokens of one sentence in each language; every token is one step of the model.",
        plot=(16 * len(names) + 12) * len(texts),
        width=WIDTH,
        left=left,
        right=50,
        below=46,
    )
