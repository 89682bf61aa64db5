"""Lesson 16, fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixtral_lab.config import PRESETS
from mixtral_lab.exercises.verdict import Verdict, asked, checker, judged


@checker
def check_adapter_numbers(answer: object) -> Verdict:
    """How many numbers an adapter of rank 8 on the attention of Mixtral 8x7B holds, in all of its layers."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        got = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    config, rank = PRESETS["mixtral-8x7b"].config, 8
    dim, keys = config.dim, config.n_kv_heads * config.head_dim
    layer = 2 * rank * (dim + dim) + 2 * rank * (dim + keys)
    right = config.n_layers * layer
    usual = {
        layer: f"That is one layer: there are {config.n_layers}.",
        config.n_layers * 4 * rank * (dim + dim): "Keys and values are narrower, 8 heads of 128: their B has fewer rows.",
        config.n_layers * (2 * dim * dim + 2 * dim * keys): "Those are the frozen matrices: an adapter holds A and B instead.",
        config.n_layers * rank * 4 * dim: "That counts every A; each has a B beside it.",
        2 * right: f"That is twice too much: is the rank {rank}?",
    }  # fmt: skip
    if math.isclose(got, right, rel_tol=1e-3):
        share = right / config.parameters
        return Verdict(True, f"{right:,} numbers, {share:.3%} of the model's {config.parameters / 1e9:.1f} billion.")
    for wrong, message in usual.items():
        if math.isclose(got, wrong, rel_tol=1e-3):
            return Verdict(False, message)
    return Verdict(False, "For each of four matrices, A holds rank x features_in numbers and B features_out x rank.")


@checker
def check_merge(answer: Callable[[Tensor, Tensor, Tensor, int], object]) -> Verdict:
    """A function from weight, A, B and alpha to the merged weight."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((6, 4), (2, 4), (6, 2)))
    before = weight.clone()
    got = asked(answer, weight, a, b, 8)
    if not isinstance(got, Tensor) or got.shape != weight.shape:
        found = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        return Verdict(False, f"Return a matrix of the weight's shape, (6, 4), not {found}.")
    if not torch.equal(weight, before):
        return Verdict(False, "You changed the weight that was handed to you: make a new matrix.")
    change = b @ a
    mistakes = {
        "The scale is missing: the change is multiplied by alpha / rank.": before + change,
        "You multiplied by alpha; the scale is alpha / rank, and the rank is the number of A's rows.": before + 8 * change,
        "You divided alpha by A's columns; the rank is the number of its rows.": before + 2 * change,
        "That is the change alone: add it to the weight.": 4 * change,
        "The weight is scaled too: scale the change, then add.": 4 * (before + change),
        "The change is taken away: add it.": before - 4 * change,
    }  # fmt: skip
    return judged(got, before + 4 * change, mistakes, "One matrix, as large as before, and no slower to use.")


@checker
def check_masked_loss(answer: Callable[[Tensor, Tensor], object]) -> Verdict:
    """A function from a loss for each token `batch seq` and what is learned `batch seq` to one number."""
    losses = torch.tensor([[4.0, 1.0, 2.0, 9.0], [8.0, 7.0, 6.0, 0.5]])
    learned = torch.tensor([[False, True, True, False], [False, False, False, True]])
    got = asked(answer, losses, learned)
    try:
        number = float(got)
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"Return one number, not {got!r}.")
    usual = {
        37.5 / 8: "That is the mean over all tokens: the question's are in it.",
        3.5 / 8: "You set the other losses to 0 and then took the mean of all 8: divide by the 3 learned tokens.",
        3.5: "That is the sum: divide it by the number of learned tokens.",
        1.0: "That is the mean of the rows' means: a short answer then weighs as much as a long one. Count tokens, not rows.",
        34 / 5: "That is the loss of what is not learned.",
    }
    if math.isclose(number, 3.5 / 3, abs_tol=1e-4):
        return Verdict(True, "Every learned token weighs the same, whatever stands around it.")
    for wrong, message in usual.items():
        if math.isclose(number, wrong, abs_tol=1e-4):
            return Verdict(False, message)
    return Verdict(False, f"Expected {3.5 / 3:.3f}, the mean of 1, 2 and 0.5, but this is {number:g}.")
