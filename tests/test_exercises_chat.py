"""Every checker of lesson 14 accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import codecs
import math

import pytest

from mixtral_lab import bundled
from mixtral_lab.exercises import check_stream, check_temperature, check_trim
from mixtral_lab.exercises.chat import TALK
from mixtral_lab.tokenizer import BPETokenizer

OURS = BPETokenizer.load(bundled.folder("mini-mixtral"))


def size(messages) -> int:
    return len(OURS.chat(messages))


def shared(powers):
    powers = list(powers)
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda chances, t: shared(p ** (1 / t) for p in chances), True, "the order never changes"),
        (lambda chances, t: shared(math.exp(math.log(p) / t) for p in chances), True, "the order never changes"),
        (lambda chances, t: None, None, "still returns None"),
        (lambda chances, t: [p ** (1 / t) for p in chances], False, "must sum to 1"),
        (lambda chances, t: shared(p**t for p in chances), False, "one *divided* by it"),
        (lambda chances, t: shared(math.exp(p / t) for p in chances), False, "exponential of the probabilities"),
        (lambda chances, t: shared(p / t for p in chances), False, "divided the probabilities"),
        (lambda chances, t: [1.0], False, "the answer is [0.414"),
        (lambda chances, t: "hot", False, "ValueError"),
        (lambda chances: chances, False, "TypeError"),
        (lambda chances, t: [float("nan")] * 3, False, "nan"),
    ],
)
def test_temperature(answer, solved, says):
    verdict = check_temperature(answer)
    assert verdict.solved is solved and says in repr(verdict)


def streamed(parts):
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(part) for part in parts]


def so_far(parts):
    texts = streamed(parts)
    return ["".join(texts[: at + 1]) for at in range(len(texts))]


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (streamed, True, "halves when they are complete"),
        (lambda parts: None, None, "still returns None"),
        (lambda parts: [part.decode() for part in parts], False, "keep its bytes"),
        (lambda parts: [part.decode(errors="replace") for part in parts], False, "you show �"),
        (lambda parts: [part.decode(errors="ignore") for part in parts], False, "is lost"),
        (lambda parts: [part.decode("latin-1") for part in parts], False, "every byte a character"),
        (so_far, False, "only what is new"),
        (lambda parts: [""] * (len(parts) - 1) + [b"".join(parts).decode()], False, "too late"),
        (lambda parts: [text for text in streamed(parts) if text], False, 'one text for each token, ""'),
        (lambda parts: list(parts), False, "return texts (str)"),
        (lambda parts: ["x"] * len(parts), False, "the answer is"),
        (lambda parts: 3, False, "TypeError"),
    ],
)
def test_stream(answer, solved, says):
    verdict = check_stream(answer)
    assert verdict.solved is solved and says in repr(verdict)


def trim(messages, budget):
    start = messages[0]["role"] == "system"
    while size(messages) > budget and len(messages) > start + 1:
        messages = messages[:start] + messages[start + 2 :]
    return messages


def at_fault(change):
    return lambda messages, budget: change(trim(list(messages), budget))


def one_by_one(messages, budget):
    start = messages[0]["role"] == "system"
    while sum(len(OURS.encode(m["content"])) + 2 for m in messages) > budget and len(messages) > start + 1:
        messages = messages[:start] + messages[start + 1 :]
    return messages


def from_the_front(messages, budget):
    while size(messages) > budget and len(messages) > 2:
        messages = messages[2:] if messages[0]["role"] == "user" else messages[1:]
    return messages


def until_below(messages, budget):
    start = messages[0]["role"] == "system"
    while size(messages) >= budget and len(messages) > start + 1:
        messages = messages[:start] + messages[start + 2 :]
    return messages


def measured_in_pieces(messages, budget):
    while size(messages) > budget:
        messages = messages[1:]
    return messages


def newest_first(messages, budget):
    start = messages[0]["role"] == "system"
    while size(messages) > budget and len(messages) > start + 1:
        messages = messages[:-3] + messages[-1:]
    return messages


def cut_text(messages, budget):
    if size(messages) <= budget:
        return messages
    messages[1]["content"] = messages[1]["content"][:3]
    return messages


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (trim, True, "Whole turns go"),
        (lambda messages, budget: None, None, "still returns None"),
        (one_by_one, False, "parted from its answer"),
        (from_the_front, False, "system message is gone"),
        (until_below, False, "one turn too many"),
        (measured_in_pieces, False, "no conversation any more (Message 1 is by 'assistant'"),
        (newest_first, False, "other turns than the oldest"),
        (cut_text, False, "texts are not cut"),
        (lambda messages, budget: messages, False, "too many: go on"),
        (lambda messages, budget: [] if budget < 9 else trim(messages, budget), False, "last question is gone"),
        (lambda messages, budget: trim(messages, budget - 60), False, "than need be"),
        (lambda messages, budget: 3, False, "TypeError"),
    ],
)
def test_trim(answer, solved, says):
    verdict = check_trim(answer, OURS)
    assert verdict.solved is solved and says in repr(verdict), verdict


def test_the_talk_is_as_the_checker_says():
    assert [m["role"] for m in TALK] == ["system", *["user", "assistant"] * 3, "user"]
