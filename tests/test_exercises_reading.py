"""Checkers of lesson 09: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from mixtral_lab.analysis import domain_information, repetition_counts
from mixtral_lab.exercises import check_either, check_information, check_uneven_chance


def over_pairs(same):
    """The share of neighbours for which `same(a, b)`."""
    return lambda chosen: sum(same(a, b) for a, b in pairwise(chosen)) / (len(chosen) - 1)


def common(a, b):
    return bool(set(a) & set(b))


def every_second_pair(chosen):
    pairs = list(pairwise(chosen))[::2]
    return sum(common(a, b) for a, b in pairs) / len(pairs)


def package_either(chosen):
    _, either, pairs = repetition_counts(np.array([chosen]), 8)[:, 0]
    return either / pairs


def table_of(counts):
    return np.array(counts) / np.sum(counts)


def of_cells(term, zero=True):
    """Σ term(p(d, e), p(d), p(e)) over the cells, without the empty ones unless `zero`."""

    def sum_of(counts):
        p = table_of(counts)
        rows, columns = p.sum(1), p.sum(0)
        cells = [(p[d, e], rows[d], columns[e]) for d in range(len(rows)) for e in range(len(columns))]
        return sum(term(float(c), float(r), float(k)) for c, r, k in cells if c or not zero)

    return sum_of


CASES = [
    (check_either, over_pairs(common), True, "either rank"),
    (check_either, package_either, True, "either rank"),
    (check_either, lambda chosen: None, None, "still returns None"),
    (check_either, over_pairs(lambda a, b: a[0] == b[0]), False, "first choices alone"),
    (check_either, over_pairs(lambda a, b: a[0] == b[0] or a[1] == b[1]), False, "cross them"),
    (check_either, over_pairs(lambda a, b: set(a) == set(b)), False, "one in common"),
    (check_either, lambda c: over_pairs(common)(c) * (len(c) - 1) / len(c), False, "divide by 7 tokens"),
    (check_either, lambda c: over_pairs(common)(c) * (len(c) - 1), False, "number of pairs"),
    (check_either, over_pairs(lambda a, b: not common(a, b)), False, "nothing in common"),
    (check_either, over_pairs(lambda a, b: len({*a} & {*b})), False, "still counts once"),
    (check_either, over_pairs(lambda a, b: len({*a} & {*b}) / 2), False, "still counts once"),
    (check_either, every_second_pair, False, "every second pair"),
    (check_either, lambda c: 0.9, False, "5 of 6 pairs"),
    (check_either, lambda c: "many", False, "one number"),
    (check_either, lambda c: c[99], False, "IndexError"),
    (check_either, lambda c: float("nan"), False, "not nan"),
    (check_uneven_chance, lambda shares: sum(s * s for s in shares), True, "Squares summed"),
    (check_uneven_chance, lambda shares: None, None, "still returns None"),
    (check_uneven_chance, lambda shares: 1 / len(shares), False, "used alike"),
    (check_uneven_chance, max, False, "largest share"),
    (check_uneven_chance, sum, False, "sum to 1"),
    (check_uneven_chance, lambda shares: max(shares) ** 2, False, "favourite alone"),
    (check_uneven_chance, lambda shares: 1 - sum(s * s for s in shares), False, "differ"),
    (check_uneven_chance, lambda shares: sum(s * s for s in shares) / len(shares), False, "only to be summed"),
    (check_uneven_chance, lambda shares: math.hypot(*shares), False, "square root"),
    (check_uneven_chance, lambda shares: -1, False, "both choose 0"),
    (check_information, of_cells(lambda p, r, c: p * math.log2(p / (r * c))), True, "rows are alike"),
    (check_information, lambda counts: domain_information(np.array(counts)), True, "rows are alike"),
    (check_information, lambda counts: None, None, "still returns None"),
    (check_information, of_cells(lambda p, r, c: p * math.log(p / (r * c))), False, "base 2"),
    (check_information, of_cells(lambda p, r, c: p * math.log2(r * c / p)), False, "sign is wrong"),
    (check_information, of_cells(lambda p, r, c: p * math.log2(p / (r * c)), zero=False), False, "count of 0"),
    (check_information, lambda t: 20 * of_cells(lambda p, r, c: p * math.log2(p / (r * c)))(t), False, "sum over 20"),
    (check_information, of_cells(lambda p, r, c: -p * math.log2(r)), False, "one margin"),
    (check_information, of_cells(lambda p, r, c: -p * math.log2(p)), False, "entropy of"),
    (check_information, of_cells(lambda p, r, c: -p * math.log2(p / r)), False, "what stays unknown"),
    (check_information, lambda counts: 0.3, False, "should be 1.000 bits"),
    (check_information, lambda counts: counts, False, "one number"),
]


@pytest.mark.parametrize(("check", "answer", "solved", "says"), CASES)
def test_reading(check, answer, solved, says):
    verdict = check(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)
