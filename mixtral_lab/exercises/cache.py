"""Lesson 05, the rolling cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mixtral_lab.config import PRESETS, Config
from mixtral_lab.exercises.verdict import Verdict, asked, checker, said


@checker
def check_ring_after(answer: Callable[[int, int], object]) -> Verdict:
    """A function from the tokens fed and the number of slots to the position in each slot, None where it is empty."""
    for seen, slots in ((7, 4), (2, 4), (4, 4), (10, 3), (0, 2)):
        right = [_newest(slot, seen, slots) for slot in range(slots)]
        given = asked(answer, seen, slots)
        try:
            got = [None if position is None else int(position) for position in given]
        except Exception:
            return Verdict(
                False, "Return a list with a position for each slot, such as [4, 5, 6, 3], and None for an empty slot."
            )
        case = f"With {slots} slots after {seen} tokens"
        if got == right:
            continue
        if None in right and got == [p if p is not None else got[-1] for p in right] and got[-1] in (-1, 0):
            return Verdict(False, f"{case} some slots are empty: write None for them, not {got[-1]}.")
        if got == [position for position in right if position is not None]:
            return Verdict(False, f"{case} some slots are empty: write None for them.")
        if len(got) != slots:
            return Verdict(False, f"{case} you list {len(got)} places: one for each of {slots} slots.")
        if got == [_newest(slot, seen + 1, slots) for slot in range(slots)]:
            return Verdict(
                False, f"{case} position {seen} was not fed yet: positions count from 0, the last is {seen - 1}."
            )
        if seen >= slots and got == list(range(seen - slots, seen)):
            return Verdict(
                False, f"{case}: those are the right positions in order of the text, but slot p % {slots} holds p."
            )
        if seen >= slots and got == list(range(slots)):
            return Verdict(False, f"{case} the first ones were overwritten: later positions go round the ring again.")
        return Verdict(False, f"{case} the slots hold {right}, not {got}.")
    return Verdict(True, "Each position in its slot, the newest on top, and nothing but the last ones kept.")


@checker
def check_cache_bytes(answer: Callable[[Config, int, int], object]) -> Verdict:
    """A function from a config, a number of tokens and bytes per number to the bytes of keys and values."""
    mistral = PRESETS["mistral-7b-v0.1"].config
    cases = [(mistral, 32768, 2), (mistral, 100, 2), (replace(mistral, window=None), 6000, 2), (mistral, 4096, 4)]
    for config, tokens, size in cases:
        kept = tokens if config.window is None else min(tokens, config.window)
        right = config.cache_bytes(tokens, size)
        whole = " where the window is None, so that all tokens are kept," if config.window is None else ""
        given = asked(answer, config, tokens, size, case=whole)
        try:
            got = float(given)
        except Exception as error:
            return Verdict(False, f"Return one number of bytes ({said(error)}).")
        if math.isclose(got, right):
            continue
        case = f"{tokens:,} tokens with " + (f"a window of {config.window:,}" if config.window else "no window")
        if math.isclose(got * kept, right * tokens):
            return Verdict(False, f"For {case} you keep every token: only those in the window are kept.")
        if config.window and math.isclose(got * kept, right * config.window):
            return Verdict(
                False, f"For {case} you count {config.window:,} tokens: a short text fills only part of the ring."
            )
        if math.isclose(got * 2, right):
            return Verdict(False, f"For {case} you have half: keys and values, and {size} bytes for each number.")
        if math.isclose(got, right * config.group):
            return Verdict(False, "You counted the query heads: only the key/value heads are kept, and they are fewer.")
        if math.isclose(got * config.n_layers, right):
            return Verdict(False, f"That is one layer: each of the {config.n_layers} layers has a cache of its own.")
        if math.isclose(got * size, right):
            return Verdict(False, f"That is how many numbers are kept: each takes {size} bytes.")
        return Verdict(False, f"For {case} it should be {right:,} bytes, not {got:,.0f}.")
    return Verdict(
        True, "Keys and values, in every layer and for every key/value head, of no more tokens than the window."
    )


@checker
def check_oldest_first(answer: Callable[[list[str], int], object]) -> Verdict:
    """A function from a ring as it lies and the tokens fed to what it holds, oldest first."""
    for seen, slots in ((6, 4), (11, 4), (2, 4), (4, 4), (8, 4), (5, 3)):
        places = [_newest(slot, seen, slots) for slot in range(slots)]
        store = ["empty" if place is None else chr(97 + place) for place in places]
        right = [chr(97 + place) for place in range(max(0, seen - slots), seen)]
        given = asked(answer, list(store), seen)
        try:
            got = list(given)
        except TypeError as error:
            return Verdict(False, f"Return a list, made of two pieces of the ring ({said(error)}).")
        if not all(isinstance(one, str) or one is None for one in got):
            return Verdict(False, f"Return a flat list of what the slots hold, such as ['c', 'd'], not {got!r}.")
        if got == right:
            continue
        case = f"For the ring {store} after {seen} tokens"
        if "empty" in got or None in got:
            return Verdict(False, f"{case} you return slots that nothing was written to: leave them out.")
        if got == store:
            return Verdict(False, f"{case}: that is the ring as it lies. The oldest is in slot {seen % slots}.")
        if got == right[::-1]:
            return Verdict(False, f"{case} you list the newest first.")
        if sorted(map(str, got)) != sorted(right):
            return Verdict(False, f"{case} you return {got}: each of {right} must be there exactly once.")
        if got and got[0] == right[-1]:
            return Verdict(False, f"{case} you begin with the newest, {got[0]!r}: the oldest lies one slot further.")
        return Verdict(False, f"{case} it should be {right}, not {got}.")
    return Verdict(True, "The oldest lies where the next one will be written: cut there and swap the pieces.")


def _newest(slot: int, seen: int, slots: int) -> int | None:
    """The last position below `seen` that fell into a slot."""
    place = seen - 1 - (seen - 1 - slot) % slots
    return place if place >= 0 else None
