"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mixtral_lab.exercises import check_ask_again, check_read_events, check_routed_rows


def read_events(lines, *, keep=(0,), done=True, change=lambda text: text, join="".join):
    pieces = []
    for line in lines:
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            if done:
                break
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        if choice["index"] in keep:
            pieces.append(change(choice["delta"]["content"]))
    return join(pieces)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (read_events, True, "[DONE] is the end"),
        (lambda lines: None, None, "still returns None"),
        (lambda lines: [json.loads(line) for line in lines], False, "not JSON was read as JSON"),
        (lambda lines: read_events(lines, join=list), False, "one string, not list"),
        (lambda lines: read_events(lines, done=False), False, "after"),
        (lambda lines: read_events(lines, keep=(0, 1)), False, "mixed"),
        (lambda lines: read_events(lines[:14]), False, "Only 'Once there' arrived"),
        (lambda lines: read_events(lines, change=str.strip), False, "spaces are not right"),
        (lambda lines: read_events(lines, join=" ".join), False, "spaces are not right"),
        (lambda lines: "something else", False, "Expected"),
        (lambda lines: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_read_events(answer, solved, says):
    verdict = check_read_events(answer)
    assert verdict.solved is solved
    assert says in verdict.message, verdict.message


def ask_again(post, sleep, *, tries=5, wait=True, again=(429, 503), seconds=None):
    for _ in range(tries):
        status, headers, answer = post()
        if status == 200:
            return answer
        if status not in again:
            return None
        if wait:
            sleep(float(headers.get("Retry-After", 1)) if seconds is None else seconds)
    return None


def for_ever(post, sleep):
    while True:
        try:
            status, headers, answer = post()
            if status == 200:
                return answer
            if status not in (429, 503):
                return None
            sleep(float(headers["Retry-After"]))
        except Exception:
            continue


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (ask_again, True, "Wait as long as you are told"),
        (lambda post, sleep: None, None, "does not ask yet"),
        (lambda post, sleep: post()[2], False, "gave up after one 429"),
        (lambda post, sleep: [post(), post()][1][2], False, "a server that was busy"),
        (lambda post, sleep: ask_again(post, sleep, tries=2), False, "you returned None"),
        (lambda post, sleep: ask_again(post, sleep, wait=False), False, "at once"),
        (lambda post, sleep: ask_again(post, sleep, seconds=1), False, "Retry-After said 2, then 5"),
        (
            lambda post, sleep: ask_again(post, sleep, again=(422, 429, 503)),
            False,
            "a request that is wrong stays wrong",
        ),
        (lambda post, sleep: ask_again(post, sleep) or "sorry", False, "return None, not 'sorry'"),
        (lambda post, sleep: ask_again(post, sleep, tries=50), False, "you asked 50 times"),
        (for_ever, False, "you never stop asking"),
        (lambda post, sleep: ask_again(post, lambda seconds: sleep(f"{seconds:g}")), False, "make a number of it"),
        (lambda post, sleep: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_ask_again(answer, solved, says):
    verdict = check_ask_again(answer)
    assert verdict.solved is solved and says in verdict.message, verdict.message


def rows(answer):
    return np.concatenate([answer["prompt_routed_experts"], answer["choices"][0]["routed_experts"]])


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda answer: rows(answer).transpose(1, 0, 2), True, "Five tokens"),
        (lambda answer: None, None, "still returns None"),
        (rows, False, "swap the first two"),
        (lambda answer: rows(answer).reshape(4, 5, 2), False, "reshape"),
        (lambda answer: np.swapaxes(answer["prompt_routed_experts"], 0, 1), False, "prompt's rows alone"),
        (lambda answer: np.swapaxes(answer["choices"][0]["routed_experts"], 0, 1), False, "answer's rows alone"),
        (lambda answer: np.roll(rows(answer), 2, axis=0).transpose(1, 0, 2), False, "stand before"),
        (lambda answer: np.zeros(3), False, "yours is (3,)"),
        (lambda answer: answer["routed_experts"], False, "KeyError"),
    ],
)
def test_routed_rows(answer, solved, says):
    verdict = check_routed_rows(answer)
    assert verdict.solved is solved and says in verdict.message, verdict.message
