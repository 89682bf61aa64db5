"""Lesson 14, chat."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker
from mixtral_lab.tokenizer import Tokenizer, TokenizerError

Messages = list[dict[str, str]]


@checker
def check_temperature(answer: Callable[[list[float], float], object]) -> Verdict:
    """A function from probabilities at temperature 1 and a temperature to the probabilities at that temperature."""
    for chances, temperature in (([0.5, 0.25, 0.25], 2.0), ([0.6, 0.3, 0.1], 0.5), ([0.6, 0.3, 0.1], 1.0)):
        given = asked(answer, list(chances), temperature)
        got = [float(one) for one in given]
        powers = [p ** (1 / temperature) for p in chances]
        if len(got) == len(chances) and _near(got, _shared(powers)):
            continue
        case = f"For {chances} at temperature {temperature:g}"
        mistakes = {
            "the powers are right, but they must sum to 1: divide each by their sum.": powers,
            "you raised to the temperature; the exponent is one *divided* by it: hot is flat.": _shared(
                [p**temperature for p in chances]
            ),
            "you took the exponential of the probabilities: what is divided by the temperature are logits, `log(p)`.": _shared(
                [math.exp(p / temperature) for p in chances]
            ),
            "you divided the probabilities themselves, which sharing out again undoes: divide their logarithms.": chances,
        }
        for message, wrong in mistakes.items():
            if len(got) == len(wrong) and _near(got, wrong):
                return Verdict(False, f"{case} {message}")
        right = [round(p, 3) for p in _shared(powers)]
        return Verdict(False, f"{case} the answer is {right}, not {[round(p, 3) for p in got]}.")
    return Verdict(True, "Below 1 the likely gain, above 1 the unlikely; the order never changes.")


# Texts in the bytes of their tokens, some of which end inside a character.
CUT = (
    (b"A", b" cat"),
    (b"cr", b"\xc3", b"\xa8me"),
    (b"hi \xf0\x9f", b"\x99", b"\x82", b"!"),
    (b"\xe2\x82", b"\xac5 \xc3", b"\xa9"),
)


@checker
def check_stream(answer: Callable[[list[bytes]], object]) -> Verdict:
    """A function from the bytes of an answer's tokens to the text that each token lets us show ("" for none yet)."""
    for parts in CUT:
        try:
            got = list(asked(answer, list(parts)))
        except (Over, UnicodeDecodeError) as over:  # a generator stops here
            if isinstance(over, Over) and not isinstance(over.__cause__, UnicodeDecodeError):
                raise
            return Verdict(
                False, f"{b''.join(parts)!r} stopped with an error: a token may end inside a character; keep its bytes."
            )
        if not all(isinstance(text, str) for text in got):
            return Verdict(False, f"For {list(parts)} return texts (str), one for each token, not {got!r}.")
        right = _streamed(parts)
        if got == right:
            continue
        case, whole = f"For {list(parts)}", b"".join(parts).decode()
        if any("\ufffd" in text for text in got):
            return Verdict(False, f"{case} you show �: half a character must wait until the rest of it is there.")
        if got == [part.decode(errors="ignore") for part in parts]:
            return Verdict(False, f"{case} the character that is cut is lost: keep its first bytes for the next token.")
        if got == [part.decode("latin-1") for part in parts]:
            return Verdict(False, f"{case} you made every byte a character of its own: the bytes are UTF-8.")
        if got == ["".join(right[: at + 1]) for at in range(len(right))]:
            return Verdict(False, f"{case} you return all of the text each time: only what is new is shown.")
        if "".join(got) == whole and len(got) < len(parts):
            return Verdict(False, f'{case} return one text for each token, "" where nothing can be shown yet.')
        if "".join(got) == whole:
            return Verdict(False, f"{case} the text is right, but it comes too late: {right} can be shown.")
        return Verdict(False, f"{case} the answer is {right}, not {got}.")
    return Verdict(True, "Whole characters at once, halves when they are complete.")


TALK: Messages = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am Mini, a small Mixtral model."},
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "The sky is blue."},
    {"role": "user", "content": "Tell me a story about a cat."},
    {"role": "assistant", "content": "Once upon a time, there was a cat who liked the rain. The end."},
    {"role": "user", "content": "Another one, please."},
]


@checker
def check_trim(answer: Callable[[Messages, int], object], tokenizer: Tokenizer) -> Verdict:
    """A function from messages and a budget to the messages without as many of the oldest turns as the budget demands."""

    def size(messages: Sequence[dict[str, str]]) -> int:
        return len(tokenizer.chat(messages))

    for talk in (TALK, TALK[1:]):
        opening = [message for message in talk if message["role"] == "system"]
        said = talk[len(opening) :]
        shorter = [[*opening, *said[2 * dropped :]] for dropped in range(4)]
        for right, budget in ((0, 2048), (1, size(shorter[1])), (2, size(shorter[1]) - 1), (0, size(talk)), (3, 1)):
            given_talk = copy.deepcopy(talk)
            try:
                got = [dict(message) for message in asked(answer, given_talk, budget)]
            except Over as over:
                if not isinstance(over.__cause__, TokenizerError):
                    raise
                return Verdict(
                    False,
                    f"What you kept is no conversation any more ({str(over.__cause__).rstrip('.')}): drop a question with its "
                    "answer, and keep the system message and the last question.",
                )
            if got == shorter[right]:
                continue
            return Verdict(False, _why_not(got, talk, shorter, right, budget, size))
    return Verdict(True, "Whole turns go, the oldest first; the system message and the question stay.")


def _why_not(
    got: Messages, talk: Messages, shorter: list[Messages], right: int, budget: int, size: Callable[[Messages], int]
) -> str:
    case = f"With {size(talk)} tokens and a budget of {budget:,}"
    if not got or got[-1] != talk[-1]:
        return f"{case} the last question is gone: it stays whatever the budget, or there is nothing to answer."
    if talk[0]["role"] == "system" and got[0] != talk[0]:
        return f"{case} the system message is gone: it holds for the whole conversation and stays."
    if any(message not in talk for message in got):
        return f"{case} a message was changed: whole turns go, texts are not cut."
    said = [message["role"] for message in got if message["role"] != "system"]
    if said[0] != "user" or any(a == b for a, b in itertools.pairwise(said)):
        return f"{case} a question is parted from its answer: drop both, so that the rest still begins with the user."
    if got in shorter:
        dropped = shorter.index(got)
        if dropped < right:
            return f"{case} {size(got)} tokens are left, which is too many: go on until it fits."
        if dropped == right + 1 and size(shorter[right]) == budget:
            return f"{case} one turn too many is gone: a conversation of just {budget:,} tokens fits."
        return f"{case} more turns are gone than need be, too many by {dropped - right}: stop as soon as it fits."
    return f"{case} other turns than the oldest are gone."


def _streamed(parts: Sequence[bytes]) -> list[str]:
    texts, waiting = [], b""
    for part in parts:
        waiting += part
        text = waiting.decode(errors="ignore")
        texts.append(text)
        waiting = waiting[len(text.encode()) :]
    return texts


def _shared(powers: Sequence[float]) -> list[float]:
    return [power / sum(powers) for power in powers]


def _near(got: Sequence[float], expected: Sequence[float]) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(got, expected, strict=True))
