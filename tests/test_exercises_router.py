"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import math

import pytest
import torch

from mixtral_lab.exercises import check_repetition, check_route_by_hand
from mixtral_lab.model.moe import route
from mixtral_lab.trace import Trace


def solution(logits, k):
    best = sorted(range(len(logits)), key=lambda e: -logits[e])[:k]
    powers = {e: math.exp(logits[e]) for e in best}
    return {e: p / sum(powers.values()) for e, p in powers.items()}


def over_all(logits, k):
    total = sum(math.exp(x) for x in logits)
    best = sorted(range(len(logits)), key=lambda e: -logits[e])[:k]
    return {e: math.exp(logits[e]) / total for e in best}


def without_exponential(logits, k):
    best = sorted(range(len(logits)), key=lambda e: -logits[e])[:k]
    return {e: logits[e] / sum(logits[b] for b in best) for e in best}


def softmax_of_all(logits, k):
    return over_all(logits, len(logits))


def the_worst(logits, k):
    return dict.fromkeys(sorted(range(len(logits)), key=lambda e: logits[e])[:k], 0.5)


def always_two(logits, k):
    return solution(logits, 2)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (solution, True, "Choose first"),
        (lambda logits, k: None, None, "still returns None"),
        (over_all, False, "sum to 0.8"),
        (without_exponential, False, "exponential"),
        (softmax_of_all, False, "All four experts"),
        (the_worst, False, "smallest"),
        (always_two, False, "k = 2 written"),
        (lambda logits, k: dict(zip(torch.tensor([1, 3]), (0.7, 0.3), strict=True)), False, "tensor has .tolist()"),
        (lambda logits, k: {1: 2.0, 3: 1.0}, False, "logits of the winners"),
        (lambda logits, k: [0.7, 0.3], False, "dictionary"),
        (lambda logits, k: {0: 0.5, 1: 0.5}, False, "counted from 0"),
        (lambda logits, k: {1: 0.5, 3: 0.5}, False, "weights are not"),
        (lambda logits, k: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_route_by_hand(answer, solved, says):
    verdict = check_route_by_hand(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


FIRST = [0, 0, 1, 2, 2, 2, 3, 0, 1]  # 3 of 8 pairs repeat


@pytest.fixture
def trace():
    logits = torch.nn.functional.one_hot(torch.tensor(FIRST), 4).float()[None] * 5
    logits[0, :, 3] += 1  # expert 3 is everybody's second choice
    routing = route(logits, 2)
    return Trace.from_arrays("abcdefghi", routing.experts, routing.weights, routing.logits)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (3 / 8, True, "3 of 8 pairs"),
        (None, None, "still None"),
        (5 / 8, False, "differ"),
        (3 / 9, False, "only 8 pairs"),
        (3, False, "number of pairs"),
        (1.0, False, "any chosen expert"),
        (-4.0, False, "between 0 and 1"),
        (0.77, False, "next token"),
        ("many", False, "one number"),
    ],
)
def test_repetition(trace, answer, solved, says):
    verdict = check_repetition(answer, trace, layer=0)
    assert verdict.solved is solved
    assert says in repr(verdict)
