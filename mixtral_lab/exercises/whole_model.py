"""Lesson 07, the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixtral_lab.config import PRESETS, Config
from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker, judged, said
from mixtral_lab.lab import Lab

WRONG_LAYER = 4  # of the model that `miswired` makes
PARTS = ("attention", "experts")


@checker
def check_rms_norm(answer: Callable[[Tensor, Tensor, float], object]) -> Verdict:
    """A function from `x` (`seq dim`), `weight` (`dim`) and `eps` to every row scaled to a root mean square of 1, times weight."""
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0], [0.1, 0.2, 0.0, -0.3], [5.0, 5.0, 5.0, 6.0]])
    weight, eps = torch.tensor([1.0, 0.5, 2.0, -1.0]), 0.25
    try:
        given = asked(answer, x.clone(), weight.clone(), eps)
    except Over as over:
        if "must match the size" not in over.verdict.message:
            raise
        return Verdict(
            False,
            f"{over.verdict.message} The usual slip is a mean without `keepdim=True`: it has shape (seq,), and only (seq, 1) "
            "can divide the rows it comes from.",
        )
    got = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
    if got.shape != x.shape:
        return Verdict(False, f"The result must have x's shape, {tuple(x.shape)}, but has {tuple(got.shape)}.")
    squares = x.square().mean(-1, keepdim=True)
    right = x / (squares + eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    mistakes = {
        "`weight` is missing: multiply each of the dim numbers by its own.": x / (squares + eps).sqrt(),
        "`eps` is missing: add it to the mean of the squares, before the root.": x / squares.sqrt() * weight,
        "`eps` is an argument here: do not write 1e-5 into your code.": x / (squares + 1e-5).sqrt() * weight,
        "`var` takes the mean away first: RMSNorm needs the mean of the squares themselves.": x
        / (x.var(-1, keepdim=True) + eps).sqrt()
        * weight,
        "`eps` stands outside the root: add it to the mean of the squares, then take the root.": x
        / (squares.sqrt() + eps)
        * weight,
        "You did not take the root: divide by the root of the mean square.": x / (squares + eps) * weight,
        "You summed the squares: take their mean.": x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight,
        "You took the mean away first: that is LayerNorm. RMSNorm leaves the mean alone.": centred
        / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        * weight,
        "You took the mean over the tokens: every token is scaled by itself, over its own dim (-1).": x
        / (x.square().mean(0, keepdim=True) + eps).sqrt()
        * weight,
        "You took one mean over everything: every token has its own (dim=-1, keepdim=True).": x
        / (x.square().mean() + eps).sqrt()
        * weight,
        "You multiplied by the root: divide by it.": x * (squares + eps).sqrt() * weight,
    }
    return judged(got, right, mistakes, "Every token has the same size now, and the weight says which numbers count.")


def miswired(lab: Lab) -> Lab:
    """A model on the same weights in which one part of one layer is wrong, as if a line that loads weights had a slip."""
    model = copy.deepcopy(lab.model, {id(weight): weight for weight in lab.model.parameters()})
    for expert in model.blocks[WRONG_LAYER].experts.swiglus:
        expert.gate, expert.up = expert.up, expert.gate
    return Lab(model, lab.tokenizer, "miswired")


@checker
def check_wrong_part(answer: object) -> Verdict:
    """Which layer of `miswired`'s model is wrong, and which part of it: `(layer, "attention" or "experts")`."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return Verdict(False, f'Give a layer and a part, such as (0, "attention"), not {answer!r}.')
    given: Any = answer[0]
    try:
        layer = int(given)
    except (TypeError, ValueError):
        return Verdict(False, f"The layer must be a number, 0 to 7, not {answer[0]!r}.")
    if answer[1] not in PARTS:
        return Verdict(False, f"The part is either 'attention' or 'experts', not {answer[1]!r}.")
    right = PARTS[1]
    if (layer, answer[1]) == (WRONG_LAYER, right):
        return Verdict(True, "In all experts of this layer, gate and up were exchanged: w1 and w3, an easy slip.")
    if layer == WRONG_LAYER:
        return Verdict(False, "The layer is right. But is its residual.between still the same in both models?")
    if layer == WRONG_LAYER + 1 and answer[1] == "attention":
        return Verdict(False, "One step late: this layer was already given a wrong stream (its residual.before).")
    if not 0 <= layer <= 7:
        return Verdict(False, f"There is no layer {layer}: they are 0 to 7.")
    if layer > WRONG_LAYER:
        return Verdict(
            False,
            "That layer differs, but an earlier one does too: look for the first, not for the largest difference.",
        )
    return Verdict(False, f"What layer {layer} leaves in the stream is the same in both models: look further on.")


@checker
def check_gigabytes_and_speed(answer: Callable[[Config, int, float], object]) -> Verdict:
    """A function from a config, bits per number and GB/s to the weights' GB and the most tokens per second."""
    mixtral, dense = (PRESETS[name].config for name in ("mixtral-8x7b", "mistral-7b-v0.1"))
    for config, bits, bandwidth in ((mixtral, 16, 1000.0), (mixtral, 4, 100.0), (dense, 16, 1000.0)):
        stored, active = config.parameters * bits / 8 / 1e9, config.active_parameters * bits / 8 / 1e9
        given = asked(answer, config, bits, bandwidth)
        try:
            size, speed = (float(number) for number in given)
        except Exception as error:
            return Verdict(False, f"Return two numbers, (gigabytes, tokens per second) ({said(error)}).")
        if _near(size, stored) and _near(speed, bandwidth / active):
            continue
        if _near(speed, stored) and _near(size, bandwidth / active):
            return Verdict(False, "The right numbers in the wrong order: first the gigabytes.")
        if _near(size, 8 * stored):
            return Verdict(False, "Those are gigabits: eight bits are a byte.")
        if _near(size, stored * 1e9):
            return Verdict(False, "Those are bytes: divide by 1e9 for gigabytes.")
        if _near(size, stored * 1e9 / 2**30):
            return Verdict(False, "You divided by 2**30: a gigabyte (GB) is 1e9 bytes, as in the table above.")
        if bits != 16 and _near(size, 4 * stored):
            return Verdict(False, f"With {bits} bits it is wrong: are 2 bytes per number written into your code?")
        if _near(size, active) and not _near(stored, active):
            return Verdict(False, "You counted the active parameters as memory: all experts must be at hand.")
        if not _near(size, stored):
            return Verdict(
                False, f"{config.parameters:,} numbers of {bits} bits are {stored:,.1f} GB, not {size:,.1f}."
            )
        if _near(speed, bandwidth / stored):
            return Verdict(False, "The memory is right. But a token reads only the active parameters, not all.")
        if _near(speed, active / bandwidth):
            return Verdict(False, "That is seconds per token: turn it over.")
        if _near(speed, bandwidth / (config.active_parameters / 1e9)):
            return Verdict(
                False, "The memory is right. The speed divides by the bytes that a token reads, not by numbers."
            )
        return Verdict(
            False,
            f"The memory is right. A token reads {active:,.1f} GB, and {bandwidth:,.0f} GB come each second: "
            f"that is not {speed:,.1f} tokens per second.",
        )
    return Verdict(True, "What is stored must fit, what is active must be read: memory by the one, speed by the other.")


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * abs(b)
