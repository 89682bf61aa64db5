"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import pytest

from mixtral_lab.exercises import check_experts_awake, check_intensity, check_nucleus


def intensity(tokens, n_in, n_out, size):
    return 2 * tokens * n_in * n_out / (size * (n_in * n_out + tokens * (n_in + n_out)))


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (intensity, True, "read once"),
        (lambda *_: None, None, "still returns None"),
        (lambda *case: 1 / intensity(*case), False, "turn it over"),
        (lambda *case: intensity(*case) / 2, False, "two operations"),
        (lambda t, i, o, s: s * intensity(t, i, o, s), False, "takes `size` bytes"),
        (lambda t, i, o, s: intensity(t, i, o, s) / t, False, "every token is multiplied"),
        (lambda t, i, o, s: 2 * t * i * o, False, "divide by the bytes"),
        (lambda t, i, o, s: s * (i * o + t * (i + o)), False, "bytes alone"),
        (lambda t, i, o, s: 2 * t / s, False, "matrix alone"),
        (lambda t, i, o, s: 2 * t * i * o / (s * (i * o + t * i)), False, "What comes out"),
        (lambda t, i, o, s: 2 * t * i * o / (s * (i * o + t * o)), False, "What goes in"),
        (lambda t, i, o, s: 2 * t * i * o / (s * t * (i * o + i + o)), False, "anew for every token"),
        (lambda t, i, o, s: intensity(t, i, o, 4), False, "takes 4"),
        (lambda t, i, o, s: 2 * t * i * o / s * (i * o + t * (i + o)), False, "brackets"),
        (lambda *_: 7.5, False, "not 7.5"),
        (lambda *_: float("nan"), False, "not nan"),
        (lambda *_: "many", False, "one number"),
        (lambda *_: 1 / 0, False, "ZeroDivisionError"),
        (lambda tokens: tokens, False, "TypeError"),
    ],
)
def test_intensity(answer, solved, says):
    verdict = check_intensity(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda n, k, t: n * (1 - (1 - k / n) ** t), True, "every token misses it"),
        (lambda *_: None, None, "still returns None"),
        (lambda n, k, t: n * (1 - k / n) ** t, False, "nobody chose"),
        (lambda n, k, t: 1 - (1 - k / n) ** t, False, "share of the experts"),
        (lambda n, k, t: (1 - k / n) ** t, False, "go on from there"),
        (lambda n, k, t: min(n, k * t), False, "choose the same one"),
        (lambda n, k, t: n * (1 - (1 - 1 / n) ** (k * t)), False, "twice"),
        (lambda n, k, t: n * (1 - (1 - 1 / n) ** t), False, "it takes 2"),
        (lambda n, k, t: n * (1 - (k / n) ** t), False, "*missed*"),
        (lambda n, k, t: n, False, "all of them"),
        (lambda *_: 3.3, False, "not 3.3"),
        (lambda *_: [2], False, "one number"),
        (lambda *_: {}[0], False, "KeyError"),
    ],
)
def test_experts_awake(answer, solved, says):
    verdict = check_experts_awake(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def nucleus(probabilities, p, *, enough=lambda held, p: held >= p, more=0):
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept, held = [], 0.0
    for token in order:
        kept.append(token)
        held += probabilities[token]
        if enough(held, p):
            break
    kept = order[: max(0, len(kept) + more)]
    held = sum(probabilities[token] for token in kept)
    return {token: probabilities[token] / held for token in kept}


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (nucleus, True, "fewest tokens"),
        (lambda *_: None, None, "still returns None"),
        (lambda c, p: {token: c[token] / p for token in nucleus(c, p)}, False, "divide by p"),
        (
            lambda c, p: {token: c[token] / 0.75 for token in ([0, 1, 2] if p == 0.7 else [])},
            False,
            "order of the list",
        ),
        (lambda c, p: {token: c[token] for token in nucleus(c, p)}, False, "sum to 1"),
        (lambda c, p: nucleus(c, p, more=-1), False, "one too early"),
        (lambda c, p: {} if p == 0.7 else nucleus(c, p), False, "nothing is left"),
        (lambda c, p: nucleus(c, p, enough=lambda held, p: held > p), False, "equal is enough"),
        (lambda c, p: dict(enumerate(nucleus(c, p).values())), False, "place in the list"),
        (lambda c, p: {t: x for t, x in enumerate(c) if x >= p}, False, "running sum"),
        (lambda c, p: dict.fromkeys(nucleus(c, p), 0.5), False, "their probabilities are not"),
        (lambda c, p: {0: 0.5, 2: 0.5}, False, "other way round"),
        (lambda c, p: {9: 1.0}, False, "not [9]"),
        (lambda c, p: list(nucleus(c, p)), False, "dictionary"),
        (lambda c, p: {"a": 1.0}, False, "ValueError"),
    ],
)
def test_nucleus(answer, solved, says):
    verdict = check_nucleus(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)
