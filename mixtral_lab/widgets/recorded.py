"""What a trace recorded of its routers, and what it lacks, as RouterExplorer shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mixtral_lab.analysis.certainty import NEAR_TIE, router_probabilities
from mixtral_lab.trace import Trace, TraceError
from mixtral_lab.widgets.base import WidgetError


class Recorded(NamedTuple):
    """One text's decisions, for every layer and token: an expert of -1, or not-a-number, where nothing was recorded.

    `weights` and `logits` are None if there are none at all; a dense model has 0 choices.
    """

    experts: Int[np.ndarray, "layer seq choice"]
    weights: Float[np.ndarray, "layer seq choice"] | None
    logits: Float[np.ndarray, "layer seq expert"] | None
    near_ties: Bool[np.ndarray, "layer seq"]
    n_experts: int
    lacks: tuple[str, ...]  # sentences

    @property
    def known(self) -> Bool[np.ndarray, "layer seq"]:
        return np.any(self.experts >= 0, axis=-1)


def recorded(trace: Trace) -> Recorded:
    """A trace's decisions as far as there are any. Raises `WidgetError` if it has no token or contradicts itself."""
    if not len(trace):
        raise WidgetError("The trace has no tokens, so there is nothing to show: trace a text of at least one token.")
    experts = _stacked(trace, "experts", -1)
    weights, logits = _stacked(trace, "weights", np.nan), _stacked(trace, "logits", np.nan)
    lacks = []
    if experts is None:
        experts = np.full((trace.n_layers, len(trace), 0), -1)
        try:
            trace.experts  # noqa: B018 (says why it cannot be had)
        except TraceError as error:
            lacks.append(str(error))
    else:
        lacks += _gaps(experts)
        if weights is None:
            lacks.append("The weights were not recorded: cells are drawn at full strength, and no shares can be given.")
        if logits is None:
            lacks.append("The router's logits were not recorded: probabilities and near-ties are not known.")
    n_experts = max(trace.n_experts or 0, int(experts.max(initial=-1)) + 1)
    return Recorded(experts.astype(np.int64), weights, logits, _near_ties(experts, logits), n_experts, tuple(lacks))


def _stacked(trace: Trace, what: str, unknown: int | float) -> np.ndarray | None:
    """`layer seq *`, with `unknown` where a layer or a position was not recorded; None if all were not."""
    found = {layer: trace.recorded.get(f"layers.{layer}.router.{what}") for layer in range(trace.n_layers)}
    values = {layer: tensor.cpu() for layer, tensor in found.items() if tensor is not None}
    if not values:
        return None
    at = np.arange(len(trace)) if trace.positions is None else trace.positions.numpy()
    width = max(tensor.shape[-1] for tensor in values.values())
    kind = np.int64 if what == "experts" else np.float32
    whole = np.full((trace.n_layers, len(trace), width), unknown, kind)
    for layer, tensor in values.items():
        if len(tensor) != len(at):
            raise WidgetError(
                f"The trace has {len(at)} tokens but decisions for {len(tensor)} in layer {layer}: each token needs its own."
            )
        array = tensor.numpy() if what == "experts" else tensor.float().numpy()
        whole[layer, at, : tensor.shape[-1]] = array
    return whole


def _gaps(experts: np.ndarray) -> list[str]:
    known = np.any(experts >= 0, axis=-1)
    layers, tokens = np.flatnonzero(~known.any(1)).tolist(), int((~known.any(0)).sum())
    gaps = []
    if layers:
        gaps.append(f"Of {len(known)} layers, {len(layers)} were not recorded: {', '.join(map(str, layers))}.")
    if tokens:
        gaps.append(f"Of {known.shape[1]} tokens, {tokens} were not recorded; they have no colour.")
    return gaps


def _near_ties(experts: np.ndarray, logits: np.ndarray | None) -> Bool[np.ndarray, "layer seq"]:
    """Where the last expert chosen is less than `NEAR_TIE` more probable than the best one left out.

    As `analysis.near_tie_margin`, but never where an edit chose otherwise than the router's logits say.
    """
    ties = np.zeros(experts.shape[:2], bool)
    if logits is None or not 0 < experts.shape[2] < logits.shape[2]:
        return ties
    for layer, (chosen, scores) in enumerate(zip(experts, logits, strict=True)):
        there = (chosen >= 0).all(-1) & ~np.isnan(scores).any(-1) & np.isfinite(scores.max(-1))
        p = router_probabilities(scores[None, there])[0]
        last = np.take_along_axis(p, chosen[there], -1).min(-1)
        np.put_along_axis(p, chosen[there], -1.0, -1)
        margin = last - p.max(-1)
        ties[layer, there] = (margin >= 0) & (margin < NEAR_TIE)
    return ties


def differing(one: Recorded, other: Recorded) -> tuple[Bool[np.ndarray, "layer seq"], Bool[np.ndarray, "layer seq"]]:
    """Where both decisions are known, and where they then take other experts (their order aside), position by position."""
    seq = min(one.experts.shape[1], other.experts.shape[1])
    both = one.known[:, :seq] & other.known[:, :seq]
    sets = [np.sort(each.experts[:, :seq], axis=-1) for each in (one, other)]
    if sets[0].shape == sets[1].shape:
        return both, both & (sets[0] != sets[1]).any(-1)
    return both, both


def comparison(traces: Sequence[Trace], found: Sequence[Recorded], names: Sequence[str]) -> str:
    """How two traces differ, in a few sentences."""
    both, differs = differing(*found)
    n, seq = int(both.sum()), both.shape[1]
    said = []
    if n:
        changed = int(differs.sum())
        if not changed:
            said.append(f"“{names[0]}” and “{names[1]}” take the same experts in all {n:,} decisions.")
        else:
            most = int(differs.sum(1).argmax())
            said.append(
                f"“{names[0]}” and “{names[1]}” take other experts in {changed:,} of {n:,} decisions "
                f"({100 * changed / n:.2g} %; the order of the chosen aside), most often in layer {most} "
                f"({int(differs[most].sum()):,} of {int(both[most].sum()):,})."
            )
        choices = [one.experts.shape[2] for one in found]
        if choices[0] != choices[1]:
            said.append(f"They choose {choices[0]} and {choices[1]} experts for a token.")
    else:
        said.append("There is no decision that both recorded, so nothing can be compared.")
    if traces[0].tokens != traces[1].tokens:
        same = sum(a == b for a, b in zip(traces[0].tokens, traces[1].tokens, strict=False))
        said.append(
            f"The texts differ: tokens are compared by position, 0 to {seq - 1}, of which {same:,} hold the same token."
        )
    return " ".join(said)
