"""Lesson 12, training a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mixtral_lab.exercises.verdict import Verdict, asked, checker, said

# Four tokens, four experts, two choices each: small enough for paper.
PROBABILITIES = [[0.5, 0.3, 0.1, 0.1], [0.4, 0.2, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1], [0.05, 0.15, 0.3, 0.5]]
CHOSEN = [[0, 1], [0, 2], [0, 1], [3, 2]]
WEIGHTS = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]


@checker
def check_balance_loss(answer: Callable[..., object]) -> Verdict:
    """A function from probabilities `token expert` and choices `token choice` to E times the sum of f P."""
    given = asked(answer, [list(row) for row in PROBABILITIES], [list(row) for row in CHOSEN])
    try:
        got = float(given)
    except Exception as error:
        return Verdict(False, f"Return one number ({said(error)}).")
    n_tokens, n_experts = len(PROBABILITIES), len(PROBABILITIES[0])
    counts = _counts(CHOSEN, n_experts)
    share = [count / sum(counts) for count in counts]
    first = [count / n_tokens for count in _counts([row[:1] for row in CHOSEN], n_experts)]
    mean = [sum(row[e] for row in PROBABILITIES) / n_tokens for e in range(n_experts)]
    right = n_experts * _dot(share, mean)
    mistakes = {
        "The factor is missing: multiply the sum by the number of experts, so that even use gives 1.": right
        / n_experts,
        "f is counted per token, so it sums to 2; divide the counts by all assignments, tokens × choices.": 2 * right,
        "The factor is missing, and f sums to 2: divide the counts by tokens × choices, then multiply by the experts.": (
            2 * right / n_experts
        ),
        "You counted first choices alone: every choice is an assignment.": n_experts * _dot(first, mean),
        "That is f times f: the second factor is the mean probability, which has a gradient.": n_experts
        * _dot(share, share),
        "That is P times P: the first factor is the share of assignments, which is counted.": n_experts
        * _dot(mean, mean),
        "You summed the probabilities over the tokens: take their mean.": right * n_tokens,
        "You used the counts themselves: divide them by their sum.": right * sum(counts),
    }
    if not math.isclose(got, right, abs_tol=1e-4):
        for message, wrong in mistakes.items():
            if math.isclose(got, wrong, abs_tol=1e-4):
                return Verdict(False, message)
        return Verdict(False, f"For the checker's four tokens it should be {right:.4f}, not {got:.4f}.")
    other = float(
        asked(answer, [[0.2] * 5, [0.2] * 5], [[0], [3]], case=" with five experts and one choice", later=True)
    )
    if not math.isclose(other, 1.0, abs_tol=1e-4):
        return Verdict(
            False,
            f"With five experts and one choice it gives {other:.3f}, not 1: is 4 or 2 written into your code?",
        )
    return Verdict(True, "Counted shares times mean probabilities: the one says who is busy, the other can be pushed.")


@checker
def check_importance_and_load(answer: Callable[..., object]) -> Verdict:
    """A function from choices, weights and a number of experts to two lists of shares: of weight, and of assignments."""
    given = asked(answer, [list(row) for row in CHOSEN], [list(row) for row in WEIGHTS], 4)
    try:
        importance, load = ([float(x) for x in part] for part in given)
    except Exception as error:
        return Verdict(False, f"Return two lists of numbers, (importance, load) ({said(error)}).")
    if len(importance) != 4 or len(load) != 4:
        return Verdict(False, f"Four experts need four numbers in each list, not {len(importance)} and {len(load)}.")
    weight = [0.0] * 4
    for row, weights in zip(CHOSEN, WEIGHTS, strict=True):
        for expert, w in zip(row, weights, strict=True):
            weight[expert] += w
    counts = _counts(CHOSEN, 4)
    right, right_load = [w / sum(weight) for w in weight], [c / sum(counts) for c in counts]
    if _same(importance, right) and _same(load, right_load):
        unwanted = asked(answer, [[0, 2]], [[0.75, 0.25]], 4, case=" with experts that nobody chose", later=True)
        lengths = [len(part) for part in unwanted]
        if lengths != [4, 4]:
            return Verdict(False, f"Experts that nobody chose have a 0: four numbers in each list, not {lengths[0]}.")
        return Verdict(True, "Importance asks how loud an expert is, load how busy: only load makes a machine wait.")
    if _same(importance, right_load) and _same(load, right):
        return Verdict(False, "The right lists in the wrong order: importance first.")
    if _same(importance, right_load) and _same(load, right_load):
        return Verdict(False, "Both are load: importance adds the weights, not ones.")
    if _same(importance, weight) and _same(load, counts):
        return Verdict(False, "Those are sums: divide each list by its own sum, so that it sums to 1.")
    if _same(importance, weight):
        return Verdict(False, "Importance is a sum: divide it by the sum of all weights.")
    if _same(load, counts):
        return Verdict(False, "Load is a count: divide it by the number of assignments.")
    if _same(load, [count / len(CHOSEN) for count in counts]):
        return Verdict(False, "You divided the load by the tokens; each makes two assignments, so it sums to 2.")
    if _same(load, [count / len(CHOSEN) for count in _counts([row[:1] for row in CHOSEN], 4)]):
        return Verdict(False, "Load counts every choice, not only the first.")
    if _same(load, right_load):
        return Verdict(False, f"Load is right. Importance should be about {[round(x, 3) for x in right]}.")
    if _same(importance, right):
        return Verdict(False, f"Importance is right. Load should be about {[round(x, 3) for x in right_load]}.")
    return Verdict(False, "Go through tokens and choices once: add the weight to one list and 1 to the other.")


def _counts(chosen: Sequence[Sequence[int]], n_experts: int) -> list[int]:
    flat = [expert for row in chosen for expert in row]
    return [flat.count(expert) for expert in range(n_experts)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _same(got: Sequence[float], wanted: Sequence[float] | Sequence[int]) -> bool:
    return all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip(got, wanted, strict=True))
