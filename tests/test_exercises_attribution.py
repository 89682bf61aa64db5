"""Checkers of lesson 10: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_lab.analysis.lens import Attribution
from mixtral_lab.exercises import check_contribution, check_expert_share, check_opponent

HEADS = np.zeros((3, 2, 4))  # layer seq head
HEADS[:, -1] = [[0.5, -0.2, 0.3, 0.1], [0.9, 0.4, -0.8, 0.6], [-0.5, -0.4, 0.02, -0.3]]
HEADS[0, 0] = [0.1, -0.7, -0.2, 0.2]
HEADS[2, 0] = [0.1, 0.1, 0.1, -1.1]
EXPERTS = np.array([[[1.0, 0.2], [2.0, -0.3]], [[0.5, 0.1], [3.0, 0.4]], [[0.7, 0.0], [0.2, 0.6]]])
SAID = Attribution(
    targets=np.array([5, 6]),
    embed=np.array([0.4, 0.3]),
    heads=HEADS,
    experts=EXPERTS,
    chosen=np.zeros((3, 2, 2), np.int64),
    rounding=np.zeros(2),
)
TOTAL = SAID.total.sum()


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        ((1, 2), True, "took 0.80"),
        (np.array([1, 2]), True, "Head 2 of layer 1"),
        (None, None, "still None"),
        ((2, 1), False, "wrong order"),
        ((1, 0), False, "gave most"),
        ((2, 2), False, "did least"),
        ((2, 3), False, "all positions together"),
        ((2, 0), False, "together took most"),
        ((0, 1), False, "added -0.20"),
        ((7, 9), False, "layers 0 to 2"),
        (5, False, "two whole numbers"),
        ("ab", False, "two whole numbers"),
        ((1, 2, 3), False, "two whole numbers"),
    ],
)
def test_opponent(answer, solved, says):
    verdict = check_opponent(answer, SAID)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)


def test_opponent_at_the_first_position():
    heads = HEADS.copy()
    heads[2, 0, 3], heads[0, 0, 3] = 0.9, -0.75
    heads[0, 1, 3] = 0.7
    assert "first position" in check_opponent((0, 3), SAID._replace(heads=heads)).message


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (EXPERTS.sum() / TOTAL, True, "experts mostly speak"),
        (None, None, "still None"),
        (100 * EXPERTS.sum() / TOTAL, False, "percent"),
        (EXPERTS[:, -1].sum() / SAID.total[-1], False, "last position alone"),
        ((EXPERTS.sum((0, 2)) / SAID.total).mean(), False, "sum the scores first"),
        (EXPERTS[:, :, 0].sum() / TOTAL, False, "first choices alone"),
        (HEADS.sum() / TOTAL, False, "heads' share"),
        (1 - EXPERTS.sum() / TOTAL, False, "all other parts"),
        (abs(EXPERTS).sum() / TOTAL, False, "absolute values"),
        (EXPERTS.sum(), False, "divide it by"),
        (0.123, False, "over all its axes"),
        ("most", False, "one number"),
        (EXPERTS, False, "one number"),
    ],
)
def test_expert_share(answer, solved, says):
    verdict = check_expert_share(answer, SAID)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)


def size(vector):
    return vector.square().mean().sqrt()


def centred(rows, word):
    return rows[word] - rows.mean(0)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda p, s, g, r, w: p / size(s) @ (g * centred(r, w)), True, "add up"),
        (lambda p, s, g, r, w: ((p / size(s) * g) @ r.T - ((p / size(s) * g) @ r.T).mean())[w], True, "add up"),
        (lambda p, s, g, r, w: None, None, "still returns None"),
        (lambda p, s, g, r, w: p / size(p) @ (g * centred(r, w)), False, "own size"),
        (lambda p, s, g, r, w: p / size(s) @ centred(r, w), False, "`gain`, are missing"),
        (lambda p, s, g, r, w: p / size(s) @ (g * r[w]), False, "word's logit"),
        (lambda p, s, g, r, w: p @ (g * centred(r, w)), False, "size is missing"),
        (lambda p, s, g, r, w: s / size(s) @ (g * centred(r, w)), False, "whole stream"),
        (lambda p, s, g, r, w: p / s.square().mean() @ (g * centred(r, w)), False, "take its root"),
        (lambda p, s, g, r, w: p / s.norm() @ (g * centred(r, w)), False, "*mean* square"),
        (lambda p, s, g, r, w: p / size(s) * (g * centred(r, w)), False, "a dot product sums"),
        (lambda p, s, g, r, w: 17.0, False, "8 dimensions"),
        (lambda p, s, g, r, w: p @ r, False, "RuntimeError"),
        (lambda p, s, g, r, w: "much", False, "ValueError"),
    ],
)
def test_contribution(answer, solved, says):
    verdict = check_contribution(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)
