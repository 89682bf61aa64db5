"""Lesson 11, break it: experts left out in three ways, and decisions that rounding may turn over."""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Integer
from torch import Tensor

from mixtral_lab.exercises.verdict import Verdict, asked, checker

LOGITS = [1.0, -1.0, 2.0, 0.5]  # experts 2 and 0 win, 3 is the next best


@checker
def check_weights_without(answer: Callable[[list[float], int, str], object]) -> Verdict:
    """A function from logits, the missing expert and the way of doing without it to {expert: weight}, two choices."""
    share = _share
    right: dict[tuple[int, str], dict[int, float]] = {
        (2, "zero"): {0: share(0, 2)},
        (2, "renormalise"): {0: 1.0},
        (2, "next_best"): {0: share(0, 3), 3: share(3, 0)},
        (0, "zero"): {2: share(2, 0)},
        (3, "zero"): {2: share(2, 0), 0: share(0, 2)},
        (3, "renormalise"): {2: share(2, 0), 0: share(0, 2)},
        (3, "next_best"): {2: share(2, 0), 0: share(0, 2)},
    }
    for (expert, how), wanted in right.items():
        case = f"With logits {LOGITS}, expert {expert} missing and {how!r}: "
        got = asked(answer, list(LOGITS), expert, how, case=f" with expert {expert} missing and {how!r}")
        try:
            weights = {int(e): float(weight) for e, weight in got.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return Verdict(False, f"Return a dictionary from expert to weight, such as {{0: 1.0}}, not {got!r}.")
        if not _same(weights, wanted):
            return Verdict(False, case + _what_is_wrong(weights, expert, how, wanted))
    return Verdict(True, "Three ways, three different experiments.")


@checker
def check_safe(answer: Callable[[list[float], int, float], object]) -> Verdict:
    """A function that says whether the chosen set stays the same if each logit is off by up to an error."""
    cases = [  # logits, k, error, right, what a wrong answer says
        ([3.0, 1.0, 2.0, 0.0], 2, 0.1, True, "second and third place are 1 apart: nothing of 0.1 can swap them."),
        ([3.0, 2.99, 1.0, 0.0], 2, 0.1, True,
         "first and second place may swap, but both stay in: compare the last one chosen with the first left out."),
        ([1.0, 1.01, 0.0, 2.0], 2, 0.1, False, "second and third place are only 0.01 apart: they can swap."),
        ([3.0, 2.0, 1.85, 0.0], 2, 0.1, False,
         "the second may fall by 0.1 while the third rises by 0.1: together 0.2, more than the 0.15 between them."),
        ([3.0, 1.0, 0.99, 0.98], 1, 0.1, True,
         "with k = 1 only first and second place decide: is k = 2 written into your code?"),
        ([0.0, 1.0, 2.0, 2.05], 3, 0.4, True,
         "with k = 3 the last one chosen has 1.0 and the one left out 0.0: is k = 2 written into your code?"),
    ]  # fmt: skip
    for logits, k, error, right, why in cases:
        case = f"With logits {logits}, k = {k} and an error of {error}: "
        got = asked(answer, list(logits), k, error, case=f" with logits {logits}, k = {k} and an error of {error}")
        try:
            known = got in (True, False)
        except Exception:  # an array of several, say
            known = False
        if not known:
            return Verdict(False, f"Return True or False, not {got!r}.")
        if bool(got) is not right:
            return Verdict(False, case + why)
    return Verdict(True, "The gap at the cut must be more than twice the error.")


@checker
def check_flipped(
    answer: object, fine: Integer[Tensor, "layer seq choice"], rounded: Integer[Tensor, "layer seq choice"]
) -> Verdict:
    """The share of decisions whose chosen set is the same in both, but in another order."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        got = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    anything = (fine != rounded).any(-1)
    other_set = (fine.sort(dim=-1).values != rounded.sort(dim=-1).values).any(-1)
    swapped = anything & ~other_set
    right = float(swapped.float().mean())

    def near(value: float | Tensor) -> bool:
        return math.isclose(got, float(value), abs_tol=1e-6)

    if near(right):
        return Verdict(True, f"{int(swapped.sum())} of {swapped.numel()} decisions keep their experts and swap them.")
    if near(anything.float().mean()):
        return Verdict(False, "That counts every difference: leave out the decisions whose set of experts changed.")
    if near(other_set.float().mean()):
        return Verdict(False, "That counts other sets: the swapped ones have the same set in another order.")
    if near((fine[..., 0] != rounded[..., 0]).float().mean()):
        return Verdict(False, "That counts other first choices; some of them come with another set of experts.")
    if near((fine != rounded).float().mean()):
        return Verdict(False, "That counts single choices: a decision is both choices of a token in a layer together.")
    if near(swapped.any(0).float().mean()):
        return Verdict(False, "That is the share of tokens: count the decisions, one for each token and layer.")
    if near(swapped.sum()):
        return Verdict(False, f"That is the number of decisions: divide it by how many there are, {swapped.numel()}.")
    if near(1 - right):
        return Verdict(False, "That is the share of all the others: subtract it from 1.")
    if not 0 <= got <= 1:
        return Verdict(False, f"A share lies between 0 and 1, but this is {got:g}.")
    return Verdict(
        False, "Where does anything differ? Where does the sorted pair differ? Take the first without the second."
    )


def _share(expert: int, other: int) -> float:
    """The weight of one of two chosen experts."""
    mine, its = math.exp(LOGITS[expert]), math.exp(LOGITS[other])
    return mine / (mine + its)


def _same(got: dict[int, float], wanted: dict[int, float]) -> bool:
    return got.keys() == wanted.keys() and all(math.isclose(got[e], w, abs_tol=1e-3) for e, w in wanted.items())


def _what_is_wrong(got: dict[int, float], expert: int, how: str, wanted: dict[int, float]) -> str:
    if expert not in (0, 2):
        if set(got) == {0, 2}:
            return "this expert had not been chosen, so the weights must stay as they were."
        return "this expert had not been chosen: the token keeps experts 2 and 0."
    if expert in got:
        return f"expert {expert} is still there: whoever has no weight is left out of the dictionary."
    before = {e: _share(e, other) for e, other in ((0, 2), (2, 0))}
    left = next(e for e in before if e != expert)
    if how == "zero" and _same(got, {left: 1.0}):
        return "the rest was made to sum to 1 again; that is 'renormalise'. Here the other weight stays as it was."
    if how == "renormalise" and _same(got, {left: before[left]}):
        return "the other weight stayed as it was; that is 'zero'. Here it takes over what is missing."
    if how == "next_best" and set(got) == {left}:
        return "only one expert is left: the next best comes in, so that there are two again."
    if how != "next_best" and set(got) != set(wanted):
        return f"only expert {left} is left, and nobody takes the missing one's place; that would be 'next_best'."
    if how == "next_best" and set(got) == set(wanted) and math.isclose(got[left], before[left], abs_tol=1e-3):
        return "the newcomer got the missing expert's weight: share one unit anew, by a softmax over the two."
    rounded = {e: round(w, 2) for e, w in wanted.items()}
    return f"expected about {rounded}, not {got}."
