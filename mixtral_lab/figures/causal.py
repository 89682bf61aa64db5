"""What a change does to the model's words, as pictures: experts left out, tokens sent elsewhere, values exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from mixtral_lab.figures.colours import FigureError
from mixtral_lab.figures.frame import (
    ACCENT,
    GRID,
    INK,
    RULE,
    SOFT,
    expert_name,
    framed,
    maker,
    panel_title,
    plain,
    short,
)
from mixtral_lab.figures.heat import LESS, MORE, heat_panels

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "zero": "its answer taken away",
    "renormalise": "its weight given to the others",
    "next_best": "the next best in its place",
}


def ablation_map(
    frame: pd.DataFrame, of: Literal["loss", "target"] = "loss", model: str = "", dtype: str = ""
) -> go.Figure:
    """What leaving out each expert of each layer does: a map for every way of doing without it.

    `frame` is `analysis.causal.ablation_sweep`'s; `of` says whether the change in loss or in the target's
    log-probability is drawn, both in nats. Changes within the noise floor have no number. Layer 0 is at the bottom.
    Raises `FigureError` for another table, or if it has no targets.
    """
    column = f"{of}_change"
    missing = {"how", "layer", "expert", "used", column, f"{of}_noise"} - set(frame.columns)
    if missing or frame.empty or frame[column].isna().all():
        raise FigureError(
            f"The table lacks {', '.join(sorted(missing)) or ('targets' if of == 'target' else 'rows')}: "
            "analysis.causal.ablation_sweep makes one."
        )
    ways = list(dict.fromkeys(frame.how))
    tables = [frame[frame.how == way].pivot(index="layer", columns="expert", values=column) for way in ways]
    layers, n_experts = tables[0].index.tolist()[::-1], tables[0].shape[1]
    changes = np.stack([table.loc[layers].to_numpy() for table in tables])
    used = frame[frame.how == ways[0]].pivot(index="layer", columns="expert", values="used").loc[layers].to_numpy()
    noise = float(frame[f"{of}_noise"].max())
    small = np.abs(changes) <= noise
    notes = [
        [
            [
                f"<br>{share:.1%} of tokens chose it{'<br>within the noise floor' if quiet else ''}"
                for share, quiet in zip(*row, strict=True)
            ]
            for row in zip(used, panel, strict=True)
        ]
        for panel in small
    ]
    unit = "nats per token" if of == "loss" else "nats"
    heat = heat_panels(
        changes,
        [TITLES.get(way, plain(way)) for way in ways],
        [str(layer) for layer in layers],
        n_experts,
        row_title="layer",
        column_title="expert",
        hover=f"without expert {{column}} of layer {{row}}<br>{{panel}}: {{value}} {unit}{{note}}",
        middle=0.0,
        percent=False,
        written=np.where(small, np.nan, np.round(changes, 2) + 0.0),
        notes=notes,
    )
    what = "the loss" if of == "loss" else "the target's log-probability"
    return framed(
        heat.figure,
        f"Without this expert: {maker(model, dtype)}",
        f"Change in {what}, {unit}. Purple: more; orange: less. Within the noise floor of {noise:.1g}, no number.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def top_k_losses(frame: pd.DataFrame, model: str = "", dtype: str = "") -> go.Figure:
    """How the loss changes if every token takes k experts: a line for each kind of text, and in purple their mean.

    `frame` is `analysis.causal.top_k_sweep`'s. Raises `FigureError` for another table.
    """
    missing = {"domain", "k", "trained", "loss", "loss_change"} - set(frame.columns)
    if missing or frame.empty:
        raise FigureError(
            f"The table lacks {', '.join(sorted(missing)) or 'rows'}: analysis.causal.top_k_sweep makes one."
        )
    fig = go.Figure()
    domains = list(dict.fromkeys(frame.domain))
    ends = []
    for domain in domains:
        part = frame[frame.domain == domain].sort_values("k")
        ends.append((float(part.loss_change.iloc[-1]), domain))
        fig.add_scatter(
            x=part.k, y=part.loss_change, customdata=part.loss, mode="lines+markers", name=plain(domain),
            line={"color": "#8c959f", "width": 1.3}, marker={"size": 5},
            hovertemplate=f"{plain(domain)}, %{{x}} experts per token<br>loss %{{customdata:.3f}} (%{{y:+.3f}}) nats per token"
            "<extra></extra>",
        )  # fmt: skip
    mean = frame.groupby("k").loss_change.mean()
    if len(domains) > 1:
        fig.add_scatter(
            x=mean.index, y=mean, mode="lines+markers", name="mean", line={"color": ACCENT, "width": 3}, marker={"size": 8},
            hovertemplate="mean, %{x} experts per token<br>%{y:+.3f} nats per token<extra></extra>",
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": SOFT, "width": 1})
    own = frame[frame.trained].k.unique()
    for k in own:
        fig.add_vline(
            x=k, line={"color": INK, "width": 1.2, "dash": "dash"}, annotation_text="as trained", annotation_position="top",
            annotation_font_size=12,
        )  # fmt: skip
    plot = 320
    low, high = float(frame.loss_change.min()), float(frame.loss_change.max())
    reach = [low - 0.06 * (high - low) - 1e-9, high + 0.12 * (high - low) + 1e-9]
    for y, (_, domain) in zip(
        _apart([end for end, _ in sorted(ends)], 15 * (reach[1] - reach[0]) / plot), sorted(ends), strict=True
    ):
        fig.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=6, y=y, text=plain(short(domain, 14)), showarrow=False,
            font={"size": 12, "color": SOFT},
        )  # fmt: skip
    ks = sorted(set(frame.k.tolist()))
    fig.update_yaxes(
        range=reach, title="change in loss, nats per token", gridcolor=GRID, zeroline=False, fixedrange=True
    )
    fig.update_xaxes(
        title="experts per token", title_standoff=6, dtick=max(1, len(ks) // 16), range=[ks[0] - 0.2, ks[-1] + 0.1],
        showgrid=False, zeroline=False, ticks="outside", tickcolor=RULE, fixedrange=True,
    )  # fmt: skip
    fig.update_traces(showlegend=False)
    return framed(
        fig,
        f"More experts per token, or fewer: {maker(model, dtype)}",
        "Every layer takes the k best experts of each token instead of as many as in training."
        + (" Purple: the mean." if len(domains) > 1 else ""),
        plot=plot,
        left=76,
        right=122,
        below=46,
    )


def rerouting(
    effects: pd.DataFrame,
    moved: Float[np.ndarray, "set layer"],
    own: Sequence[int],
    token: str = "",
    after: str = "",
    layer: int | None = None,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """One token sent to other experts: what it does to the next word, and which later layers choose otherwise.

    The arguments are the parts of `analysis.causal.reroute_sweep`'s answer; `token` is the one that was sent elsewhere
    in `layer`, `after` the one that follows. The sets that help most are at the top. Raises `FigureError` for a table
    without rows or its columns.
    """
    if not {"experts", "next_change"} <= set(effects.columns) or effects.empty or len(effects) != len(moved):
        raise FigureError("Effects and moves of the same sets are needed: analysis.causal.reroute_sweep makes both.")
    order = np.argsort(effects.next_change.to_numpy(), kind="stable")
    names = [_set(effects.experts.iloc[number]) for number in order]
    changes = effects.next_change.to_numpy()[order]
    later = np.flatnonzero(np.isfinite(moved).any(0))
    fig = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.55, 0.45], horizontal_spacing=0.02)
    at = list(range(len(order)))
    fig.add_bar(
        orientation="h", x=changes, y=at, marker={"color": [MORE[2] if c > 0 else LESS[2] for c in changes], "line_width": 0},
        customdata=[[", ".join(map(str, effects.experts.iloc[n])), effects.loss_change.iloc[n]] for n in order],
        hovertemplate="to experts %{customdata[0]}<br>%{x:+.3f} nats for the next token<br>%{customdata[1]:+.4f} nats per token "
        "of loss over all that follow<extra></extra>", row=1, col=1, showlegend=False,
    )  # fmt: skip
    if len(later):
        fig.add_heatmap(
            x=[str(number) for number in later], y=at, z=moved[order][:, later], coloraxis="coloraxis", xgap=1, ygap=1,
            hovertemplate="layer %{x}: %{z:.1%} of the later choices are others<extra></extra>", row=1, col=2,
        )  # fmt: skip
    fig.add_vline(x=0, line={"color": INK, "width": 1}, row=1, col=1)
    every = max(1, -(-len(order) // 40))
    fig.update_yaxes(
        tickvals=at[::every], ticktext=names[::every], tickfont_size=11, showgrid=False, zeroline=False, fixedrange=True,
        range=[-0.6, len(order) - 0.4], ticks="",
    )  # fmt: skip
    fig.update_xaxes(
        title="change of the next token's log-probability, nats", title_standoff=6, gridcolor=GRID, zeroline=False,
        fixedrange=True, row=1, col=1,
    )  # fmt: skip
    fig.update_xaxes(
        title="later layer", title_standoff=6, type="category", fixedrange=True, showgrid=False, row=1, col=2
    )
    fig.update_layout(
        coloraxis={
            "colorscale": [(0, "#ffffff"), (1, ACCENT)], "cmin": 0,
            "colorbar": {"thickness": 12, "len": 160, "lenmode": "pixels", "y": 1, "yanchor": "top", "outlinewidth": 0,
                         "tickformat": ".0%", "nticks": 4, "tickfont_size": 11},
        },
    )  # fmt: skip
    panel_title(fig, "what it does to the next token", 1.0)
    if len(later):
        panel_title(fig, "choices that became others", 1.0, fig.layout.xaxis2.domain[0])
    what = f"“{plain(short(token, 20))}” " if token else "A token "
    where = "" if layer is None else f" in layer {layer}"
    follows = f" Next comes “{plain(short(after, 20))}”." if after else ""
    return framed(
        fig,
        f"{what}sent to other experts{where}: {maker(model, dtype)}",
        f"The model's own choice: {_set(own)}.{follows}",
        plot=max(17 * min(len(order), 40), 180),
        left=40 + 30 * len(own),
        right=64,
        below=48,
    )


def patching_map(
    recovered: Float[np.ndarray, "layer seq"],
    clean: Sequence[str],
    corrupt: Sequence[str],
    target: str,
    against: str,
    model: str = "",
    dtype: str = "",
) -> go.Figure:
    """Where the difference between two texts is carried: how much of it one value of the clean run brings back.

    `recovered` and the two texts' tokens are `analysis.causal.patch_sweep`'s; where these differ, both are named. Layer
    0 is at the bottom. Raises `FigureError` if the numbers of positions differ.
    """
    layers, seq = recovered.shape
    if len(clean) != seq or len(corrupt) != seq:
        raise FigureError(f"There are {seq} positions, but {len(clean)} and {len(corrupt)} tokens.")
    names = [
        f"{position} {plain(short(one, 12))}" + ("" if one == other else f" → {plain(short(other, 12))}")
        for position, (one, other) in enumerate(zip(clean, corrupt, strict=True))
    ]
    heat = heat_panels(
        recovered[None, ::-1].astype(np.float64),
        [""],
        [str(layer) for layer in reversed(range(layers))],
        names,
        row_title="layer",
        column_title="token of the clean text → of the corrupt one",
        hover="layer {row}, {column}<br>{value} recovered",
        middle=0.0,
        written=np.round(recovered[None, ::-1], 2) + 0.0,  # not "-0"
    )
    return framed(
        heat.figure,
        f"Which values make it “{plain(short(target, 16))}”, not “{plain(short(against, 16))}”: {maker(model, dtype)}",
        "Share of the clean text's logit difference that one of its values, put into the corrupt run, brings back. White: none.",
        plot=heat.height,
        left=heat.left,
        right=heat.right,
        below=heat.below,
    )


def _set(experts: Sequence[int]) -> str:
    return " ".join(expert_name(int(expert)) for expert in experts)


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Sorted values moved up until each is at least so far from the one before."""
    moved: list[float] = []
    for value in values:
        moved.append(max(value, moved[-1] + least) if moved else value)
    return moved
