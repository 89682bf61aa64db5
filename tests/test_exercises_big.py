"""Lesson 13's checkers accept the solution, know the stub, and have a word of their own for each usual mistake."""

from __future__ import annotations

import pytest
import torch

from mixtral_lab.exercises import check_int4, check_lru_hits, check_rows_sent
from mixtral_lab.expert_cache import LRU


def lru_hits(asked, capacity):
    kept, hits = [], 0
    for expert in asked:
        if expert in kept:
            hits += 1
            kept.remove(expert)
        kept.append(expert)
        kept = kept[-capacity:]
    return hits


def first_in_first_out(asked, capacity):
    kept, hits = [], 0
    for expert in asked:
        if expert in kept:
            hits += 1
        else:
            kept = [*kept, expert][-capacity:]
    return hits


def newest_goes(asked, capacity):
    kept, hits = [], 0
    for expert in asked:
        if expert in kept:
            hits += 1
            kept.remove(expert)
        elif len(kept) == capacity:
            kept.pop()
        kept.append(expert)
    return hits


def least_frequently_used(asked, capacity):
    kept, hits = [], 0
    for n, expert in enumerate(asked):
        if expert in kept:
            hits += 1
            continue
        if len(kept) == capacity:
            kept.remove(min(kept, key=asked[:n].count))
        kept.append(expert)
    return hits


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (least_frequently_used, False, "whose last use is longest ago"),
        (lru_hits, True, "least recently used"),
        (lambda asked, capacity: sum(map(LRU(capacity).touch, asked)), True, "least recently used"),
        (lambda asked, capacity: None, None, "still returns None"),
        (lambda asked, capacity: len(asked) - lru_hits(asked, capacity), False, "misses"),
        (first_in_first_out, False, "must count as a use"),
        (lambda asked, capacity: len(asked) - len(set(asked)), False, "nobody is ever put out"),
        (newest_goes, False, "wrong one"),
        (lambda asked, capacity: lru_hits(asked, capacity + 1), False, "one too many"),
        (lambda asked, capacity: 0, False, "are found"),
        (lambda asked, capacity: [1, 2], False, "one number"),
        (lambda asked, capacity: asked[99], False, "IndexError"),
    ],
)
def test_lru_hits(answer, solved, says):
    verdict = check_lru_hits(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def int4(numbers, gaps=15, nearest=round, back=True, low=None):
    low, high = min(numbers) if low is None else low, max(numbers)
    step = (high - low) / gaps or 1.0
    integers = [nearest((x - low) / step) for x in numbers]
    return [low + step * i for i in integers] if back else integers


def divides_by_zero(numbers):
    low, step = min(numbers), (max(numbers) - min(numbers)) / 15
    return [low + step * round((x - low) / step) for x in numbers]


def forgets_low(numbers):
    low = min(numbers)
    return [x - low for x in int4(numbers)]


def around_zero(numbers):
    step = max(abs(x) for x in numbers) / 7
    return [step * round(x / step) for x in numbers]


def not_a_number(numbers):
    return int4(numbers) if len(set(numbers)) > 1 else [float("nan")] * len(numbers)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (int4, True, "fifteen gaps"),
        (lambda numbers: torch.tensor(int4(numbers)), True, "fifteen gaps"),
        (lambda numbers: None, None, "still returns None"),
        (lambda numbers: int4(numbers, back=False), False, "Those are the integers"),
        (lambda numbers: int4(numbers, gaps=16), False, "divided by 16"),
        (lambda numbers: int4(numbers, nearest=int), False, "nearest"),
        (forgets_low, False, "add it at the end"),
        (around_zero, False, "around 0"),
        (lambda numbers: numbers, False, "unchanged"),
        (lambda numbers: int4(numbers, gaps=7), False, "becomes"),
        (divides_by_zero, False, "step of 0"),
        (not_a_number, False, "step of 0"),
        (lambda numbers: numbers[:2], False, "one number for each"),
        (lambda numbers: 3, False, "list of numbers"),
    ],
)
def test_int4(answer, solved, says):
    verdict = check_int4(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


CHOSEN = torch.tensor([[0, 5], [1, 7], [6, 2], [3, 4], [0, 1], [2, 3], [7, 0], [5, 4], [1, 6]])


def travelling(start, goal):
    return int((start != goal).sum())


ROWS = torch.arange(CHOSEN.numel())
RIGHT = travelling(ROWS % 2, CHOSEN.flatten() // 4)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (RIGHT, True, "rows travel"),
        (torch.tensor(RIGHT), True, "rows travel"),
        (None, None, "still None"),
        (CHOSEN.numel() - RIGHT, False, "stay"),
        (2 * RIGHT, False, "way back"),
        (RIGHT / CHOSEN.numel(), False, "share"),
        (travelling(ROWS % 2, CHOSEN.flatten() % 2), False, "in turn"),
        (travelling(ROWS // 2 % 2, CHOSEN.flatten() // 4), False, "by their token"),
        (len(CHOSEN), False, "number of tokens"),
        (-3, False, "whose start"),
        ("many", False, "one number"),
    ],
)
def test_rows_sent(answer, solved, says):
    verdict = check_rows_sent(answer, CHOSEN, machines=2)
    assert verdict.solved is solved
    assert says in repr(verdict)
