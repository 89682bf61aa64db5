"""Lesson 00, start here: two warm-ups."""

from __future__ import annotations

import math
from typing import Any

from mixtral_lab.exercises.verdict import Verdict, checker
from mixtral_lab.trace import Trace


@checker
def check_first_choice(answer: object, trace: Trace, layer: int, position: int) -> Verdict:
    """The expert that reads one token of a trace with the largest weight, in one layer."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        given: Any = answer.tolist() if hasattr(answer, "tolist") else answer
        if isinstance(given, (list, tuple)):
            return Verdict(False, f"That is a list, {list(given)}: give one number, the first of the choices.")
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    experts = trace.routing.experts
    layers, seq, _ = experts.shape
    right, *others = experts[layer, position].tolist()
    token = trace.tokens[position]
    if number == right:
        return Verdict(True, f"Expert {right} reads {token!r} in layer {layer}, and expert {others[0]} helps.")
    if number != int(number):
        return Verdict(False, f"{number:g} is no expert's number: did you take the weights? Look in routing.experts.")
    if number in others:
        return Verdict(False, "That is a later choice of this token: the best stands first, at 0.")
    if layer and number == experts[layer - 1, position, 0]:
        return Verdict(False, f"That is the layer before: layers are counted from 0, so layer {layer} is at {layer}.")
    if position and number == experts[layer, position - 1, 0]:
        return Verdict(
            False, f"That is the token before, {trace.tokens[position - 1]!r}: positions are counted from 0."
        )
    if position + 1 < seq and number == experts[layer, position + 1, 0]:
        return Verdict(False, f"That is the token after, {trace.tokens[position + 1]!r}.")
    if position < layers and layer < seq and number == experts[position, layer, 0]:
        return Verdict(False, "Layer and position are exchanged: the layer comes first.")
    return Verdict(False, f"Not that one: look at layer {layer}, position {position}, choice 0, in this order.")


@checker
def check_decisions(answer: object, trace: Trace) -> Verdict:
    """How often an expert was asked while a text was read and written: in all layers, all choices counted."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        given: Any = answer
        number = float(given)
    except (TypeError, ValueError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    layers, seq, choices = trace.routing.experts.shape
    n_experts = trace.routing.logits.shape[-1]
    mistakes: dict[float, str] = {
        layers * seq: f"Each token asks {choices} experts in every layer, not one.",
        seq * choices: f"That is one layer: there are {layers}.",
        seq: f"That is how many tokens there are; each asks {choices} experts in each of {layers} layers.",
        layers * seq * n_experts: f"That counts all {n_experts} experts: only {choices} are asked for each token.",
        layers * trace.n_prompt * choices: "That is the prompt alone: the tokens that the model wrote are read too.",
        layers * (seq - trace.n_prompt) * choices: "That is what the model wrote alone: the prompt was read too.",
        layers * (seq - 1) * choices: "One token is missing: `<s>`, the beginning of the text, is read like any other.",
    }
    right = layers * seq * choices
    if number == right:
        return Verdict(True, f"{layers} layers × {seq} tokens × {choices} choices, and all {right:,} are in the trace.")
    if number in mistakes:
        return Verdict(False, mistakes[number])
    return Verdict(False, f"It is not {number:g}: multiply the layers, the tokens and the choices of each token.")
