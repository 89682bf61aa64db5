"""Lesson 09, reading the router."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker

TEXTS = ([[1, 3], [1, 2], [3, 4], [3, 4], [1, 4], [1, 4], [3, 1]], [[0, 1], [2, 3], [4, 0]], [[1, 2], [2, 1]])
SHARES = ([0.4, 0.3, 0.2, 0.1], [0.5, 0.25, 0.25, 0.0], [0.125] * 8)
TABLES = ([[10, 0], [0, 10]], [[6, 2], [1, 3], [4, 8]], [[30, 10], [5, 0]], [[2, 4], [3, 6]])


@checker
def check_either(answer: Callable[[list[list[int]]], object]) -> Verdict:
    """A function from the chosen experts of each token to the share of neighbours with any of them in common."""
    for text in TEXTS:
        got = _number(answer, [list(chosen) for chosen in text])
        pairs = list(pairwise(text))
        same = sum(bool({*a} & {*b}) for a, b in pairs)
        if _close(got, same / len(pairs)):
            continue
        case = f"For {text}"
        if _close(got, sum(a[0] == b[0] for a, b in pairs) / len(pairs)):
            return Verdict(False, f"{case} you compare the first choices alone: any of the two may be shared.")
        if _close(got, sum(any(x == y for x, y in zip(a, b, strict=True)) for a, b in pairs) / len(pairs)):
            return Verdict(False, f"{case} you compare first with first and second with second: cross them too.")
        if _close(got, sum({*a} == {*b} for a, b in pairs) / len(pairs)):
            return Verdict(False, f"{case} you ask for the same pair of experts: one in common is enough.")
        if _close(got, same / len(text)):
            return Verdict(False, f"{case} you divide by {len(text)} tokens, but they make {len(pairs)} pairs.")
        if _close(got, 1 - same / len(pairs)):
            return Verdict(False, f"{case} you give the share of pairs with nothing in common: subtract it from 1.")
        if _close(got, same):
            return Verdict(False, f"{case} you give the number of pairs: divide it by all {len(pairs)} pairs.")
        shared = sum(len({*a} & {*b}) for a, b in pairs)
        if any(_close(got, shared / count) for count in (1, len(pairs), 2 * len(pairs))):
            return Verdict(False, f"{case} you count the experts in common: a pair that shares both still counts once.")
        if _close(got, sum(bool({*a} & {*b}) for a, b in pairs[::2]) / len(pairs[::2])):
            return Verdict(False, f"{case} you take every second pair: a token is a neighbour of both sides.")
        return Verdict(
            False, f"{case} it should be {same} of {len(pairs)} pairs, {same / len(pairs):.3f}, not {got:.3f}."
        )
    return Verdict(True, "Any expert in common, of either rank, over all pairs of neighbours.")


@checker
def check_uneven_chance(answer: Callable[[list[float]], object]) -> Verdict:
    """A function from the experts' shares of first choices to the chance that two blind tokens agree."""
    for shares in SHARES:
        got = _number(answer, list(shares))
        right = sum(share**2 for share in shares)
        if _close(got, right):
            continue
        case = f"For shares {shares}"
        if _close(got, 1 / len(shares)):
            return Verdict(False, f"{case} you give 1 in {len(shares)}: that is the chance if all were used alike.")
        if _close(got, 1):
            return Verdict(False, f"{case} you give 1: shares always sum to 1, but both tokens must choose the expert.")
        if _close(got, max(shares)):
            return Verdict(
                False, f"{case} you give the largest share: the neighbours may also agree on another expert."
            )
        if _close(got, max(shares) ** 2):
            return Verdict(False, f"{case} you count agreement on the favourite alone: add that on the others.")
        if _close(got, 1 - right):
            return Verdict(False, f"{case} that is the chance that they differ: subtract it from 1.")
        if _close(got, right / len(shares)):
            return Verdict(False, f"{case} you divide by the number of experts: the squares are only to be summed.")
        if _close(got, math.sqrt(right)):
            return Verdict(False, f"{case} you took a square root: the sum of squares is the chance itself.")
        return Verdict(False, f"{case} it should be {right:.3f}, not {got:.3f}: both choose 0, or both choose 1, ...")
    return Verdict(True, "Squares summed: 1/8 is its smallest value for eight experts, reached if all are used alike.")


@checker
def check_information(answer: Callable[[list[list[int]]], object]) -> Verdict:
    """A function from a table of counts, domain by expert, to their mutual information in bits."""
    for table in TABLES:
        try:
            got = _number(answer, [list(row) for row in table])
        except Over as over:
            if isinstance(over.__cause__, (ValueError, ZeroDivisionError)):
                return Verdict(False, f"{over} A count of 0 has no logarithm: leave such cells out.")
            raise
        total = sum(map(sum, table))
        of_rows = _entropy([sum(row) / total for row in table])
        of_columns = _entropy([sum(column) / total for column in zip(*table, strict=True)])
        joint = _entropy([count / total for row in table for count in row])
        right = of_rows + of_columns - joint
        if _close(got, right):
            continue
        case = f"For {table}"
        if _close(got, right * math.log(2)):
            return Verdict(False, f"{case} you give {got:.3f} nats: take the logarithm to the base 2 for bits.")
        if _close(got, -right):
            return Verdict(False, f"{case} the sign is wrong: p(d, e) stands above the line, the product below it.")
        if _close(got, joint):
            return Verdict(
                False, f"{case} that is the entropy of the cells: divide p(d, e) by p(d) p(e) in the logarithm."
            )
        if _close(got, of_rows) or _close(got, of_columns):
            return Verdict(False, f"{case} that is the entropy of one margin: it takes no account of the other.")
        if _close(got, joint - of_rows) or _close(got, joint - of_columns):
            return Verdict(
                False, f"{case} you give what stays unknown of one when the other is known, not what is told."
            )
        if _close(got, total * right):
            return Verdict(
                False, f"{case} you sum over {total} assignments: weigh each cell by p(d, e), not its count."
            )
        return Verdict(False, f"{case} it should be {right:.3f} bits, not {got:.3f}.")
    return Verdict(True, "0 for a table whose rows are alike, and zero counts add nothing.")


def _number(answer: Callable[[Any], object], given: Any) -> float:
    """The number that an answer gives."""
    got = asked(answer, given)
    try:
        number = float(got)
    except Exception:
        number = math.nan
    if not math.isfinite(number):
        raise Over(Verdict(False, f"Return one number, not {got!r}."))
    return number


def _close(a: float, b: float | int) -> bool:
    return math.isclose(a, b, abs_tol=1e-6)


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log2(share) for share in shares if share)
