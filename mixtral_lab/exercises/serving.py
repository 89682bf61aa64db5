"""Lesson 15, serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from mixtral_lab.exercises.verdict import Over, Verdict, asked, checker, said

SAID, OTHER = "Once there was  a café.", "Nobody knows."
MOST_TRIES = 5


@checker
def check_read_events(answer: Callable[[list[str]], object]) -> Verdict:
    """A function from the lines of a stream to the text of answer 0."""
    try:
        got = asked(answer, _stream())
    except Over as over:
        if not isinstance(over.__cause__, json.JSONDecodeError):
            raise
        return Verdict(
            False,
            "A line that is not JSON was read as JSON: skip what does not begin with 'data: ', and end at 'data: [DONE]'.",
        )
    if not isinstance(got, str):
        return Verdict(False, f"Return the text as one string, not {type(got).__name__}: ''.join(pieces).")
    if got == SAID:
        return Verdict(True, "Comments and empty lines mean nothing, index tells answers apart, and [DONE] is the end.")
    if "late" in got:
        return Verdict(False, "Something after [DONE] was read: that line is the end, whatever follows.")
    if any(word in got for word in OTHER.split()):
        return Verdict(False, "Two answers are mixed: keep the events whose choice has index 0.")
    if got and got in SAID:
        return Verdict(False, f"Only {got!r} arrived: go through all lines, and join what each brings.")
    if "".join(got.split()) == "".join(SAID.split()):
        return Verdict(
            False, f"The spaces are not right, {got!r}: join the pieces as they are, neither stripped nor spaced."
        )
    return Verdict(False, f"Expected {SAID!r}, but got {got!r}.")


def _stream() -> list[str]:
    def event(index: int, content: str, reason: str | None = None) -> list[str]:
        choice = {"index": index, "delta": {"content": content}, "finish_reason": reason}
        return ["data: " + json.dumps({"id": "chatcmpl-1", "choices": [choice]}), ""]

    lines = event(0, "") + event(1, "") + [": still there", ""]
    pieces, others = ["Once", " there", " was", " ", " a", " café", "."], ["Nobody", " knows", "."]
    for at, piece in enumerate(pieces):
        lines += event(0, piece) + (event(1, others[at]) if at < len(others) else [])
    return lines + event(0, "", "stop") + event(1, "", "stop") + ["data: [DONE]", ""] + event(0, " Too late.")


Said = tuple[int, dict[str, str], object]  # status, headers, answer
Post = Callable[[], Said]


@checker
def check_ask_again(answer: Callable[[Post, Callable[[float], None]], object]) -> Verdict:
    """A function that asks a busy server again, from `post()` and `sleep(seconds)` to the answer or None."""
    busy: Said = (429, {"Retry-After": "2"}, "busy")
    full: Said = (503, {"Retry-After": "5"}, "busy")
    right: Said = (200, {}, "Hello")
    try:
        got, posts, sleeps = _played(answer, [busy, full, right])
        if got is None and not posts:
            return Verdict(None, "The function does not ask yet.")
        if posts == 1:
            return Verdict(False, "You gave up after one 429: wait, and ask again.")
        if got == "busy":
            return Verdict(False, "You returned the answer of a server that was busy: return only what came with 200.")
        if got != "Hello":
            return Verdict(False, f"After 429, 503 and 200 the answer is 'Hello', but you returned {got!r}.")
        if not sleeps:
            return Verdict(False, "You asked again at once: call sleep first, or a busy server becomes a busier one.")
        if any(isinstance(seconds, str) for seconds in sleeps):
            return Verdict(False, "You handed a text to sleep: headers are texts, so make a number of it with float().")
        if sleeps != [2.0, 5.0]:
            return Verdict(False, f"You waited {sleeps} seconds, but Retry-After said 2, then 5.")
        got, posts, _ = _played(answer, [(422, {}, "wrong"), right])
        if posts > 1:
            return Verdict(False, "You asked again after 422: a request that is wrong stays wrong. Return None.")
        if got is not None:
            return Verdict(False, f"After 422 there is no answer: return None, not {got!r}.")
        got, posts, _ = _played(answer, [busy] * 100)
        if posts != MOST_TRIES:
            return Verdict(False, f"While the server stayed busy you asked {posts} times: give up after {MOST_TRIES}.")
    except _AskedForEver:
        return Verdict(False, f"While the server stays busy you never stop asking: give up after {MOST_TRIES} times.")
    return Verdict(True, "Wait as long as you are told, a few times, and only where waiting can help.")


class _AskedForEver(BaseException):
    """Past the end of the script. No `except Exception` of an answer stops it."""


def _played(
    answer: Callable[[Post, Callable[[float], None]], object], script: list[Said]
) -> tuple[object, int, list[object]]:
    """What a function returns from a server that follows a script, how often it asked, and how it waited."""
    posts = 0
    sleeps: list[object] = []

    def post() -> Said:
        nonlocal posts
        posts += 1
        if posts > len(script):
            raise _AskedForEver
        return script[posts - 1]

    try:
        got = answer(post, sleeps.append)
    except Exception as error:
        raise Over(Verdict(False, f"Your function stopped with {said(error)}.")) from error
    return got, posts, sleeps


@checker
def check_routed_rows(answer: Callable[[dict[str, Any]], object]) -> Verdict:
    """A function from an answer with routed experts to an array `layer seq choice` of prompt and answer."""
    prompt = np.arange(24).reshape(3, 4, 2) % 8
    written = (np.arange(16).reshape(2, 4, 2) + 5) % 8
    given = {"prompt_routed_experts": prompt.tolist(), "choices": [{"index": 0, "routed_experts": written.tolist()}]}
    found = asked(answer, given)
    got = np.asarray(found)
    rows = np.concatenate([prompt, written])
    right = rows.transpose(1, 0, 2)
    mistakes = {
        "The axes are still token, layer, choice: swap the first two (transpose(1, 0, 2)).": rows,
        "reshape cuts the numbers anew, so rows of one layer hold another's: use transpose.": rows.reshape(4, 5, 2),
        "These are the prompt's rows alone: the answer's are in choices[0].": prompt.transpose(1, 0, 2),
        "These are the answer's rows alone: the prompt's come before them.": written.transpose(1, 0, 2),
        "The answer's rows stand before the prompt's: the prompt was read first.": np.concatenate(
            [written, prompt]
        ).transpose(1, 0, 2),
    }
    if np.array_equal(got, right):
        return Verdict(True, "Five tokens, four layers, two choices each: now it is what our figures take.")
    for message, wrong in mistakes.items():
        if np.array_equal(got, wrong):
            return Verdict(False, message)
    return Verdict(
        False, f"Expected shape {right.shape}, layer seq choice, with the prompt first; yours is {got.shape}."
    )
