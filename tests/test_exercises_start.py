"""Checkers of lesson 00: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import pytest
import torch

from mixtral_lab.exercises import check_decisions, check_first_choice
from mixtral_lab.trace import Trace

# layer seq choice, of eight experts; asked about layer 1, position 2
EXPERTS = torch.tensor(
    [
        [[0, 1], [1, 0], [2, 0], [3, 0], [5, 1]],
        [[4, 0], [5, 0], [6, 7], [1, 0], [2, 3]],
        [[0, 2], [3, 0], [0, 1], [0, 1], [4, 6]],
    ]
)


@pytest.fixture
def trace():
    weights = torch.tensor([0.75, 0.25]).expand(3, 5, 2)
    logits = torch.zeros(3, 5, 8).scatter(-1, EXPERTS, torch.tensor([2.0, 1.0]).expand(3, 5, 2))
    return Trace.from_arrays("abcde", EXPERTS, weights, logits, n_prompt=3)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (6, True, "expert 7 helps"),
        (torch.tensor(6), True, "Expert 6"),
        (None, None, "still None"),
        (7, False, "later choice"),
        (2, False, "the layer before"),
        (5, False, "the token before"),
        (1, False, "the token after"),
        (3, False, "exchanged"),
        (EXPERTS[1, 2], False, "That is a list"),
        (0.75, False, "did you take the weights"),
        ("six", False, "one number"),
        (4, False, "in this order"),
    ],
)
def test_first_choice(trace, answer, solved, says):
    verdict = check_first_choice(answer, trace, layer=1, position=2)
    assert verdict.solved is solved
    assert says in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (30, True, "3 layers × 5 tokens × 2 choices"),
        (None, None, "still None"),
        (15, False, "not one"),
        (10, False, "one layer"),
        (5, False, "how many tokens"),
        (120, False, "all 8 experts"),
        (18, False, "the prompt alone"),
        (12, False, "the model wrote alone"),
        (24, False, "<s>"),
        (float("nan"), False, "not nan"),
        (31, False, "multiply"),
        ([30], False, "one number"),
    ],
)
def test_decisions(trace, answer, solved, says):
    verdict = check_decisions(answer, trace)
    assert verdict.solved is solved
    assert says in repr(verdict)
