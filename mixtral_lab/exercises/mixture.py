"""Lesson 06, from one feed-forward network to eight experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_lab.config import PRESETS, Config
from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker, judged, said


@checker
def check_swiglu(answer: Callable[..., object]) -> Verdict:
    """A function from `x`, `gate`, `up` and `down` to `down(silu(gate x) * up x)`, for one token."""
    x, gate, up, down = (_random(seed, *shape) for seed, shape in enumerate(((4,), (6, 4), (6, 4), (4, 6))))
    lies = "Here dim is 4 and hidden 6: gate and up are (6, 4), so `gate @ x`; down is (4, 6)."
    got, stop = _tried(lambda: answer(x.clone(), gate.clone(), up.clone(), down.clone()), (4,))
    if stop is not None:
        return Verdict(stop.solved, f"{stop.message} {lies}") if stop.solved is False else stop
    opened, passed = gate @ x, up @ x
    mistakes = {
        "The silu stands on the wrong side: it belongs to the gate, not to up.": down @ (opened * F.silu(passed)),
        "You took the sigmoid of the gate; silu(z) is z times that.": down @ (opened.sigmoid() * passed),
        "You took a relu: silu bends softly, z times sigmoid(z).": down @ (opened.relu() * passed),
        "There is no bend: the gate must go through silu.": down @ (opened * passed),
        "You added the two: multiply them, place by place.": down @ (F.silu(opened) + passed),
        "`up` is missing: multiply the open gate by up @ x.": down @ F.silu(opened),
        "`gate` is missing: that is silu of up alone.": down @ F.silu(passed),
        "You took the silu of the product: take it of the gate alone, then multiply.": down @ F.silu(opened * passed),
    }
    return judged(got, down @ (F.silu(opened) * passed), mistakes, "The gate opens, up passes, down brings it back.")


@checker
def check_mixture(answer: Callable[..., object]) -> Verdict:
    """A function from `x`, `chosen`, `weights` and `experts` to their mixture, each expert run on its own rows alone."""
    x = _random(0, 5, 3)
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [1, 2]])  # of four experts; nobody wants the last
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.75, 0.25]])
    matrices, rows, calls = _random(1, 4, 3, 3), [0, 0, 0, 0], [0, 0, 0, 0]

    def expert(i: int) -> Callable[[Tensor], Tensor]:
        def run(given: Tensor) -> Tensor:
            rows[i] += given.numel() // 3
            calls[i] += 1
            return torch.tanh(given @ matrices[i])

        return run

    got, stop = _tried(
        lambda: answer(x.clone(), chosen.clone(), weights.clone(), [expert(i) for i in range(4)]), (5, 3)
    )
    if stop is not None:
        return stop
    answers = torch.stack([torch.tanh(x @ matrix) for matrix in matrices])  # expert token dim
    of_choice = answers[chosen, torch.arange(5)[:, None]]  # token choice dim
    right = (weights[..., None] * of_choice).sum(1)
    alone = torch.zeros_like(x)  # each expert in turn, the later over the earlier
    for token, pair in enumerate(chosen.tolist()):
        last = pair.index(max(pair))
        alone[token] = weights[token, last] * of_choice[token, last]
    inside = torch.tanh((weights[..., None] * x[:, None])[:, :, None] @ matrices[chosen])[:, :, 0]
    mistakes = {
        "An expert's answer overwrites what the ones before it said of the same token: add it (+=).": alone,
        "Each answer has the weight of the first choice: take weights[token, choice].": (
            weights[:, :1, None] * of_choice
        ).sum(1),
        "The weight went into the expert together with x: multiply the answer, not the question.": inside.sum(1),
        "The answers are added without their weights: multiply each by its own.": of_choice.sum(1),
        "The answers are averaged: their weights differ.": of_choice.mean(1),
        "Only the first choice is there: add the second with its weight.": weights[:, :1] * of_choice[:, 0],
        "The first choice alone, and without its weight: take all choices.": of_choice[:, 0],
        "Only the second choice is left: add to what is there (+=) and do not overwrite it.": weights[:, 1:]
        * of_choice[:, 1],
        "The weights are exchanged: weights[t, c] belongs to the expert chosen[t, c].": (
            weights.flip(1)[..., None] * of_choice
        ).sum(1),
    }
    verdict = judged(got, right, mistakes, "Each expert once, on the tokens that chose it, weighed and added.")
    wanted = [3, 3, 4, 0]
    if verdict.solved and rows != wanted:
        if min(rows[:3]) >= 5:
            return Verdict(
                False, "The numbers are right, but every expert read every row: give each only those that chose it."
            )
        return Verdict(False, f"The numbers are right, but the experts read {rows} rows; {wanted} chose them.")
    if verdict.solved and calls[3]:
        return Verdict(
            False, "The numbers are right, but nobody chose expert 3, and yet it was called: leave it alone."
        )
    if verdict.solved and max(calls) > 1:
        return Verdict(
            True,
            f"You called the experts {sum(calls)} times, with no row too many; 3 calls will do: each expert once, on all "
            "the rows that chose it.",
        )
    return verdict


@checker
def check_feed_forward_numbers(answer: Callable[[Config], object]) -> Verdict:
    """A function from a config to what all experts store, and what one token uses of it."""
    mixtral = PRESETS["mixtral-8x7b"].config
    for config in (mixtral, replace(mixtral, n_experts=16, n_choices=4)):
        one = 3 * config.dim * config.hidden * config.n_layers
        total, chosen = config.n_experts or 1, config.n_choices or 1
        given = asked(answer, config)
        try:
            stored, used = (float(number) for number in given)
        except Exception as error:
            return Verdict(False, f"Return two numbers, (stored, used) ({said(error)}).")
        if (stored, used) == (total * one, chosen * one):
            continue
        if (stored, used) == (chosen * one, total * one):
            return Verdict(False, "The right numbers in the wrong order: first what is stored.")
        if stored * config.n_layers == total * one:
            return Verdict(False, f"That is one layer: there are {config.n_layers}.")
        if stored * 3 == total * one:
            return Verdict(False, "You counted one matrix for each expert: there are three, gate, up and down.")
        if stored * 3 == total * one * 2:
            return Verdict(False, "You counted two matrices for each expert: SwiGLU has three, gate, up and down.")
        if stored == total * one + config.n_layers * total * config.dim:
            return Verdict(False, "You counted the router too: count the experts alone.")
        if (stored, used) == (config.parameters, config.active_parameters):
            return Verdict(False, "That is the whole model: count the experts alone, without attention and embeddings.")
        if stored == total * one and used == one:
            return Verdict(False, f"What is stored is right; but a token uses {chosen} experts in each layer, not one.")
        if stored == total * one and used == stored:
            return Verdict(False, f"What is stored is right; but a token uses only {chosen} of {total} experts.")
        if (stored, used) == (8 * one, 2 * one):
            return Verdict(
                False, f"With {total} experts and {chosen} choices it is wrong: are 8 and 2 written into your code?"
            )
        if stored == total * one:
            return Verdict(False, f"What is stored is right; a token uses {chosen * one:,}, not {used:,.0f}.")
        return Verdict(False, f"For {total} experts it should be {total * one:,} stored, not {stored:,.0f}.")
    return Verdict(True, "Memory goes with the experts there are, work with the experts that are chosen.")


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tried(run: Callable[[], object], shape: tuple[int, ...]) -> tuple[Tensor, Verdict | None]:
    """What an answer gives, as a tensor of the right shape, or the verdict that ends it."""
    nothing = torch.empty(0)
    try:
        got = torch.as_tensor(asked(run), dtype=torch.float32).detach()
    except Over as over:
        return nothing, over.verdict
    if tuple(got.shape) != shape:
        return nothing, Verdict(False, f"The result must have the shape {shape}, but has {tuple(got.shape)}.")
    return got, None
