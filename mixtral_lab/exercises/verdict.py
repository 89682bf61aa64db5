"""What every checker answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor

Given = ParamSpec("Given")


class Verdict(NamedTuple):
    """`solved` is None while nothing was tried. In a notebook only the message is shown."""

    solved: bool | None
    message: str

    def __repr__(self) -> str:
        return {True: "Right. ", False: "Not yet. ", None: "Your turn. "}[self.solved] + self.message


class Over(Exception):
    """Raised inside a checker where there is nothing more to check. `checker` returns its verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict


def checker(check: Callable[Concatenate[Any, Given], Verdict]) -> Callable[Concatenate[Any, Given], Verdict]:
    """A check that has a verdict on whatever it is given.

    Where it asks for a function (the first words of its docstring), anything else is told so. An answer so odd that the
    check itself stops over it (numbers of the wrong kind, infinities, arrays where one number is compared) is told what
    is wanted, not shown a traceback.
    """
    wanted = " ".join((check.__doc__ or "").split("\n\n")[0].split())
    wanted = wanted[:1].lower() + wanted[1:]

    @functools.wraps(check)
    def checked(answer: Any, *others: Given.args, **named: Given.kwargs) -> Verdict:
        if wanted.startswith("a function") and not callable(answer):
            return Verdict(False, f"Give the function itself, its name without brackets, not {_short(answer)}.")
        try:
            return check(answer, *others, **named)
        except Over as over:
            return over.verdict
        except Exception as error:
            return Verdict(
                False, f"This answer cannot be compared with the right one ({said(error)}). Wanted is {wanted}"
            )

    return checked


def asked(answer: Callable[..., object], *given: object, case: str = "", later: bool = False) -> Any:
    """What a learner's function returns. One that stops, or still returns None, ends the check with a word about that.

    `case` ends that word, where what was given needs saying: " with k = 1". None counts as not tried, but not in a `later`
    case, when others were answered.
    """
    try:
        got = answer(*given)
    except Exception as error:
        raise Over(Verdict(False, f"Your function stopped{case} with {said(error)}.")) from error
    if got is None:
        raise Over(Verdict(False if later else None, f"The function still returns None{case if later else ''}."))
    return got


def said(error: Exception) -> str:
    """The kind of an error and its first line, for the middle of a sentence."""
    first = (str(error).splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _short(answer: object) -> str:
    shown = " ".join(repr(answer).split())
    return shown if len(shown) <= 60 else shown[:60] + " …"


def judged(got: Tensor, right: Tensor, mistakes: dict[str, Tensor], praise: str) -> Verdict:
    """A tensor beside the right one, and beside those of the usual mistakes, by what to say of each."""
    if torch.allclose(got, right, atol=1e-4):
        return Verdict(True, praise)
    for message, wrong in mistakes.items():
        if torch.allclose(got, wrong, atol=1e-4):
            return Verdict(False, message)
    return Verdict(False, f"The shape is right, the numbers are not: off by up to {(got - right).abs().max():.2g}.")
