"""Lesson 11's checkers accept the solution, know the stub, and have a word of their own for each usual mistake."""

from __future__ import annotations

import pytest
import torch

from mixtral_lab.exercises import check_flipped, check_safe, check_weights_without
from mixtral_lab.model.moe import route


def chosen(logits):
    _, experts, weights = route(torch.tensor(logits), 2)
    return dict(zip(experts.tolist(), weights.tolist(), strict=True))


def solution(logits, expert, how):
    if how == "next_best":
        return chosen([float("-inf") if e == expert else logit for e, logit in enumerate(logits)])
    left = {e: w for e, w in chosen(logits).items() if e != expert}
    return {e: w / sum(left.values()) for e, w in left.items()} if how == "renormalise" else left


def always(way):
    return lambda logits, expert, how: solution(logits, expert, way)


def but(way, other):
    """Right, except that one way is answered as another."""
    return lambda logits, expert, how: solution(logits, expert, other if how == way else how)


def keeps_zeros(logits, expert, how):
    return {expert: 0.0} | solution(logits, expert, how)


def newcomer_inherits(logits, expert, how):
    if how != "next_best" or expert not in chosen(logits):
        return solution(logits, expert, how)
    before, after = chosen(logits), solution(logits, expert, how)
    return {e: before.get(e, before[expert]) for e in after}


def always_half(logits, expert, how):
    return dict.fromkeys(solution(logits, expert, how), 0.5)


def forgets_who_was_chosen(logits, expert, how):
    return solution(logits, expert, how) if expert in chosen(logits) else {2: 1.0}


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (solution, True, "Three ways"),
        (lambda logits, expert, how: None, None, "still returns None"),
        (always("renormalise"), False, "that is 'renormalise'"),
        (always("zero"), False, "that is 'zero'"),
        (but("next_best", "renormalise"), False, "only one expert is left"),
        (but("zero", "next_best"), False, "that would be 'next_best'"),
        (keeps_zeros, False, "expert 2 is still there"),
        (newcomer_inherits, False, "newcomer"),
        (always_half, False, "expected about"),
        (forgets_who_was_chosen, False, "had not been chosen"),
        (lambda logits, expert, how: [0.7], False, "dictionary"),
        (lambda logits, expert, how: {0: None}, False, "dictionary"),
        (lambda logits, expert, how: {e: torch.tensor(w) for e, w in solution(logits, expert, how).items()}, True, ""),
        (lambda logits, expert, how: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_weights_without(answer, solved, says):
    verdict = check_weights_without(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def gap(logits, k):
    best = sorted(logits, reverse=True)
    return best[k - 1] - best[k]


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda logits, k, error: gap(logits, k) > 2 * error, True, "twice"),
        (lambda logits, k, error: None, None, "still returns None"),
        (lambda logits, k, error: gap(logits, k) > error, False, "together 0.2"),
        (lambda logits, k, error: gap(logits, 2) > 2 * error, False, "k = 2 written"),
        (lambda logits, k, error: gap(logits, 1) > 2 * error, False, "both stay in"),
        (lambda logits, k, error: True, False, "only 0.01 apart"),
        (lambda logits, k, error: gap(logits, k) < 2 * error, False, "1 apart"),
        (lambda logits, k, error: logits[k - 1] - logits[k] > 2 * error, False, "1 apart"),
        (lambda logits, k, error: "yes", False, "True or False"),
        (lambda logits, k, error: torch.zeros(3) > 1, False, "True or False"),
        (lambda logits, k, error: logits[9], False, "IndexError"),
    ],
)
def test_safe(answer, solved, says):
    verdict = check_safe(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


FINE = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7], [0, 2]]] * 3)
ROUNDED = torch.tensor(
    [  # swapped: two decisions of token 0. Other sets: two here, none there, two there
        [[1, 0], [2, 4], [4, 5], [7, 1], [0, 2]],
        [[1, 0], [2, 3], [4, 5], [6, 7], [0, 2]],
        [[0, 1], [2, 4], [4, 5], [6, 5], [0, 2]],
    ]
)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (2 / 15, True, "2 of 15"),
        (torch.tensor(2 / 15), True, "2 of 15"),
        (None, None, "still None"),
        (6 / 15, False, "every difference"),
        (4 / 15, False, "other sets"),
        (3 / 15, False, "other first choices"),
        (9 / 30, False, "single choices"),
        (2, False, "number of decisions"),
        (13 / 15, False, "subtract"),
        (-1, False, "between 0 and 1"),
        (float("nan"), False, "between 0 and 1"),
        (0.77, False, "first without the second"),
        ("two", False, "one number"),
        (torch.zeros(3), False, "one number"),
    ],
)
def test_flipped(answer, solved, says):
    verdict = check_flipped(answer, FINE, ROUNDED)
    assert verdict.solved is solved
    assert says in repr(verdict)


def test_flipped_knows_a_share_of_tokens():
    fine = torch.tensor([[[0, 1], [2, 3]]] * 2)
    swapped = fine.clone()
    swapped[0, 0] = torch.tensor([1, 0])
    assert "share of tokens" in repr(check_flipped(1 / 2, fine, swapped))
