"""Lesson 03, rotary positions and grouped queries."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import einsum
from torch import Tensor

from mixtral_lab.config import Config
from mixtral_lab.exercises.verdict import Verdict, asked, checker, said
from mixtral_lab.model.rope import rotate, rotation

HEAD, POSITION, THETA = [1.0, 0.5, -2.0, 0.25, 0.0, 3.0], 3, 1000.0


@checker
def check_rotate_by_hand(answer: Callable[[list[float], int, float], object]) -> Verdict:
    """A function from a head's numbers, a position and theta to the numbers after rotation."""
    got = asked(answer, list(HEAD), POSITION, THETA)
    try:
        numbers = torch.as_tensor(got, dtype=torch.float32).flatten().tolist()
    except Exception as error:
        return Verdict(False, f"Return a list of numbers, as many as you were given ({said(error)}).")
    if len(numbers) != len(HEAD):
        return Verdict(False, f"A head of {len(HEAD)} numbers stays one of {len(HEAD)}, but you return {len(numbers)}.")
    half, size = len(HEAD) // 2, len(HEAD)
    right = _rotated(HEAD, POSITION, THETA)
    pairs_together = [x for i in range(half) for x in (right[i], right[i + half])]
    split = [(i, i + half) for i in range(half)]
    speeds = [THETA ** (-2 * i / size) for i in range(half)]
    usual = [
        (HEAD, "Nothing was turned."),
        (_turned(split, [-speed for speed in speeds]), "You turned the wrong way: x cos - y sin, and x sin + y cos."),
        (_turned([(i, i + 1) for i in range(0, size, 2)], speeds), "You paired neighbours: number i goes with number i + half."),
        (_turned(split, [math.radians(speed) for speed in speeds]), "You took the angle in degrees: it is in radians."),
        (_turned(split, [THETA ** (-i / size) for i in range(half)]), "The exponent is -2 i / head_dim: the 2 is missing."),
        (_turned(split, [THETA ** (2 * i / size) for i in range(half)]), "The exponent is negative: later pairs turn more slowly."),
        (_turned(split, [1.0] * half), "All pairs turn equally fast: divide the position by theta ** (2 i / head_dim)."),
        (_turned(split, [speed / POSITION for speed in speeds]), "The position is missing from the angle."),
        (_turned(split, [THETA ** (-2 * i / half) for i in range(half)]), "head_dim is the whole head, not half of it."),
        (_overwritten(), "You changed head[i] before you used it for number i + half: keep the old pair, or fill a copy."),
        (pairs_together, "All numbers are right, but pair i belongs to the places i and i + half."),
    ]  # fmt: skip
    if _close(numbers, right):
        short = asked(answer, [1.0, 1.0], 7, 10.0, case=" with a head of two numbers", later=True)
        other = torch.as_tensor(short, dtype=torch.float32).flatten().tolist()
        if not _close(other, _rotated([1.0, 1.0], 7, 10.0)):
            return Verdict(
                False, "With a head of 2 numbers it is wrong: are a size, position or theta written into it?"
            )
        return Verdict(True, "Each pair by its own angle, and no length has changed.")
    for wrong, message in usual:
        if _close(numbers, wrong):
            return Verdict(False, message)
    near = [i for i, (a, b) in enumerate(zip(numbers, right, strict=True)) if math.isclose(a, b, abs_tol=1e-3)]
    which = f"Numbers {near} are right, the others are not." if near else "No number is right yet."
    case = f"For {HEAD} at position {POSITION} with theta {THETA:g} it should be"
    return Verdict(False, f"{which} {case} about {[round(x, 2) for x in right]}.")


