"""Lesson 08, step through inference."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker


@checker
def check_intensity(answer: Callable[[int, int, int, int], object]) -> Verdict:
    """A function from tokens, a matrix's two sides and bytes per number to operations per byte."""
    for tokens, n_in, n_out, size in ((512, 4096, 14336, 4), (1, 256, 384, 4), (64, 4096, 14336, 2)):
        matrix, moved = n_in * n_out, tokens * (n_in + n_out)
        operations = 2 * tokens * matrix
        right = operations / (size * (matrix + moved))
        got = _number(partial(answer, tokens, n_in, n_out, size))
        if _near(got, right):
            continue
        if any(got == round(right, digits) for digits in range(4)):
            return Verdict(False, f"Right, but rounded: return {right:.5g} as it comes out, not {got:g}.")
        mistakes = {
            f"`size` is {size} here, and your function takes 4: use the argument.": math.nan
            if size == 4
            else operations / (4 * (matrix + moved)),
            "You multiply by the sum of the counts: put brackets around `size` times the sum, the whole divisor.": operations
            / size
            * (matrix + moved),
            "That is bytes for each operation: turn it over.": 1 / right,
            "Half of it is missing: each number is multiplied *and* added, two operations.": right / 2,
            "You divided by how many numbers there are: each takes `size` bytes.": right * size,
            "You count the operations of one token: every token is multiplied with the whole matrix.": right / tokens,
            "Those are the operations alone: divide by the bytes.": operations,
            "Those are the bytes alone: the operations are divided by them.": size * (matrix + moved),
            "You count the matrix alone: what goes in and what comes out is moved as well.": operations
            / (size * matrix),
            "What comes out is missing: `n_out` numbers for each token are written.": operations
            / (size * (matrix + tokens * n_in)),
            "What goes in is missing: `n_in` numbers for each token are read.": operations
            / (size * (matrix + tokens * n_out)),
            "You read the matrix anew for every token: it is read once, for all of them.": operations
            / (size * (tokens * matrix + moved)),
        }
        for message, wrong in mistakes.items():
            if _near(got, float(wrong)):
                return Verdict(False, message)
        return Verdict(
            False,
            f"For {tokens} tokens, {n_in} × {n_out} numbers of {size} bytes: {operations:,} operations on "
            f"{size * (matrix + moved):,} bytes. That is {right:.3g}, not {got:.3g}.",
        )
    return Verdict(True, "Almost proportional to the tokens: the matrix is read once, however many share it.")


@checker
def check_experts_awake(answer: Callable[[int, int, int], object]) -> Verdict:
    """A function from experts, choices and tokens to how many experts of a layer are chosen at all, by chance."""
    for experts, choices, tokens in ((8, 2, 3), (8, 2, 1), (8, 2, 16), (64, 6, 10)):
        missed = (1 - choices / experts) ** tokens
        right = experts * (1 - missed)
        got = _number(partial(answer, experts, choices, tokens))
        if _near(got, right):
            continue
        case = f"With {experts} experts, {choices} for each of {tokens} tokens"
        mistakes = {
            "those are the experts that nobody chose: subtract them from all.": experts * missed,
            "that is a share of the experts: multiply by how many there are.": 1 - missed,
            "that is the chance that one expert is missed by all: go on from there.": missed,
            "you count every choice as a new expert: tokens often choose the same one.": min(experts, choices * tokens),
            "you let a token choose the same expert twice: its choices differ, so a token misses an expert with "
            f"{1 - choices / experts:.2f}.": experts * (1 - (1 - 1 / experts) ** (choices * tokens)),
            f"each token takes one expert in your count: it takes {choices}.": experts
            * (1 - (1 - 1 / experts) ** tokens),
            "you raised the chance to be chosen to a power: it is the chance to be *missed* that is multiplied.": experts
            * (1 - (choices / experts) ** tokens),
            "you say all of them: some may be missed by every token.": experts,
        }
        for message, wrong in mistakes.items():
            if _near(got, float(wrong)):
                return Verdict(False, f"{case}, {message}")
        return Verdict(False, f"{case}, {right:.2f} experts are awake on average, not {got:.4g}.")
    return Verdict(True, "An expert sleeps only if every token misses it, which soon becomes unlikely.")


