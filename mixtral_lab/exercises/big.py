"""Lesson 13, running 47 billion parameters: a cache of experts, numbers in four bits, rows that travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jaxtyping import Integer
from torch import Tensor

from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker


@checker
def check_lru_hits(answer: Callable[[list[int], int], object]) -> Verdict:
    """A function from the experts asked for, in order, and the room in the cache to the number of hits."""
    for wanted, capacity in (
        ([0, 1, 0, 2, 0, 1, 1, 3, 0, 2], 2),
        ([0, 1, 2, 0, 3, 0, 1, 2, 2, 0], 3),
        ([5, 5, 6, 5], 1),
        ([0, 0, 0, 1, 2, 1, 2], 2),  # tells least recently from least frequently used
    ):
        case = f"For {wanted} and room for {capacity}: "
        got = asked(answer, list(wanted), capacity, case=f" for {wanted} and room for {capacity}")
        try:
            number = float(got)
        except (TypeError, ValueError, RuntimeError):
            return Verdict(False, f"Return one number, how many were found, not {got!r}.")
        right = _hits(wanted, capacity)
        if number == right:
            continue
        if number == len(wanted) - right:
            return Verdict(False, case + "that is the number of misses; the hits are the others.")
        if number == _hits(wanted, capacity, refresh=False):
            return Verdict(
                False, case + "a hit must count as a use: move its expert to the end, so that it goes out last."
            )
        if number == _hits(wanted, len(wanted)):
            return Verdict(
                False, case + "nobody is ever put out: when there is no room, the least recently used must go."
            )
        if number == _hits(wanted, capacity, newest=True):
            return Verdict(False, case + "the wrong one is put out: it is the one whose last use is longest ago.")
        if number == _hits(wanted, capacity - 1) or number == _hits(wanted, capacity + 1):
            return Verdict(
                False, case + "the cache holds one too few or one too many: put somebody out only if there is no room."
            )
        return Verdict(False, f"{case}{right} are found, not {number:g}.")
    return Verdict(True, "The least recently used goes out, and each use makes its expert the newest.")


@checker
def check_int4(answer: Callable[[list[float]], object]) -> Verdict:
    """A function that rounds numbers to 16 even marks from the smallest to the largest, and returns the rounded numbers."""
    numbers = [-0.9, -0.5, 0.04, 0.13, 0.25, 0.7, 2.1]
    got = _list(answer, numbers)
    low, high = min(numbers), max(numbers)
    step = (high - low) / 15
    places = [(x - low) / step for x in numbers]

    def near(wanted: Sequence[float]) -> bool:
        return all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(got, wanted, strict=True))

    if near([float(round(place)) for place in places]):
        return Verdict(False, "Those are the integers: turn them back into numbers, low + step * integer.")
    if near([step * round(place) for place in places]):
        return Verdict(False, "The marks begin at the smallest number, not at 0: add it at the end.")
    if near([low + step * math.floor(place) for place in places]):
        return Verdict(False, "You always go down to the next mark: take the nearest, with round.")
    wide = (high - low) / 16
    if near([low + wide * round((x - low) / wide) for x in numbers]):
        return Verdict(False, "You divided by 16: sixteen marks have fifteen gaps between them.")
    if near([low + wide * min(round((x - low) / wide), 15) for x in numbers]):
        return Verdict(
            False, "You divided by 16: sixteen marks have fifteen gaps between them, or the largest is out of reach."
        )
    even = high / 7
    if near([even * round(x / even) for x in numbers]):
        return Verdict(False, "Your marks lie around 0: let them run from the smallest to the largest number.")
    if near(numbers):
        return Verdict(False, "The numbers came back unchanged: nothing was rounded.")
    if not near([low + step * round(place) for place in places]):
        return Verdict(
            False,
            f"With marks {step:.2f} apart from {low} on, {numbers[1]} becomes {low + step * round(places[1]):.2f}.",
        )
    try:
        same = _list(answer, [0.25, 0.25, 0.25])
    except Over as over:
        return Verdict(False, f"For numbers that are all equal: {over} Is there a division by a step of 0?")
    if not all(math.isclose(x, 0.25, abs_tol=1e-6) for x in same):
        return Verdict(
            False, f"Numbers that are all equal, 0.25, must come back so, not as {same[0]:g}: is there a step of 0?"
        )
    return Verdict(True, "Sixteen marks, fifteen gaps, and nobody is off by more than half of one.")


@checker
def check_rows_sent(
    answer: object, chosen: Integer[Tensor, "seq choice"], machines: int, n_experts: int = 8
) -> Verdict:
    """How many rows leave the machine they start on, if row r starts on r % machines and experts lie in equal stretches."""
    if answer is None:
        return Verdict(None, "The answer is still None.")
    try:
        got = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"The answer must be one number, not {answer!r}.")
    goal = [expert // (n_experts // machines) for expert in chosen.flatten().tolist()]
    total = len(goal)
    right = sum(number % machines != there for number, there in enumerate(goal))
    if got == right:
        return Verdict(
            True, f"{right} of {total} rows travel; if experts were drawn at random it would be {1 - 1 / machines:.0%}."
        )
    if got == total - right:
        return Verdict(False, "Those are the rows that stay: count the others.")
    if got == 2 * right:
        return Verdict(False, "That counts the way back as well: only the way there is asked for.")
    if math.isclose(got, right / total, abs_tol=1e-3):
        return Verdict(False, "That is the share of the rows: the number is asked for.")
    dealt = sum(number % machines != expert % machines for number, expert in enumerate(chosen.flatten().tolist()))
    if got == dealt:
        return Verdict(
            False,
            f"Your experts are dealt out in turn; here each machine holds a stretch: expert // {n_experts // machines}.",
        )
    by_token = [(token % machines, there) for token, row in enumerate(chosen.tolist()) for there in row]
    if got == sum(a != b // (n_experts // machines) for a, b in by_token):
        return Verdict(
            False,
            "You started rows by their token; row r of chosen.flatten() starts on r % machines, so a token's two rows differ.",
        )
    if got == len(chosen):
        return Verdict(
            False,
            "That is the number of tokens: each makes as many rows as it has choices, and not all of them travel.",
        )
    return Verdict(False, f"Of {total} rows, count those whose start, r % {machines}, is not where their expert lives.")


def _hits(asked: Sequence[int], capacity: int, refresh: bool = True, newest: bool = False) -> int:
    """Hits of a cache; without `refresh`, first in, first out; with `newest`, the most recently used goes out."""
    kept: list[int] = []
    hits = 0
    for expert in asked:
        if expert in kept:
            hits += 1
            if not refresh:
                continue
            kept.remove(expert)
        elif kept and len(kept) >= capacity:
            kept.pop(-1 if newest else 0)
        if capacity > 0:
            kept.append(expert)
    return hits


def _list(answer: Callable[[list[float]], object], numbers: list[float]) -> list[float]:
    """The numbers that an answer gives, as many as it was given."""
    got = asked(answer, list(numbers))
    try:
        found = [float(x) for x in got]
    except (TypeError, ValueError, RuntimeError):
        raise Over(Verdict(False, f"Return a list of numbers, not {got!r}.")) from None
    if len(found) != len(numbers):
        raise Over(Verdict(False, f"Return one number for each of the {len(numbers)}, not {len(found)}."))
    return found
