"""Which words stand in the residual stream, and who wrote them there, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int, Shaped

from mixtral_lab.figures.colours import FigureError, blend, expert_colour, text_colour
from mixtral_lab.figures.frame import ACCENT, GRID, INK, MONO, RULE, SOFT, WIDTH, cells, framed, maker, plain, short

if TYPE_CHECKING:
    import pandas as pd

CELL = 62  # pixels: the narrowest cell with a word in it


def logit_lens(
    words: Shaped[np.ndarray, "depth seq rank"],
    probabilities: Float[np.ndarray, "depth seq rank"],
    tokens: Sequence[str],
    positions: Sequence[int] | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """What the stream would say next at every depth: the likeliest word in each cell, the darker the likelier.

    `words` are the readable tokens of `analysis.lens.logit_lens`'s `ids`, `probabilities` its own, and `tokens` the
    text's. Depth 0, the embedding, is at the bottom. `positions` are the last dozen if not given. Source:
    nostalgebraist 2020 (the logit lens). Raises `FigureError` for tokens or positions that the arrays do not have.
    """
    if words.shape[1] != len(tokens):
        raise FigureError(f"There are words for {words.shape[1]} positions, but {len(tokens)} tokens.")
    most = (WIDTH - 110) // CELL
    shown = list(range(len(tokens)))[-most:] if positions is None else list(positions)
    for position in shown:
        if not 0 <= position < len(tokens):
            raise FigureError(f"There is no position {position}: the text has {len(tokens)} tokens.")
    depths, width = len(words), min(110, (WIDTH - 110) // max(1, len(shown)))
    names = ["embedding", *(f"layer {layer}" for layer in range(depths - 1))]
    likeliest = probabilities[:, shown, 0]
    fig = go.Figure(
        go.Heatmap(
            x=list(range(len(shown))),
            y=names,
            z=likeliest,
            zmin=0,
            zmax=1,
            colorscale=[[0, "#ffffff"], [1, ACCENT]],
            xgap=1,
            ygap=1,
            text=[[plain(short(str(words[d, p, 0]), width // 8)) for p in shown] for d in range(depths)],
            texttemplate="%{text}",
            textfont={"family": MONO, "size": 11},
            customdata=[[_ranked(words[d, p], probabilities[d, p]) for p in shown] for d in range(depths)],
            hovertemplate="%{y}, after %{x}<br>%{customdata}<extra></extra>",
            colorbar={
                "thickness": 12, "len": 160, "lenmode": "pixels", "y": 1, "yanchor": "top", "outlinewidth": 0,
                "tickformat": ".0%", "nticks": 3, "tickfont_size": 11,
            },
        )
    )  # fmt: skip
    labels = [f"{p} {plain(short(tokens[p], 12))}" for p in shown]
    fig.update_xaxes(
        tickvals=list(range(len(shown))), ticktext=labels, tickangle=-90, tickfont={"family": MONO, "size": 11},
        title="after the token", title_standoff=6, showgrid=False, zeroline=False, fixedrange=True,
    )  # fmt: skip
    fig.update_yaxes(showgrid=False, zeroline=False, fixedrange=True, tickfont_size=12)
    plot = 26 * depths
    right = max(WIDTH - 80 - width * len(shown), 70)
    return framed(
        fig,
        f"What each layer would say next: {maker(model, dtype)}",
        "The likeliest next token if the model ended there; the darker, the likelier. Top row: what the model does say.",
        plot=plot,
        left=80,
        right=right,
        below=44 + int(7 * max(cells(label) for label in labels)),
    )


def attribution(
    frame: pd.DataFrame, token: str, before: str = "", against: str = "", model: str = "", dtype: str = ""
) -> go.Figure:
    """Who said this word: a bar for the embedding, and for each layer's attention and chosen experts.

    `frame` is `analysis.lens.Attribution.frame`'s; `token` is the word, `before` the text it follows, `against` the
    other word, if the score is a difference of two. Heads are taken together, hovering names each. The bars sum to the
    score in the subtitle. Raises `FigureError` for a table without these parts.
    """
    if not {"part", "layer", "head", "expert", "choice", "logit"} <= set(frame.columns) or frame.empty:
        raise FigureError("The table lacks parts or logits: analysis.lens.Attribution.frame makes one.")
    layers = sorted(frame.layer.dropna().unique().tolist())
    experts = frame[frame.part.isin(["expert", "feed-forward"])]
    slots = 1 + int(experts.choice.max() + 1 if experts.choice.notna().any() else 1)
    thick = 13 if len(layers) <= 16 else 8
    gap = thick * 0.7
    row = slots * thick + gap  # pixels for one layer
    fig = go.Figure()

    def bars(part: pd.DataFrame, slot: int, colour: str, hover: list[str], name: str) -> None:
        at = [-1.0 if np.isnan(layer) else float(layer) for layer in part.layer.astype("float64")]
        fig.add_bar(
            orientation="h", x=part.logit, y=[layer + (slot + 0.5 - slots / 2) * thick / row for layer in at],
            width=0.9 * thick / row, marker={"color": colour, "line_width": 0}, customdata=hover, name=name,
            hovertemplate="%{customdata}: %{x:+.2f}<extra></extra>", showlegend=False,
        )  # fmt: skip

    embedding = frame[frame.part == "embedding"]
    bars(embedding, (slots - 1) // 2, SOFT, ["the embedding"], "embedding")
    heads = frame[frame.part == "head"]
    attention = heads.groupby("layer", as_index=False)[["logit"]].sum()
    bars(attention, 0, "#8c959f", [_heads(heads[heads.layer == layer]) for layer in layers], "attention")
    for choice in range(slots - 1):
        part = experts if not experts.choice.notna().any() else experts[experts.choice == choice]
        for key, of_one in part.groupby(part.expert.fillna(-1)):
            expert = int(key)
            who = "the feed-forward" if expert < 0 else f"expert {expert} (choice {choice + 1})"
            hover = [f"layer {layer}, {who}" for layer in of_one.layer]
            bars(of_one, choice + 1, SOFT if expert < 0 else expert_colour(expert), hover, who)
    fig.add_vline(x=0, line={"color": INK, "width": 1})
    fig.update_yaxes(
        tickvals=[-1, *layers], ticktext=["embedding", *(f"layer {layer}" for layer in layers)], showgrid=False,
        zeroline=False, fixedrange=True, range=[-1.6, len(layers) - 0.4],
    )  # fmt: skip
    fig.update_xaxes(
        title="added to the score, in logits", title_standoff=6, gridcolor=GRID, zeroline=False, fixedrange=True
    )
    fig.update_layout(barmode="overlay")
    total = float(frame.logit.sum())
    other = f"that of {_quoted(against)}" if against else "the mean of all tokens"
    n_experts = 0 if experts.expert.isna().all() else int(experts.expert.max()) + 1
    return framed(
        fig,
        f"Who said {_quoted(token)}{' after ' + _quoted(before) if before else ''}? {maker(model, dtype)}",
        f"Direct effect on the token's logit less {other}; all together {total:+.2f}. Grey: attention. Final size held fixed.",
        n_experts,
        plot=round(row * (len(layers) + 1.2)),
        left=86,
        right=24,
        below=46,
    )


def expert_words(
    words: Shaped[np.ndarray, "layer choice rank"],
    logits: Float[np.ndarray, "layer choice rank"],
    experts: Int[np.ndarray, "layer choice"],
    before: str = "",
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """The words that each chosen expert says by itself at one position, on its colour: the stronger, the louder.

    `words` and `logits` are one position of `analysis.lens.expert_lens`'s (ids as readable tokens), `experts` those
    chosen there. `before` is the text read so far. Source: MoE Lens (arXiv 2603.05806).
    """
    layers, choices, ranks = words.shape
    shares = 0.15 + 0.85 * np.clip(logits[..., 0] / max(float(logits[..., 0].max()), 1e-9), 0, 1)
    across = (WIDTH - 90) / choices
    fig = go.Figure()
    for choice in range(choices):
        colours = [
            blend(expert_colour(int(e)), float(share))
            for e, share in zip(experts[:, choice], shares[:, choice], strict=True)
        ]
        fig.add_bar(
            orientation="h",
            base=choice,
            x=[0.99] * layers,
            y=list(range(layers)),
            width=0.92,
            marker={"color": colours, "line_width": 0},
            text=[
                plain(short(f"{experts[n, choice]}: " + "  ".join(map(str, words[n, choice])), int(across / 7.6)))
                for n in range(layers)
            ],
            textposition="inside",
            insidetextanchor="start",
            textangle=0,
            constraintext="none",
            insidetextfont={"family": MONO, "size": 12, "color": [text_colour(colour) for colour in colours]},
            customdata=[
                f"layer {n}, expert {experts[n, choice]} (choice {choice + 1})<br>"
                + "<br>".join(
                    f"{plain(str(words[n, choice, r]))} {logits[n, choice, r]:+.2f} logits" for r in range(ranks)
                )
                for n in range(layers)
            ],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
    fig.update_xaxes(
        tickvals=[choice + 0.5 for choice in range(choices)], ticktext=[f"choice {c + 1}" for c in range(choices)],
        side="top", showgrid=False, zeroline=False, showline=False, range=[0, choices], fixedrange=True, ticks="",
    )  # fmt: skip
    fig.update_yaxes(
        tickvals=list(range(layers)), ticktext=[f"layer {layer} " for layer in range(layers)], showgrid=False,
        zeroline=False, range=[-0.5, layers - 0.5], showline=False, fixedrange=True,
    )  # fmt: skip
    fig.update_layout(barmode="overlay")
    return framed(
        fig,
        f"What each expert says by itself{' after ' + _quoted(before) if before else ''}: {maker(model, dtype)}",
        "The tokens that an expert's own contribution raises most. The fainter, the less.",
        int(experts.max()) + 1,
        plot=27 * layers,
        left=72,
        below=14,
    )


def top1_similarity(
    stream: Float[np.ndarray, "layer seq"], answer: Float[np.ndarray, "layer seq"], model: str = "", dtype: str = ""
) -> go.Figure:
    """How much of each layer's work the first choice does alone: the median token, and the middle half of all tokens.

    Both arrays are `analysis.lens.top1_similarity`'s. Source: MoE Lens (arXiv 2603.05806). Raises `FigureError` if there
    is nothing to draw.
    """
    if not stream.size:
        raise FigureError("There is no token, so there are no cosines to draw.")
    layers = list(range(len(stream)))
    fig = go.Figure()
    for name, values, colour, fill, symbol in (
        ("the residual stream after the layer", stream, INK, "rgba(27,31,36,0.12)", "circle"),
        ("the mixture's answer", answer, ACCENT, "rgba(84,39,136,0.15)", "diamond"),
    ):
        low, middle, high = np.percentile(values, (25, 50, 75), axis=1)
        fig.add_scatter(
            x=[*layers, *layers[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=fill, line_width=0,
            mode="lines", hoverinfo="skip", showlegend=False, name=f"{name}, half of the tokens",
        )  # fmt: skip
        fig.add_scatter(
            x=layers, y=middle, mode="lines+markers", name=name, showlegend=True,
            line={"color": colour, "width": 2}, marker={"symbol": symbol, "size": 8},
            hovertemplate=f"layer %{{x}}, {name}<br>cosine %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    fig.update_yaxes(
        title="cosine", gridcolor=GRID, zeroline=False, fixedrange=True, range=[min(0, answer.min()), 1.03]
    )
    fig.update_xaxes(
        title="layer", title_standoff=6, dtick=max(1, len(layers) // 16), showgrid=False, zeroline=False, ticks="outside",
        tickcolor=RULE, fixedrange=True, range=[-0.3, len(layers) - 0.7],
    )  # fmt: skip
    return framed(
        fig,
        f"How much the first choice does alone: {maker(model, dtype)}",
        "Cosine of the first choice alone and all choices together. Line: the median token; band: the middle half.",
        plot=300,
        left=76,
        below=46,
    )


def _ranked(words: np.ndarray, probabilities: np.ndarray) -> str:
    return "<br>".join(f"{plain(str(word))} {p:.1%}" for word, p in zip(words, probabilities, strict=True))


def _heads(heads: pd.DataFrame) -> str:
    each = ", ".join(f"head {h} {logit:+.2f}" for h, logit in zip(heads["head"], heads.logit, strict=True))
    return f"layer {heads.layer.iloc[0]}, attention ({each})"


def _quoted(text: str) -> str:
    return f"“{plain(short(text, 24))}”"
