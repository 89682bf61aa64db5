"""Lesson 18, both ways: transformers and the lab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mixtral_lab.checkpoint import HUGGING_FACE, place_of
from mixtral_lab.exercises.verdict import Verdict, asked, checker, judged

OURS = (
    "layers.0.experts.ffn.0.gate.weight",
    "layers.3.experts.ffn.5.down.weight",
    "layers.12.experts.ffn.7.up.weight",
)


@checker
def check_our_name(answer: Callable[[str], object]) -> Verdict:
    """A function from the name of an expert's weight in a Mixtral checkpoint to our name for it."""
    for right in OURS:
        name = place_of(right, HUGGING_FACE).tensor
        got = asked(answer, name, case=f" for {name!r}")
        if not isinstance(got, str):
            return Verdict(False, f"Return a name, such as {right!r}, not {got!r}.")
        if got == right:
            continue
        if got.startswith("model."):
            return Verdict(False, "Our names do not begin with 'model.': the lab has nothing outside its model.")
        if _other_role(got, right):
            role = right.split(".")[-2]
            return Verdict(
                False, f"For {name!r} you chose another role than {role!r}: w1 is gate, w3 is up, w2 is down."
            )
        if _without_numbers(got) == _without_numbers(right):
            return Verdict(
                False, f"{name!r} became {got!r}: take layer and expert from the name, whatever their number of digits."
            )
        return Verdict(False, f"{name!r} became {got!r}, but it is {right!r}.")
    return Verdict(True, "Layer and expert keep their numbers; w1, w3 and w2 are gate, up and down.")


def _other_role(got: str, right: str) -> bool:
    return got.split(".")[:-2] == right.split(".")[:-2] and got.split(".")[-1:] == ["weight"]


def _without_numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if not part.isdigit()]


@checker
def check_fused_expert(answer: Callable[..., object]) -> Verdict:
    """A function `(x, gate_up_proj, down_proj, expert)`, as transformers stores experts, to that expert's answer."""
    draw = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(*shape, generator=draw) for shape in ((4, 6), (3, 10, 6), (3, 6, 5)))
    got = asked(answer, x.clone(), gate_up.clone(), down.clone(), 2)
    if not isinstance(got, torch.Tensor) or got.shape != x.shape:
        found = f"shape {tuple(got.shape)}" if isinstance(got, torch.Tensor) else f"{got!r}"
        return Verdict(False, f"The answer must be a tensor of the shape of x, {tuple(x.shape)}, not {found}.")
    first, second = gate_up[2].chunk(2)

    def expert(gate: Any, up: Any, of: int = 2, act: Any = F.silu) -> torch.Tensor:
        return (act(x @ gate.T) * (x @ up.T)) @ down[of].T

    mistakes = {
        "Gate and up are exchanged: the first half of the rows is the gate, and silu belongs to it.": expert(second, first),
        "You took every second row for the gate: it is the upper half, up the lower.": expert(gate_up[2, ::2], gate_up[2, 1::2]),
        "The gate goes through silu before it is multiplied with up.": expert(first, second, act=lambda it: it),
        "Silu belongs to the gate alone, not to the product.": F.silu((x @ first.T) * (x @ second.T)) @ down[2].T,
        "That is expert 0: the expert is the first axis of both tensors.": expert(gate_up[0, :5], gate_up[0, 5:], of=0),
        "Gate and up are of one expert, down is of another.": expert(first, second, of=0),
    }  # fmt: skip
    return judged(got.float(), expert(first, second), mistakes, "One slice of each tensor; its upper half is the gate.")


@checker
def check_shared_head(answer: Callable[[int, int, int], object]) -> Verdict:
    """A function `(query_head, n_heads, n_kv_heads)` to the key/value head that this query head looks at."""
    for n_heads, n_kv_heads in ((8, 4), (12, 3), (6, 6), (5, 1)):
        group = n_heads // n_kv_heads
        case = f" with {n_heads} and {n_kv_heads} heads"
        got = [asked(answer, head, n_heads, n_kv_heads, case=case) for head in range(n_heads)]
        for one in got:
            if getattr(one, "ndim", 0) or isinstance(one, (list, tuple)):
                return Verdict(False, f"Asked for one query head, return one number, not {one!r}.")
        right = [head // group for head in range(n_heads)]
        if got == right:
            continue
        where = f"With {n_heads} query heads and {n_kv_heads} key/value heads"
        if got == [head % n_kv_heads for head in range(n_heads)]:
            return Verdict(
                False, f"{where} that is the order (group kv), which runs and is wrong: kv is the outer axis."
            )
        if got == [head % group for head in range(n_heads)]:
            return Verdict(False, f"{where} that is the place inside the group; asked is which group.")
        if got == [head // n_kv_heads for head in range(n_heads)]:
            return Verdict(
                False, f"{where} you divided by the number of key/value heads; divide by how many share one."
            )
        if any(isinstance(head, float) for head in got):
            return Verdict(False, "A head has a whole number: divide with //.")
        return Verdict(False, f"{where} the query heads look at {right}, not at {got}.")
    return Verdict(True, "Neighbouring query heads share a key/value head: query head // group.")
