"""The checkers of lesson 17: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from mixtral_lab.config import PRESETS
from mixtral_lab.exercises import check_low_rank, check_unnormalised, check_upcycled_size

DENSE = PRESETS["mistral-7b-v0.1"].config
MORE, ROUTER = DENSE.n_layers * DENSE.expert_parameters, DENSE.n_layers * 8 * DENSE.dim
STORED, ACTIVE = DENSE.parameters + 7 * MORE + ROUTER, DENSE.parameters + MORE + ROUTER


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        ((STORED, ACTIVE), True, "46.7 and 12.9 billion"),
        (None, None, "still None"),
        ((ACTIVE, STORED), False, "Stored first"),
        ((8 * DENSE.parameters, 2 * DENSE.parameters), False, "eight whole models"),
        ((STORED - ROUTER, ACTIVE - ROUTER), False, "routers are missing"),
        ((STORED + MORE, ACTIVE), False, "one of the 8"),
        ((STORED, ACTIVE - ROUTER), False, "whole router"),
        ((STORED, DENSE.parameters), False, "count 2 feed-forwards"),
        ((5e10, 1e10), False, "add what is new"),
        (7, False, "two numbers"),
        (("many", "few"), False, "two numbers"),
    ],
)
def test_upcycled_size(answer, solved, says):
    verdict = check_upcycled_size(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (0.8808, True, "starts damaged"),  # (e2 + e1) / (e2 + e1 + e0 + e-1), by hand
        (None, None, "still None"),
        (1.0, False, "Mixtral's order"),
        (0.1192, False, "losers"),
        (0.6439, False, "alone"),
        (1.1353, False, "inverse"),
        (0.5, False, "two largest"),
        ("most", False, "one number"),
    ],
)
def test_unnormalised(answer, solved, says):
    verdict = check_unnormalised(answer, [2.0, 0.0, 1.0, -1.0])
    assert verdict.solved is solved
    assert says in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda x, w, a, b: x @ w.T + x @ a.T @ b.T, True, "thin"),
        (lambda x, w, a, b: None, None, "still returns None"),
        (lambda x, w, a, b: x @ a.T @ b.T, False, "own product is missing"),
        (lambda x, w, a, b: x @ w.T, False, "parent alone"),
        (lambda x, w, a, b: x @ (w - b @ a).T, False, "added"),
        (lambda x, w, a, b: x @ w.T + F.silu(x @ a.T) @ b.T, False, "non-linearity"),
        (lambda x, w, a, b: x @ (w + b @ a).T, False, "as large as `weight`"),
        (lambda x, w, a, b: x @ w.T + x @ (b @ a).T, False, "as large as `weight`"),
        (lambda x, w, a, b: x.reshape(3, 6) @ w.T, False, "RuntimeError"),
        (lambda x, w, a, b: x @ a.T, False, "shape (3, 2)"),
        (lambda x, w, a, b: 3, False, "not 3"),
        (lambda x, w, a, b: w @ x, False, "RuntimeError"),
        (lambda x, w, a, b: 2 * (x @ w.T), False, "numbers are not"),
    ],
)
def test_low_rank(answer, solved, says):
    verdict = check_low_rank(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)
