"""Who looks at whom: rotations by position, attention patterns head by head, and how far each head looks back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import INK, MONO, WIDTH, cells, framed, maker, panel_title, plain, short
from mixtral_lab.figures.heat import LESS, MORE, heat_panels

LIGHT_TO_DARK = [[at / len(MORE), colour] for at, colour in enumerate(("#FFFFFF", *MORE))]
BOTH_WAYS = [[at / 10, colour] for at, colour in enumerate((*LESS, "#FFFFFF", *MORE))]


def rotary_angles(cosines: Float[np.ndarray, "pair seq"], theta: float) -> go.Figure:
    """The cosine of the angle that each pair of numbers is turned by at each position: a row per pair."""
    pairs, seq = cosines.shape
    fig = go.Figure(
        go.Heatmap(
            z=cosines, zmin=-1, zmax=1, colorscale=BOTH_WAYS, xgap=0, ygap=1,
            hovertemplate="pair %{y}, position %{x}: cosine %{z:.2f}<extra></extra>",
            colorbar={"thickness": 12, "outlinewidth": 0, "tickvals": [-1, 0, 1], "title": {"text": "cosine", "font_size": 13}},
        )
    )  # fmt: skip
    fig.update_xaxes(title="position", showgrid=False, zeroline=False, fixedrange=True, range=[-0.5, seq - 0.5])
    fig.update_yaxes(title="pair", autorange="reversed", showgrid=False, zeroline=False, fixedrange=True, dtick=5)
    return framed(
        fig,
        f"How far each pair is turned, theta {theta:,.0f}",
        "Purple: as at position 0; orange: half a turn away. Upper pairs turn quickly, lower ones slowly.",
        plot=max(14 * pairs, 120),
        left=60,
        right=20,
        below=46,
    )


def attention_patterns(
    pattern: Float[np.ndarray, "kv group query key"],
    tokens: Sequence[str],
    layer: int,
    heads: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """How each token shares its attention among those before it: one map per head, rows look at columns.

    A column of maps is one kv head, and the maps in it are the query heads of its group. `heads` picks some by number,
    counted `(kv group)`; few of them are drawn large, with their tokens. Colours have one scale, up to the largest
    share of any key but the first. Raises `FigureError` for a head that is not there, or a pattern of
    another length than the tokens.
    """
    if pattern.shape[2:] != (len(tokens), len(tokens)) or not len(tokens):
        raise FigureError(
            f"The pattern has the shape {pattern.shape}, but it must end with {len(tokens)} tokens twice."
        )
    n_kv, group = pattern.shape[:2]
    every = list(range(n_kv * group))
    chosen = every if heads is None else list(heads)
    if not chosen or any(head not in every for head in chosen):
        raise FigureError(
            f"Heads {chosen} were asked for, but there are 0 to {n_kv * group - 1}, of which at least one."
        )
    down, across = (group, n_kv) if heads is None else (1, len(chosen))
    if heads is None:  # panels run along rows: the first query head of every group, then the second
        chosen = [kv * group + member for member in range(group) for kv in range(n_kv)]
    named = across <= 2
    left = 20 + (round(7.2 * min(max(map(cells, tokens)), 10)) if named else 0)
    below = left if named else 20
    gap = 34 if not named else 34 + left
    side = (WIDTH - left - 90 - (across - 1) * gap) / across
    side = min(side, 22 * len(tokens)) if named else side
    width, height = across * side + (across - 1) * gap, down * side + (down - 1) * gap
    fig = make_subplots(
        down,
        across,
        horizontal_spacing=gap / width if across > 1 else 0,
        vertical_spacing=gap / height if down > 1 else 0,
    )
    seen = np.tril(np.ones(pattern.shape[2:], bool))
    words = [f"{position} “{plain(short(token, 20))}”" for position, token in enumerate(tokens)]
    hover = [[f"token {query} looks at {key}" for key in words] for query in words]
    for panel, head in enumerate(chosen):
        row, column = panel // across + 1, panel % across + 1
        shares = np.where(seen, pattern[head // group, head % group], np.nan)
        fig.add_heatmap(
            z=shares, coloraxis="coloraxis", hoverongaps=False, text=hover,
            hovertemplate=f"head {head}, %{{text}}: %{{z:.1%}}<extra></extra>", row=row, col=column,
        )  # fmt: skip
        axes = fig.get_subplot(row, column)
        panel_title(fig, f"head {head} (kv {head // group})", axes.yaxis.domain[1], axes.xaxis.domain[0])
    ticks = {
        "tickvals": list(range(len(tokens))), "ticktext": [plain(short(token, 10)) for token in tokens],
        "tickfont": {"family": MONO, "size": 11, "color": INK},
    }  # fmt: skip
    quiet = {"showgrid": False, "zeroline": False, "fixedrange": True, "ticks": ""}
    fig.update_xaxes(**quiet, **(ticks if named else {"showticklabels": False}), tickangle=-90)
    fig.update_yaxes(**quiet, **(ticks if named else {"showticklabels": False}), autorange="reversed")
    later = pattern[:, :, :, 1:] if len(tokens) > 1 else pattern
    high = float(max(later[head // group, head % group].max() for head in chosen)) or 1.0
    fig.update_layout(
        coloraxis={
            "colorscale": LIGHT_TO_DARK, "cmin": 0, "cmax": high,
            "colorbar": {"thickness": 12, "outlinewidth": 0, "tickformat": ".0%", "len": 160, "lenmode": "pixels",
                         "y": 1, "yanchor": "top", "nticks": 5},
        }
    )  # fmt: skip
    return framed(
        fig,
        f"Attention in layer {layer}: {maker(model, dtype)}",
        "A row is a token that looks; the columns are what it looks at. The darker, the larger its share.",
        plot=round(height),
        width=max(round(left + width + 90), 620),
        left=left,
        right=90 + max(0, 620 - round(left + width + 90)),
        below=below,
    )


def attention_reach(
    distance: Float[np.ndarray, "layer head"], group: int = 1, model: str = "", dtype: str = ""
) -> go.Figure:
    """How many tokens back each head looks on average: a row per layer, layer 0 at the bottom, a column per head."""
    layers, heads = distance.shape
    if heads % group:
        raise FigureError(f"{heads} heads do not make groups of {group}.")
    rows = distance[::-1]
    heat = heat_panels(
        rows[None],
        ["tokens back, on average"],
        [str(layer) for layer in reversed(range(layers))],
        [f"{head}" for head in range(heads)],
        row_title="layer",
        column_title="query head" + (f" (each {group} neighbours share a kv head)" if group > 1 else ""),
        hover="layer {row}, head {column}: {value} tokens back<extra></extra>",
        percent=False,
        written=rows[None],
    )
    heat.figure.update_traces(text=[[f"{value:.0f}" for value in row] for row in rows], texttemplate="%{text}")
    heat.figure.update_layout(coloraxis_colorbar_tickformat=".0f")
    return framed(
        heat.figure,
        f"How far each head looks back: {maker(model, dtype)}",
        "The distance from a token to what it looks at, weighed by its attention.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )
