"""Checkers of lesson 05: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import pytest

from mixtral_lab.exercises import check_cache_bytes, check_oldest_first, check_ring_after


def ring_after(seen, slots):
    ring = [None] * slots
    for position in range(seen):
        ring[position % slots] = position
    return ring


def in_order(seen, slots):
    return list(range(max(0, seen - slots), seen)) + [None] * max(0, slots - seen)


def first_ones(seen, slots):
    return list(range(min(seen, slots))) + [None] * max(0, slots - seen)


def kept(config, tokens):
    return tokens if config.window is None else min(tokens, config.window)


def numbers(config, tokens):
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * kept(config, tokens)


def window_or_stop(config, tokens, size):
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * min(tokens, config.window) * size


def oldest_first(store, seen):
    if seen <= len(store):
        return store[:seen]
    oldest = seen % len(store)
    return store[oldest:] + store[:oldest]


def from_the_newest(store, seen):
    newest = (seen - 1) % len(store)
    return store[:seen] if seen < len(store) else store[newest:] + store[:newest]


def always_cut(store, seen):
    oldest = seen % len(store)
    return store[oldest:] + store[:oldest]


CASES = [
    (check_ring_after, ring_after, True, "newest on top"),
    (check_ring_after, lambda seen, slots: None, None, "still returns None"),
    (check_ring_after, in_order, False, "in order of the text"),
    (check_ring_after, first_ones, False, "go round the ring"),
    (check_ring_after, lambda seen, slots: ring_after(seen + 1, slots), False, "not fed yet"),
    (check_ring_after, lambda seen, slots: [p for p in ring_after(seen, slots) if p is not None], False, "are empty"),
    (check_ring_after, lambda seen, slots: list(range(seen)), False, "one for each of 4 slots"),
    (check_ring_after, lambda seen, slots: [-1 if p is None else p for p in ring_after(seen, slots)], False, "not -1"),
    (
        check_ring_after,
        lambda seen, slots: ["-" if p is None else p for p in ring_after(seen, slots)],
        False,
        "None for an",
    ),
    (check_ring_after, lambda seen, slots: [9] * slots, False, "the slots hold"),
    (check_ring_after, lambda seen, slots: 3, False, "Return a list"),
    (check_ring_after, lambda seen, slots: 1 / 0, False, "ZeroDivisionError"),
    (check_cache_bytes, lambda c, n, size: numbers(c, n) * size, True, "Keys and values"),
    (check_cache_bytes, lambda c, n, size: None, None, "still returns None"),
    (check_cache_bytes, lambda c, n, size: numbers(c, n) * size * n // kept(c, n), False, "keep every token"),
    (check_cache_bytes, lambda c, n, size: numbers(c, c.window or n) * size, False, "fills only part"),
    (check_cache_bytes, lambda c, n, size: numbers(c, n) * size // 2, False, "you have half"),
    (check_cache_bytes, lambda c, n, size: numbers(c, n) * size * c.group, False, "query heads"),
    (check_cache_bytes, lambda c, n, size: numbers(c, n) * size // c.n_layers, False, "one layer"),
    (check_cache_bytes, lambda c, n, size: numbers(c, n) * 2, False, "4 bytes for each number"),
    (check_cache_bytes, window_or_stop, False, "window is None"),
    (check_cache_bytes, lambda c, n, size: 17, False, "not 17"),
    (check_cache_bytes, lambda c, n, size: "much", False, "one number of bytes"),
    (check_cache_bytes, lambda c, n, size: c.nothing, False, "AttributeError"),
    (check_oldest_first, oldest_first, True, "swap the pieces"),
    (check_oldest_first, lambda store, seen: None, None, "still returns None"),
    (check_oldest_first, lambda store, seen: store, False, "as it lies"),
    (check_oldest_first, lambda store, seen: oldest_first(store, seen)[::-1], False, "newest first"),
    (check_oldest_first, from_the_newest, False, "you begin with the newest"),
    (check_oldest_first, always_cut, False, "nothing was written"),
    (check_oldest_first, lambda store, seen: store[1:], False, "exactly once"),
    (check_oldest_first, lambda store, seen: 4, False, "two pieces"),
    (check_oldest_first, lambda store, seen: store[77], False, "IndexError"),
]


@pytest.mark.parametrize(("check", "answer", "solved", "says"), CASES)
def test_cache(check, answer, solved, says):
    verdict = check(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)