@checker
def check_grouped_scores(answer: Callable[[Tensor, Tensor], object]) -> Verdict:
    """A function from queries `kv group query head_dim` and keys `kv key head_dim` to scores `kv group query key`."""
    random = torch.Generator().manual_seed(0)
    kv, group, queries, keys, size = 2, 3, 4, 5, 6
    query = torch.randn(kv, group, queries, size, generator=random)
    key = torch.randn(kv, keys, size, generator=random)
    got = asked(answer, query.clone(), key.clone())
    if not isinstance(got, Tensor):
        return Verdict(False, f"Return a tensor, not a {type(got).__name__}.")
    shape = tuple(got.shape)
    if shape == (kv, group, keys, queries):
        return Verdict(False, "Queries and keys have changed places: the last axis must be the key.")
    if shape == (kv, queries, keys):
        return Verdict(False, "You summed over the heads of a group: `group` must stand in the result.")
    if shape == (kv * group, queries, keys):
        return Verdict(False, "The heads are in one row: keep kv and group apart.")
    if shape != (kv, group, queries, keys):
        return Verdict(
            False, f"The shape is {shape}, but kv group query key are {(kv, group, queries, keys)} in this test."
        )
    products = einsum(query, key, "kv group q size, kv k size -> kv group q k")
    in_a_row = torch.stack([query.flatten(0, 1)[h] @ key[h % kv].T for h in range(kv * group)])
    usual = [
        (products, "Divide by the square root of head_dim: without it scores grow with the size of a head."),
        (products / size, "You divided by head_dim: it is the square root of it."),
        (products * size**0.5, "You multiplied by the square root of head_dim: divide."),
        ((products / size**0.5).softmax(-1), "Those are shares after a softmax: the scores come before."),
        (in_a_row.view_as(products) / size**0.5, "Heads meet the wrong keys: group by group, kv outermost."),
        (einsum(query, key[0], "kv group q size, k size -> kv group q k") / size**0.5, "All heads look at the keys of kv head 0."),
    ]  # fmt: skip
    got = got.detach().float().cpu()
    if torch.allclose(got, products / size**0.5, atol=1e-4):
        return Verdict(True, "Each query head meets the keys of its group: `group` is an axis that keys simply lack.")
    for wrong, message in usual:
        if torch.allclose(got, wrong, atol=1e-4):
            return Verdict(False, message)
    if torch.allclose(got * (products[0, 0, 0, 0] / got[0, 0, 0, 0]), products, atol=1e-4):
        return Verdict(
            False, f"Divide by the square root of head_dim, which is {size} here: it is the last axis of query."
        )
    if bool((got.flatten(2) == 0).any() or got.isinf().any()):
        return Verdict(False, "Some scores are 0 or infinite: no mask here, what comes later is hidden afterwards.")
    return Verdict(False, "The shape is right, the numbers are not: multiply along head_dim, sum, divide by its root.")


@checker
def check_kept_bytes(answer: object, config: Config, seq: int) -> Verdict:
    """The bytes of keys and values for one text of `seq` tokens, two bytes a number."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        got = float(answer)  # type: ignore[arg-type]
    except Exception:  # whatever an answer may be
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    right = config.cache_bytes(seq)
    usual = [
        (right, True, f"{right / 2**30:.1f} GiB; with one kv head per query head it would be {right * config.group / 2**30:.1f}."),
        (right / 2, False, "That is half of it: keys and values are both kept, and each number has two bytes."),
        (right / 4, False, "That is a quarter of it: keys and values are both kept, and each number has two bytes."),
        (right * config.group, False, f"You counted {config.n_heads} heads: only the {config.n_kv_heads} kv heads are kept."),
        (right / config.n_layers, False, f"That is one layer: each of the {config.n_layers} layers keeps its own."),
        (right / seq, False, f"That is one token: the text has {seq}."),
        (right * (config.n_experts or 1), False, "Experts keep nothing: only attention looks back."),
        (right / config.head_dim, False, "That counts a head as one number, but it has head_dim of them."),
        (right / config.n_kv_heads, False, f"That is one kv head: there are {config.n_kv_heads}."),
        (right / 2**30, False, "That is in GiB: give the bytes."),
        (right / 1e9, False, "That is in GB: give the bytes."),
    ]  # fmt: skip
    for value, solved, message in usual:
        if math.isclose(got, value, rel_tol=1e-3):
            return Verdict(solved, message)
    times = f", {got / right:.3g} times the right number" if got > 0 else ""
    return Verdict(
        False, f"It is 2 x layers x kv heads x head_dim x tokens x bytes a number; you have {got:.4g}{times}."
    )


def _turned(pairs: list[tuple[int, int]], speeds: list[float]) -> list[float]:
    """`HEAD` with each pair turned by `POSITION` times its speed."""
    out = list(HEAD)
    for (a, b), speed in zip(pairs, speeds, strict=True):
        cos, sin = math.cos(POSITION * speed), math.sin(POSITION * speed)
        out[a], out[b] = HEAD[a] * cos - HEAD[b] * sin, HEAD[a] * sin + HEAD[b] * cos
    return out


def _overwritten() -> list[float]:
    """`HEAD` where the first number of each pair is overwritten before the second is computed from it."""
    out, half = list(HEAD), len(HEAD) // 2
    for i in range(half):
        angle = POSITION * THETA ** (-2 * i / len(HEAD))
        out[i] = out[i] * math.cos(angle) - out[i + half] * math.sin(angle)
        out[i + half] = out[i] * math.sin(angle) + out[i + half] * math.cos(angle)
    return out


def _rotated(head: list[float], position: int, theta: float) -> list[float]:
    """What the model's own rotation makes of one head at one position."""
    alone = torch.tensor(head).view(1, 1, 1, 1, -1)
    return rotate(alone, rotation(torch.tensor([[position]]), len(head), theta)).flatten().tolist()


def _close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip(a, b, strict=True))
