"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import pytest
import torch

from mixtral_lab.exercises import check_adapter_numbers, check_masked_loss, check_merge

LAYER = 2 * 8 * (4096 + 4096) + 2 * 8 * (4096 + 1024)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (32 * LAYER, True, "6,815,744 numbers, 0.015%"),
        (None, None, "still None"),
        (LAYER, False, "one layer"),
        (32 * 4 * 8 * 8192, False, "narrower"),
        (32 * (2 * 4096**2 + 2 * 4096 * 1024), False, "frozen"),
        (32 * 8 * 4 * 4096, False, "every A"),
        (64 * LAYER, False, "twice"),
        (12, False, "rank x features_in"),
        ("many", False, "one number"),
    ],
)
def test_adapter_numbers(answer, solved, says):
    verdict = check_adapter_numbers(answer)
    assert verdict.solved is solved and says in repr(verdict)


def in_place(weight, a, b, alpha):
    weight += alpha / len(a) * b @ a
    return weight


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda w, a, b, alpha: w + alpha / len(a) * b @ a, True, "no slower"),
        (lambda w, a, b, alpha: None, None, "still returns None"),
        (lambda w, a, b, alpha: w + b @ a, False, "scale is missing"),
        (lambda w, a, b, alpha: w + alpha * b @ a, False, "multiplied by alpha"),
        (lambda w, a, b, alpha: w + alpha / a.shape[1] * b @ a, False, "A's columns"),
        (lambda w, a, b, alpha: alpha / len(a) * b @ a, False, "change alone"),
        (lambda w, a, b, alpha: alpha / len(a) * (w + b @ a), False, "scaled too"),
        (lambda w, a, b, alpha: w - alpha / len(a) * b @ a, False, "taken away"),
        (in_place, False, "handed to you"),
        (lambda w, a, b, alpha: a, False, "not (2, 4)"),
        (lambda w, a, b, alpha: 3, False, "not int"),
        (lambda w, a, b, alpha: w + a @ b, False, "RuntimeError"),
        (lambda w, a, b, alpha: w * 0, False, "numbers are not"),
    ],
)
def test_merge(answer, solved, says):
    verdict = check_merge(answer)
    assert verdict.solved is solved and says in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda losses, learned: losses[learned].mean(), True, "weighs the same"),
        (lambda losses, learned: None, None, "still returns None"),
        (lambda losses, learned: losses.mean(), False, "question's"),
        (lambda losses, learned: (losses * learned).mean(), False, "divide by the 3"),
        (lambda losses, learned: losses[learned].sum(), False, "sum"),
        (lambda losses, learned: ((losses * learned).sum(1) / learned.sum(1)).mean(), False, "rows' means"),
        (lambda losses, learned: losses[~learned].mean(), False, "not learned"),
        (lambda losses, learned: torch.tensor(77.0), False, "Expected 1.167"),
        (lambda losses, learned: losses, False, "one number"),
        (lambda losses, learned: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_masked_loss(answer, solved, says):
    verdict = check_masked_loss(answer)
    assert verdict.solved is solved and says in repr(verdict)
