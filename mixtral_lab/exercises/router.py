"""Lesson 01, meet the router."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from mixtral_lab.exercises.verdict import Verdict, asked, checker
from mixtral_lab.trace import Trace


@checker
def check_route_by_hand(answer: Callable[[list[float], int], object]) -> Verdict:
    """A function from logits and k to {expert: weight}, the weights of the chosen experts alone."""
    logits = [0.5, 2.0, -1.0, 1.0]
    got = asked(answer, list(logits), 2)
    if not isinstance(got, dict):
        return Verdict(False, f"Return a dictionary from expert to weight, such as {{1: 0.7, 3: 0.3}}, not {got!r}.")
    if any(isinstance(key, Tensor) for key in got):
        return Verdict(
            False,
            f"The keys of your dictionary must be whole numbers, not {next(iter(got))!r}: a tensor has .tolist().",
        )
    right = _weights(logits, [1, 3])
    over_all = _weights(logits, [0, 1, 2, 3])
    if set(got) == {0, 1, 2, 3}:
        return Verdict(False, "All four experts have a weight: keep only the k with the largest logits.")
    if set(got) == {0, 2}:
        return Verdict(False, "Those are the two smallest logits: sort the other way round.")
    if set(got) != {1, 3}:
        return Verdict(
            False,
            f"For logits {logits} the best two are experts 1 and 3 (counted from 0), not {sorted(got)}.",
        )
    if all(math.isclose(got[e], over_all[e], abs_tol=1e-4) for e in got):
        total = sum(got.values())
        return Verdict(
            False,
            f"Your weights sum to {total:.2f}: you shared the weight among all four. Choose first, then softmax.",
        )
    if all(math.isclose(got[e], logits[e] / (logits[1] + logits[3]), abs_tol=1e-4) for e in got):
        return Verdict(False, "You divided by the sum of the logits; softmax takes the exponential of each first.")
    if all(math.isclose(got[e], logits[e], abs_tol=1e-4) for e in got):
        return Verdict(False, "Those are the logits of the winners: a softmax over the two makes weights of them.")
    if not all(math.isclose(got[e], right[e], abs_tol=1e-3) for e in got):
        if all(math.isclose(got[e], right[e], abs_tol=0.006) for e in got):
            return Verdict(False, "The weights are right, but rounded: return them as they come out of the softmax.")
        return Verdict(False, f"The experts are right, the weights are not: expected about {_rounded(right)}.")
    alone = asked(answer, [0.0, 3.0], 1, case=" with k = 1", later=True)
    if not isinstance(alone, dict) or set(alone) != {1} or not math.isclose(alone[1], 1.0, abs_tol=1e-3):
        return Verdict(
            False,
            "With k = 1 the single winner must get the whole weight, 1.0: is k = 2 written into your code?",
        )
    return Verdict(True, "Choose first, then share one unit of weight among the winners.")


@checker
def check_repetition(answer: object, trace: Trace, layer: int) -> Verdict:
    """The share of neighbouring tokens with the same first choice in one layer (Mixtral paper, Table 5)."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    first = trace.routing.experts[layer, :, 0].tolist()
    same = sum(a == b for a, b in pairwise(first))
    pairs = len(first) - 1
    right = same / pairs
    try:
        got = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    if math.isclose(got, right, abs_tol=1e-3):
        return Verdict(
            True,
            f"{same} of {pairs} pairs repeat; by chance it would be 1 in {trace.routing.logits.shape[-1]}.",
        )
    if math.isclose(got, 1 - right, abs_tol=1e-3):
        return Verdict(False, "That is the share of pairs that differ: subtract it from 1.")
    if math.isclose(got, same / len(first), abs_tol=1e-4):
        return Verdict(
            False, f"You divided by the {len(first)} tokens, but there are only {pairs} pairs of neighbours."
        )
    if math.isclose(got, same, abs_tol=1e-3):
        return Verdict(False, f"That is the number of pairs: divide it by how many pairs there are, {pairs}.")
    sets = [set(chosen) for chosen in trace.routing.experts[layer].tolist()]
    either = sum(bool(a & b) for a, b in pairwise(sets)) / pairs
    if math.isclose(got, either, abs_tol=1e-3):
        return Verdict(False, "That counts a repeat when any chosen expert is shared: take the first choices alone.")
    if not 0 <= got <= 1:
        return Verdict(False, f"A share lies between 0 and 1, but this is {got:g}.")
    return Verdict(False, "Compare each token's first choice with the next token's, in this layer only.")


def _weights(logits: list[float], chosen: list[int]) -> dict[int, float]:
    total = sum(math.exp(logits[e]) for e in chosen)
    return {e: math.exp(logits[e]) / total for e in chosen}


def _rounded(weights: dict[int, float]) -> dict[int, float]:
    return {e: round(w, 2) for e, w in weights.items()}
