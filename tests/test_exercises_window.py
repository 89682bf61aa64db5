"""Checkers of lesson 04: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import math

import pytest

from mixtral_lab.exercises import check_layers_needed, check_packed_mask, check_visible_keys


def keys(position, window):
    return list(range(max(0, position - window + 1), position + 1))


def layers(distance, window):
    return -(-distance // (window - 1))


def packed(texts, window):
    places = range(len(texts))
    return [[k <= q and q - k < window and texts[q] == texts[k] for k in places] for q in places]


def made_of(condition):
    """A mask by another rule: `condition(query, key, texts, window)`."""
    return lambda texts, window: [
        [condition(q, k, texts, window) for k in range(len(texts))] for q in range(len(texts))
    ]


CASES = [
    (check_visible_keys, keys, True, "itself included"),
    (check_visible_keys, lambda p, w: range(max(0, p - w + 1), p + 1), True, "itself included"),
    (check_visible_keys, lambda p, w: None, None, "still returns None"),
    (check_visible_keys, lambda p, w: list(range(p - w + 1, p + 1)), False, "below 0"),
    (check_visible_keys, lambda p, w: list(range(max(0, p - w), p + 1)), False, "counts the token itself"),
    (check_visible_keys, lambda p, w: list(range(max(0, p - w + 1), p)), False, "sees itself too"),
    (check_visible_keys, lambda p, w: list(range(p, p + w)), False, "in the future"),
    (check_visible_keys, lambda p, w: keys(p, w)[::-1], False, "newest first"),
    (check_visible_keys, lambda p, w: [p], False, "should be [3, 4, 5]"),
    (check_visible_keys, lambda p, w: 3, False, "list of positions"),
    (check_visible_keys, lambda p, w: ["a"], False, "ValueError"),
    (check_layers_needed, layers, True, "rounded up"),
    (check_layers_needed, lambda d, w: math.ceil(d / (w - 1)), True, "rounded up"),
    (check_layers_needed, lambda d, w: None, None, "still returns None"),
    (check_layers_needed, lambda d, w: -(-d // w), False, "sees 2 others"),
    (check_layers_needed, lambda d, w: d // (w - 1), False, "round up, not down"),
    (check_layers_needed, lambda d, w: round(d / (w - 1)), False, "round up, not down"),
    (check_layers_needed, lambda d, w: d / (w - 1), False, "no parts of layers"),
    (check_layers_needed, lambda d, w: d // (w - 1) + 1, False, "add nothing"),
    (check_layers_needed, lambda d, w: 40, False, "it takes 2 layers"),
    (check_layers_needed, lambda d, w: "many", False, "whole number"),
    (check_layers_needed, lambda d, w: float("nan"), False, "whole number"),
    (check_layers_needed, lambda d, w: float("inf"), False, "whole number"),
    (check_layers_needed, lambda d, w: 1 / 0, False, "ZeroDivisionError"),
    (check_packed_mask, packed, True, "three conditions"),
    (check_packed_mask, lambda t, w: None, None, "still returns None"),
    (check_packed_mask, made_of(lambda q, k, t, w: k <= q and q - k < w), False, "compare `texts`"),
    (check_packed_mask, made_of(lambda q, k, t, w: k <= q and t[q] == t[k]), False, "window is missing"),
    (check_packed_mask, made_of(lambda q, k, t, w: q - k < w and t[q] == t[k]), False, "sees a later one"),
    (check_packed_mask, made_of(lambda q, k, t, w: packed(t, w)[k][q]), False, "exchanged"),
    (check_packed_mask, made_of(lambda q, k, t, w: k <= q and q - k <= w and t[q] == t[k]), False, "sees 3 keys"),
    (
        check_packed_mask,
        made_of(lambda q, k, t, w: k < q and q - k < w and t[q] == t[k]),
        False,
        "may query 0 see key 0",
    ),
    (check_packed_mask, lambda t, w: [[True]], False, "5 rows of 5"),
    (check_packed_mask, lambda t, w: True, False, "list of lists"),
    (check_packed_mask, lambda t, w: t[99], False, "IndexError"),
]


@pytest.mark.parametrize(("check", "answer", "solved", "says"), CASES)
def test_window(check, answer, solved, says):
    verdict = check(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)
