"""Lesson 10, which expert said this?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixtral_lab.analysis.lens import Attribution
from mixtral_lab.exercises.verdict import Verdict, asked, checker


@checker
def check_opponent(answer: object, said: Attribution) -> Verdict:
    """The (layer, head) that took most from the score at the last position."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    last = said.heads[:, -1]
    layers, heads = last.shape
    try:
        layer, head = (int(number) for number in answer)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return Verdict(False, f"Answer with two whole numbers, (layer, head), not {answer!r}.")
    right = divmod(int(last.argmin()), heads)
    if (layer, head) == right:
        return Verdict(True, f"Head {head} of layer {layer} took {-last[right]:.2f} away.")
    if not (0 <= layer < layers and 0 <= head < heads):
        return Verdict(
            False, f"There are layers 0 to {layers - 1} and heads 0 to {heads - 1}, but not {(layer, head)}."
        )
    if (head, layer) == right:
        return Verdict(False, "The right numbers in the wrong order: the layer comes first.")
    if (layer, head) == divmod(int(last.argmax()), heads):
        return Verdict(False, f"That head gave most, {last[layer, head]:+.2f}: an opponent's number is negative.")
    if (layer, head) == divmod(int(abs(last).argmin()), heads):
        return Verdict(False, f"That head did least of all, {last[layer, head]:+.4f}: look for the most negative.")
    everywhere = said.heads.sum(1)
    if (layer, head) == divmod(int(everywhere.argmin()), heads):
        return Verdict(False, "That is the opponent over all positions together: take the last one alone.")
    if (layer, head) == divmod(int(said.heads[:, 0].argmin()), heads):
        return Verdict(False, "That is the opponent at the first position: the last one is row -1.")
    if layer == int(last.sum(1).argmin()):
        return Verdict(
            False, "The heads of that layer together took most; a single head elsewhere, or another in it, took more."
        )
    return Verdict(False, f"That head added {last[layer, head]:+.2f}; another is more negative.")


@checker
def check_expert_share(answer: object, said: Attribution) -> Verdict:
    """The share of all positions' scores together that experts added."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        got = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    total, experts = float(said.total.sum()), float(said.experts.sum())
    if _close(got, experts / total):
        return Verdict(True, f"{got:.0%}: the heads mostly carry, the experts mostly speak.")
    if _close(got, experts / total * 100):
        return Verdict(False, "That is the share in percent: give it as a part of 1.")
    if _close(got, float(said.experts[:, -1].sum() / said.total[-1])):
        return Verdict(False, "That is the last position alone: sum over all positions.")
    if _close(got, float((said.experts.sum((0, 2)) / said.total).mean())):
        return Verdict(False, "That is the mean of the positions' shares: sum the scores first, then divide once.")
    if _close(got, float(said.experts[:, :, 0].sum()) / total):
        return Verdict(False, "That is the first choices alone: the second ones are experts too.")
    if _close(got, float(said.heads.sum()) / total):
        return Verdict(False, "That is the heads' share.")
    if _close(got, 1 - experts / total):
        return Verdict(False, "That is what all other parts added: subtract it from 1.")
    if _close(got, float(abs(said.experts).sum()) / total):
        return Verdict(False, "You summed absolute values: what an expert takes away counts against it.")
    if _close(got, experts):
        return Verdict(False, "That is the sum of what experts added: divide it by the sum of the scores.")
    return Verdict(False, "Divide the sum of said.experts, over all its axes, by the sum of said.total.")


@checker
def check_contribution(answer: Callable[[Tensor, Tensor, Tensor, Tensor, int], object]) -> Verdict:
    """A function from a part, the final stream, the norm's weights, the words' table and a word to what the part adds."""
    draw = torch.Generator().manual_seed(0)
    for dim, word in ((8, 3), (5, 0)):
        part, stream, gain = (torch.randn(dim, generator=draw) + 0.5 for _ in range(3))
        rows = torch.randn(11, dim, generator=draw) + 0.3
        given = asked(answer, part.clone(), stream.clone(), gain.clone(), rows.clone(), word)
        if isinstance(given, Tensor) and given.numel() > 1:
            return Verdict(False, f"Return one number, not a tensor of shape {tuple(given.shape)}: a dot product sums.")
        got = float(given)
        row = rows[word] - rows.mean(0)
        size = _size(stream)
        if _close(got, float(part / size @ (gain * row))):
            continue
        for mistaken, says in (
            (part / _size(part) @ (gain * row), "You divided by the part's own size: take that of the whole stream."),
            (part / size @ row, "The norm's weights, `gain`, are missing."),
            (part / size @ (gain * rows[word]), "That is the word's logit: subtract the mean row for the score."),
            (part @ (gain * row), "The division by the stream's size is missing."),
            (
                stream / size @ (gain * row),
                "That is the whole stream's score: map `part`, divided by the stream's size.",
            ),
            (part / stream.square().mean() @ (gain * row), "You divided by the mean square: take its root."),
            (
                part / stream.norm() @ (gain * row),
                "You divided by the stream's length: the size is the root of the *mean* square.",
            ),
        ):
            if _close(got, float(mistaken)):
                return Verdict(False, says)
        expected = float(part / size @ (gain * row))
        return Verdict(False, f"With {dim} dimensions it should be {expected:.3f}, not {got:.3f}.")
    return Verdict(True, "One direction for all parts, so that their contributions add up.")


def _size(vector: Tensor) -> Tensor:
    return vector.square().mean().sqrt()


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)