@checker
def check_nucleus(answer: Callable[[list[float], float], object]) -> Verdict:
    """A function from probabilities and p to {token: probability}, of the tokens that top-p keeps."""
    cases = (
        ([0.125, 0.5, 0.125, 0.25], 0.7),
        ([0.125, 0.5, 0.0625, 0.3125], 0.3),
        ([0.5, 0.25, 0.125, 0.125], 0.75),
        ([0.125, 0.5, 0.0625, 0.3125], 1.0),
    )
    for chances, p in cases:
        order = sorted(range(len(chances)), key=lambda token: -chances[token])
        n = _reached([chances[token] for token in order], p)
        kept = order[:n]
        total = sum(chances[token] for token in kept)
        given = asked(answer, list(chances), p)
        if not isinstance(given, dict):
            return Verdict(
                False, f"Return a dictionary from token to probability, such as {{1: 0.6, 3: 0.4}}, not {given!r}."
            )
        got = {int(token): float(chance) for token, chance in given.items() if float(chance)}
        case = f"For {chances} and p = {p}"
        if set(got) == set(kept):
            if all(math.isclose(got[token], chances[token] / total, abs_tol=1e-3) for token in kept):
                continue
            if all(math.isclose(got[token], chances[token], abs_tol=1e-3) for token in kept):
                return Verdict(
                    False, f"{case} you keep the right tokens, but what is left must sum to 1: divide by {total:g}."
                )
            if all(math.isclose(got[token], chances[token] / p, abs_tol=1e-3) for token in kept):
                return Verdict(
                    False, f"{case} you divide by p: divide by what the kept tokens hold together, {total:g}, to get 1."
                )
            return Verdict(False, f"{case} the tokens are right, their probabilities are not.")
        if not got:
            return Verdict(
                False,
                f"{case} nothing is left: it is the running sum that must reach p, and the token that reaches it is kept.",
            )
        if set(got) == {token for token, chance in enumerate(chances) if chance >= p}:
            return Verdict(False, f"{case} you compare each probability with p: it is their running sum that counts.")
        if set(got) == set(order[: n - 1]):
            return Verdict(
                False,
                f"{case} you stop one too early: the kept tokens must hold *at least* p, so the one that reaches it stays.",
            )
        if set(got) == set(order[: n + 1]):
            return Verdict(False, f"{case} you keep one too many: once p is reached (equal is enough), stop.")
        if set(got) == set(range(len(kept))):
            return Verdict(
                False,
                f"{case} you keep the first tokens of the list, or their places after sorting: go by probability, "
                "and name tokens by their place in the list given.",
            )
        if set(got) == set(range(_reached(chances, p))):
            return Verdict(
                False,
                f"{case} you take the tokens in the order of the list: sort them first, the likeliest to the front.",
            )
        if set(got) == set(order[-len(kept) :]):
            return Verdict(False, f"{case} you begin with the least likely: sort the other way round.")
        return Verdict(False, f"{case} the tokens {sorted(kept)} are kept, not {sorted(got)}.")
    return Verdict(True, "The fewest tokens that hold p, and one unit of probability shared among them.")


def _reached(chances: list[float], p: float) -> int:
    """How many of the list, from its front, hold at least p."""
    return next(n for n in range(1, len(chances) + 1) if sum(chances[:n]) >= p)


def _number(ask: Callable[[], object]) -> float:
    """The number that an answer gives."""
    given = asked(ask)
    try:
        return float(given)
    except Exception:
        raise Over(Verdict(False, f"Return one number, not {given!r}.")) from None


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3)
