"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import math

import pytest
import torch
from einops import einsum

from mixtral_lab.config import PRESETS
from mixtral_lab.exercises import check_grouped_scores, check_kept_bytes, check_rotate_by_hand


def rotated(way=1, neighbours=False, angle=lambda position, theta, i, size: position * theta ** (-2 * i / size)):
    def rotate(head, position, theta):
        out, half = list(head), len(head) // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + half)
            cos, sin = (
                math.cos(angle(position, theta, i, len(head))),
                way * math.sin(angle(position, theta, i, len(head))),
            )
            out[a], out[b] = head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos
        return out

    return rotate


def in_place(head, position, theta):
    for i in range(half := len(head) // 2):
        cos, sin = (f(position * theta ** (-2 * i / len(head))) for f in (math.cos, math.sin))
        head[i] = head[i] * cos - head[i + half] * sin
        head[i + half] = head[i] * sin + head[i + half] * cos
    return head


def pairs_together(head, position, theta):
    out, half = rotated()(head, position, theta), len(head) // 2
    return [x for i in range(half) for x in (out[i], out[i + half])]


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (rotated(), True, "its own angle"),
        (lambda *args: torch.tensor(rotated()(*args)), True, "its own angle"),
        (lambda head, position, theta: None, None, "still returns None"),
        (lambda head, position, theta: head, False, "Nothing was turned"),
        (rotated(way=-1), False, "wrong way"),
        (rotated(neighbours=True), False, "paired neighbours"),
        (rotated(angle=lambda p, t, i, n: math.radians(p * t ** (-2 * i / n))), False, "degrees"),
        (rotated(angle=lambda p, t, i, n: p * t ** (-i / n)), False, "the 2 is missing"),
        (rotated(angle=lambda p, t, i, n: p * t ** (2 * i / n)), False, "negative"),
        (rotated(angle=lambda p, t, i, n: p), False, "equally fast"),
        (rotated(angle=lambda p, t, i, n: t ** (-2 * i / n)), False, "position is missing"),
        (
            rotated(angle=lambda p, t, i, n: p * t ** (-2 * i / 6)),
            True,
            "its own angle",
        ),  # a head of 2 has pair 0 alone
        (rotated(angle=lambda p, t, i, n: 3 * 1000 ** (-2 * i / n)), False, "written into it"),
        (lambda head, position, theta: [*rotated()(head, position, theta)[:3], 0, 0, 0], False, "[0, 1, 2] are right"),
        (rotated(angle=lambda p, t, i, n: p * t ** (-2 * i / (n // 2))), False, "not half of it"),
        (in_place, False, "before you used it"),
        (pairs_together, False, "places i and i + half"),
        (lambda head, position, theta: head[:3], False, "you return 3"),
        (lambda head, position, theta: "head", False, "list of numbers"),
        (lambda head: head, False, "TypeError"),
    ],
)
def test_rotate_by_hand(answer, solved, says):
    verdict = check_rotate_by_hand(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)


def scores(query, key, pattern="kv group q d, kv k d -> kv group q k"):
    return einsum(query, key, pattern) / query.shape[-1] ** 0.5


def wrong_order(query, key):
    kv, group = query.shape[:2]
    return scores(query, key.repeat(group, 1, 1).view(kv, group, *key.shape[1:]), "kv g q d, kv g k d -> kv g q k")


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (scores, True, "keys of its group"),
        (lambda q, k: q @ k.unsqueeze(1).transpose(-1, -2) / q.shape[-1] ** 0.5, True, "keys of its group"),
        (lambda q, k: None, None, "still returns None"),
        (lambda q, k: scores(q, k) * q.shape[-1] ** 0.5, False, "grow with the size"),
        (lambda q, k: scores(q, k) / q.shape[-1] ** 0.5, False, "divided by head_dim"),
        (lambda q, k: scores(q, k) * q.shape[-1], False, "multiplied"),
        (lambda q, k: scores(q, k).softmax(-1), False, "softmax"),
        (wrong_order, False, "kv outermost"),
        (lambda q, k: scores(q, k[:1].expand_as(k)), False, "kv head 0"),
        (lambda q, k: scores(q, k).transpose(-1, -2), False, "changed places"),
        (lambda q, k: scores(q, k).sum(1), False, "summed over the heads"),
        (lambda q, k: scores(q, k).flatten(0, 1), False, "in one row"),
        (lambda q, k: q, False, "The shape is (2, 3, 4, 6)"),
        (lambda q, k: scores(q, k) * q.shape[-1] ** 0.5 / 32**0.5, False, "which is 6 here"),
        (lambda q, k: scores(q, k).tril(), False, "no mask here"),
        (lambda q, k: scores(q, k) + 1, False, "numbers are not"),
        (lambda q, k: scores(q, k).tolist(), False, "not a list"),
        (lambda q, k: q @ k, False, "RuntimeError"),
    ],
)
def test_grouped_scores(answer, solved, says):
    verdict = check_grouped_scores(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)


RIGHT = 2 * 56 * 8 * 128 * 32768 * 2


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (RIGHT, True, "7.0 GiB; with one kv head per query head it would be 42.0"),
        (None, None, "still None"),
        (RIGHT / 2, False, "half"),
        (RIGHT / 4, False, "quarter"),
        (RIGHT * 6, False, "48 heads"),
        (RIGHT / 56, False, "one layer"),
        (RIGHT / 32768, False, "one token"),
        (RIGHT * 8, False, "Experts keep nothing"),
        (RIGHT / 128, False, "head as one number"),
        (RIGHT / 8, False, "one kv head"),
        (7.0, False, "in GiB"),
        (7.516, False, "in GB"),
        (RIGHT * 3, False, "3 times the right number"),
        (-1, False, "you have -1"),
        ("7 GiB", False, "one number"),
        (float("nan"), False, "you have nan"),
    ],
)
def test_kept_bytes(answer, solved, says):
    verdict = check_kept_bytes(answer, PRESETS["mixtral-8x22b"].config, seq=32768)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)
