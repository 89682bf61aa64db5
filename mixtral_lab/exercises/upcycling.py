"""Lesson 17, a dense model becomes a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixtral_lab.config import PRESETS
from mixtral_lab.exercises.verdict import Verdict, asked, checker, judged


@checker
def check_upcycled_size(answer: object) -> Verdict:
    """(stored, active): Mistral 7B v0.1 with 8 copies of every feed-forward, 2 for each token, in whole numbers."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        stored, active = (float(x) for x in answer)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return Verdict(False, f"Give two numbers, (stored, active), not {answer!r}.")
    dense, mixture = PRESETS["mistral-7b-v0.1"].config, PRESETS["mixtral-8x7b"].config
    router = mixture.dim * 8 * mixture.n_layers
    if (stored, active) == (mixture.parameters, mixture.active_parameters):
        return Verdict(
            True, f"{stored / 1e9:.1f} and {active / 1e9:.1f} billion: to the last number, the size of Mixtral 8x7B."
        )
    if (stored, active) == (active, stored) or stored < active:
        return Verdict(False, "Stored first, then active: a token cannot be multiplied with more than is stored.")
    if stored == 8 * dense.parameters:
        return Verdict(False, "That is eight whole models, but only feed-forwards are copied; attention is there once.")
    if math.isclose(stored, mixture.parameters - router):
        return Verdict(False, "The routers are missing: 8 rows of `dim` numbers in every layer.")
    if stored == mixture.parameters + dense.n_layers * dense.expert_parameters:
        return Verdict(False, "You kept the parent's feed-forward beside its 8 copies: it is one of the 8.")
    if math.isclose(stored, mixture.parameters) and math.isclose(active, mixture.active_parameters - router):
        return Verdict(False, "Stored is right. Every token is multiplied with the whole router, so it is active, too.")
    if math.isclose(stored, mixture.parameters):
        return Verdict(False, "Stored is right; for the active ones count 2 feed-forwards in every layer.")
    return Verdict(
        False,
        f"Start from the parent's {dense.parameters:,} and add what is new in each of its {dense.n_layers} layers.",
    )


@checker
def check_unnormalised(answer: object, logits: list[float]) -> Verdict:
    """The factor by which copies answer too small if softmax comes before top-2 and nothing is shared out again."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        got = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0).sort(descending=True).values
    right = probabilities[:2].sum().item()
    if math.isclose(got, right, abs_tol=2e-3):
        return Verdict(True, "The copies' answers sum to that share of the parent's, so the model starts damaged.")
    if math.isclose(got, 1.0, abs_tol=2e-3):
        return Verdict(False, "With Mixtral's order it is 1. Here softmax runs over all experts before two are kept.")
    if math.isclose(got, 1 - right, abs_tol=2e-3):
        return Verdict(False, "That is the part which is lost with the losers; the factor is what is left.")
    if math.isclose(got, probabilities[0].item(), abs_tol=2e-3):
        return Verdict(False, "That is the best expert's share alone: two are kept.")
    if math.isclose(got, 1 / right, abs_tol=2e-3):
        return Verdict(False, "That is what one would have to multiply with to repair it: take the inverse.")
    return Verdict(False, "Take the softmax over all the logits, and sum the two largest shares.")


@checker
def check_low_rank(answer: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> Verdict:
    """A function of x, weight, into, out that gives `(weight + out @ into) x` for rows x, without the sum matrix."""
    generator = torch.Generator().manual_seed(0)
    x, weight, into, out = (torch.randn(*s, generator=generator) for s in ((3, 6), (5, 6), (2, 6), (5, 2)))
    got = asked(answer, x, weight, into, out)
    with FlopCounterMode(display=False) as counter:  # of one row: the thin products are 52, the sum matrix 90
        asked(answer, x[:1], weight, into, out, case=" with a single row")
    if not isinstance(got, Tensor) or got.shape != (3, 5):
        found = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else f"{got!r}"
        return Verdict(False, f"For 3 rows of 6 numbers and a weight of 5 x 6, return 3 rows of 5, not {found}.")
    plain, narrow = x @ weight.T, x @ into.T @ out.T
    if torch.allclose(got, plain + narrow, atol=1e-4) and counter.get_total_flops() > 2 * 52:
        return Verdict(
            False,
            "The numbers are right, but `out @ into` is a matrix as large as `weight`: multiply `x` with `into` first, and "
            "what comes of it with `out`.",
        )
    return judged(
        got,
        plain + narrow,
        {
            "The parent's own product is missing: the change comes on top of it.": narrow,
            "That is the parent alone: add what `into` and `out` contribute.": plain,
            "The change must be added, not taken away.": plain - narrow,
            "No non-linearity belongs between `into` and `out`: their product stands for one matrix.": plain
            + F.silu(x @ into.T) @ out.T,
        },
        "Two thin products instead of a second matrix.",
    )
