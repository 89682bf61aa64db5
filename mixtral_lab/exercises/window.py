"""Lesson 04, the sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable

from mixtral_lab.exercises.verdict import Verdict, asked, checker, said


@checker
def check_visible_keys(answer: Callable[[int, int], object]) -> Verdict:
    """A function from a position and a window to the positions that it sees, oldest first."""
    for position, window in ((5, 3), (1, 3), (9, 4), (4, 1)):
        right = list(range(max(0, position - window + 1), position + 1))
        given = asked(answer, position, window)
        try:
            got = [int(key) for key in given]
        except TypeError as error:
            return Verdict(False, f"Return a list of positions, such as [3, 4, 5] ({said(error)}).")
        case = f"position {position} with a window of {window}"
        if got == right:
            continue
        if any(key < 0 for key in got):
            return Verdict(False, f"For {case} you list positions below 0: the text begins at 0.")
        if any(key > position for key in got):
            return Verdict(False, f"For {case} you list {max(got)}, which is in the future: stop at {position}.")
        if got == right[::-1]:
            return Verdict(False, "The right keys, but the newest first: list the oldest first.")
        if got == list(range(max(0, position - window), position + 1)):
            return Verdict(
                False, f"For {case} you list {len(got)} keys: the window of {window} counts the token itself."
            )
        if position not in got:
            return Verdict(False, f"For {case} the token itself is missing: it sees itself too.")
        return Verdict(False, f"For {case} it should be {right}, not {got}.")
    return Verdict(True, "As many keys as the window is wide, itself included, and none before the text begins.")


@checker
def check_layers_needed(answer: Callable[[int, int], object]) -> Verdict:
    """A function from a distance and a window to the fewest layers that carry something so far."""
    for distance, window in ((5, 4), (6, 3), (22, 4), (127, 128), (128, 128), (1000, 128), (131040, 4096)):
        right = -(-distance // (window - 1))
        given = asked(answer, distance, window)
        try:
            got = float(given)
        except Exception:
            return Verdict(False, "Return one whole number, the number of layers.")
        if not math.isfinite(got):
            return Verdict(False, "Return one whole number, the number of layers.")
        case = f"{distance:,} tokens back with a window of {window:,}"
        if got == right:
            continue
        if got != round(got):
            return Verdict(False, f"For {case} you say {got:g} layers: there are no parts of layers, round up.")
        if got == -(-distance // window):
            return Verdict(
                False,
                f"For {case} you say {got:g}: you counted {window:,} tokens a layer, but a token sees {window - 1:,} others.",
            )
        if got == distance // (window - 1):
            return Verdict(False, f"For {case}, {got:g} is too few, the last ends before the word: round up, not down.")
        if got == distance // (window - 1) + 1:
            return Verdict(False, f"For {case}, {right} will do: where the division leaves nothing, add nothing.")
        return Verdict(False, f"For {case} it takes {right} layers, not {got:g}.")
    return Verdict(True, "One layer for every window - 1 tokens, rounded up.")


@checker
def check_packed_mask(answer: Callable[[list[int], int], object]) -> Verdict:
    """A function from the texts of a row's places and a window to the mask `mask[query][key]`."""
    for texts, window in (([0, 0, 0, 1, 1], 3), ([0, 0, 0, 0, 1, 1, 1, 2], 2), ([4, 7, 7, 7], 8)):
        places = range(len(texts))
        past = [[k <= q for k in places] for q in places]
        near = [[past[q][k] and q - k < window for k in places] for q in places]
        right = [[near[q][k] and texts[q] == texts[k] for k in places] for q in places]
        given = asked(answer, list(texts), window)
        try:
            got = [[bool(cell) for cell in row] for row in given]
        except TypeError:
            return Verdict(False, "Return a list of lists of True and False, one inner list for each query.")
        if len(got) != len(texts) or any(len(row) != len(texts) for row in got):
            return Verdict(False, f"For {len(texts)} places the mask must have {len(texts)} rows of {len(texts)}.")
        if got == right:
            continue
        case = f"For texts {texts} and a window of {window}"
        if got == near:
            return Verdict(False, f"{case} a text still looks into the one before it: compare `texts` too.")
        same = [[past[q][k] and texts[q] == texts[k] for k in places] for q in places]
        if got == same:
            return Verdict(False, f"{case} some queries see more than {window} keys: the window is missing.")
        if got == [list(column) for column in zip(*right, strict=True)]:
            return Verdict(False, "Queries and keys are exchanged: `mask[query][key]`, and a key is never later.")
        if any(got[q][k] for q in places for k in places if k > q):
            return Verdict(False, f"{case} a token sees a later one: a key must not be after its query.")
        if any(got[q][k] for q in places for k in places if q - k == window):
            return Verdict(False, f"{case} a query sees {window + 1} keys: the window counts the token itself.")
        q, k = next((q, k) for q in places for k in places if got[q][k] != right[q][k])
        return Verdict(False, f"{case}, may query {q} see key {k}? You say {got[q][k]}, it should be {right[q][k]}.")
    return Verdict(True, "The past, near enough, and in the same text: three conditions on places, nothing else.")
