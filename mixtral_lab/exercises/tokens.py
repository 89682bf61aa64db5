"""Lesson 02, tokens and chat templates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mixtral_lab.exercises.verdict import Verdict, asked, checker
from mixtral_lab.tokenizer import Tokenizer

Merges = Sequence[tuple[str, str]]

MENU = "Crêpes and café: 5€"  # 19 characters, 23 bytes


@checker
def check_bytes_per_token(answer: Callable[[str, Tokenizer], object], tokenizer: Tokenizer) -> Verdict:
    """A function from a text and a tokenizer to the bytes of the text that one token stands for, on average."""
    got = asked(answer, MENU, tokenizer)
    number = _number(got)
    if number is None:
        return Verdict(False, f"Return one number, not {got!r}.")
    n_bytes, n_tokens = len(MENU.encode()), len(tokenizer.encode(MENU, bos=False))
    usual = [
        (n_bytes / n_tokens, True, f"{n_bytes} bytes in {n_tokens} tokens."),
        (
            len(MENU) / n_tokens,
            False,
            f"You counted the {len(MENU)} characters; é and € take more than one byte: use text.encode().",
        ),
        (
            n_bytes / (n_tokens + 1),
            False,
            "You counted <s> too, which is no part of the text: encode(text, bos=False).",
        ),
        (len(MENU) / (n_tokens + 1), False, "You counted characters instead of bytes, and <s> as a token of the text."),
        (n_tokens / n_bytes, False, "That is tokens per byte: turn the fraction over."),
        (n_bytes // n_tokens, False, "You divided with //, which drops the rest: use /."),
        (n_bytes, False, "That is the number of bytes: divide it by the number of tokens."),
        (n_tokens, False, "That is the number of tokens: divide the number of bytes by it."),
    ]
    for value, solved, message in usual:
        if math.isclose(number, value, rel_tol=1e-6):
            return Verdict(solved, message)
    return Verdict(False, f"For {MENU!r} the answer is {n_bytes / n_tokens:.3f}, and yours is {number:.3f}.")


# What to encode, with which merges, and what went wrong if the pieces are these.
BY_MERGES: tuple[tuple[str, Merges, dict[str, tuple[str, ...]]], ...] = (
    ("red", (), {}),
    (
        "banana",
        (("a", "n"),),
        {"You merged the first place only: a merge happens wherever its pair stands.": ("b", "an", "a", "n", "a")},
    ),
    ("then", (("t", "h"), ("th", "e")), {"You went through the merges from the last to the first.": ("th", "e", "n")}),
    (
        "ath",
        (("a", "t"), ("t", "h")),
        {
            "In 'ath' the t was used up by the first merge, yet you merged it once more: only whole pieces may join "
            "(replacing inside a joined string does not see where a piece begins).": ("ath",)
        },
    ),
    (
        "there",
        (("e", "r"), ("t", "h"), ("th", "e"), ("the", "r")),
        {
            "You took the longest token that fits. The merges go in their order: here e and r join before the e can join th.": (
                "ther",
                "e",
            )
        },
    ),
    ("aaa", (("a", "a"),), {"In aaa only one pair can join: the middle a is then used up.": ("aa", "aa")}),
)  # fmt: skip


@checker
def check_apply_merges(answer: Callable[[str, list[tuple[str, str]]], object]) -> Verdict:
    """A function from a word and merges, in the order they were learnt, to the pieces of the word."""
    for word, merges, usual in BY_MERGES:
        got = asked(answer, word, list(merges), case=f" for {word!r}", later=word != BY_MERGES[0][0])
        if isinstance(got, str) or not isinstance(got, (list, tuple)):
            return Verdict(False, f"Return a list of pieces, such as ['th', 'e'], not {got!r}.")
        pieces, right = tuple(got), apply_merges(word, merges)
        if pieces == right:
            continue
        for message, wrong in usual.items():
            if pieces == wrong:
                return Verdict(False, message)
        if merges and pieces == tuple(word):
            return Verdict(False, f"For {word!r} with {list(merges)} nothing was merged.")
        if "".join(map(str, pieces)) != word:
            return Verdict(False, f"The pieces of {word!r} must spell it, but {list(pieces)} do not.")
        return Verdict(False, f"For {word!r} with {list(merges)} the pieces are {list(right)}, not {list(pieces)}.")
    return Verdict(True, "Merges in the order they were learnt, each wherever its pair stands.")


def apply_merges(word: str, merges: Merges) -> tuple[str, ...]:
    """The word's characters, joined pair by pair in the order of the merges."""
    pieces = list(word)
    for pair in merges:
        joined: list[str] = []
        at = 0
        while at < len(pieces):
            width = 2 if tuple(pieces[at : at + 2]) == tuple(pair) else 1
            joined.append("".join(pieces[at : at + width]))
            at += width
        pieces = joined
    return tuple(pieces)


TALK = (
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello! How are you?"},
    {"role": "user", "content": "What colour is the sky?"},
)


@checker
def check_chat_by_hand(answer: Callable[[list[dict[str, str]]], object], tokenizer: Tokenizer) -> Verdict:
    """A function from messages to ids, equal to `tokenizer.chat`, for our own chat format."""
    got = asked(answer, [dict(message) for message in TALK])
    ids = _ids(got, tokenizer)
    if isinstance(ids, Verdict):
        return ids
    right = tokenizer.chat(TALK)
    begin, end, opens, closes = (_id(tokenizer, name) for name in ("<s>", "</s>", "[INST]", "[/INST]"))
    if ids == right:
        one = tokenizer.chat(TALK[:1])
        alone = _ids(asked(answer, [dict(TALK[0])], case=" with a single message", later=True), tokenizer)
        if alone != one:
            return Verdict(
                False, "Three messages come out right, but a single one does not: go through whatever comes."
            )
        return Verdict(True, f"{len(right)} ids, the same as tokenizer.chat gives.")
    if begin is None or end is None or opens is None or closes is None:
        return Verdict(
            False, "Not what tokenizer.chat gives. (Hints are for the chat format of the models in the box.)"
        )
    if opens not in ids and closes not in ids:
        return Verdict(
            False, "There is no control token: [INST] typed as text is ordinary characters. Use the ids 4 and 5."
        )
    if ids.count(begin) > 1:
        return Verdict(False, "<s> stands at the start of every message: encode with bos=False and put 1 first, once.")
    if begin not in ids:
        return Verdict(False, "The conversation must begin with <s>, id 1.")
    if end not in ids:
        return Verdict(False, "The assistant's answer must end with </s>, id 2: that is how the model learnt to stop.")
    if ids == [*right, end]:
        return Verdict(
            False, "There is a </s> at the end, but it is the assistant's turn: nothing comes after [/INST]."
        )
    if ids.count(opens) != 2 or ids.count(closes) != 2:
        return Verdict(False, "Each of the two questions needs one [INST] before it and one [/INST] behind it.")
    if [i for i in ids if tokenizer.is_control(i)] != [i for i in right if tokenizer.is_control(i)]:
        return Verdict(False, "The control tokens must come as <s> [INST] [/INST] </s> [INST] [/INST].")
    if tokenizer.decode(ids) == tokenizer.decode(right):
        return Verdict(
            False,
            "The text is right, but it is cut differently: a space belongs to the token after it, so encode each message "
            "in one piece, with its spaces.",
        )
    if tokenizer.decode(ids).replace(" ", "") == tokenizer.decode(right).replace(" ", ""):
        return Verdict(
            False,
            "All is there but the spaces: one before and one after each question, one before each answer, none elsewhere.",
        )
    at = next((i for i, (a, b) in enumerate(zip(ids, right, strict=False)) if a != b), min(len(ids), len(right)))
    return Verdict(
        False,
        f"The first {at} ids are right; then come {tokenizer.pieces(ids[at : at + 3])} instead of "
        f"{tokenizer.pieces(right[at : at + 3])}.",
    )


def _ids(got: object, tokenizer: Tokenizer) -> list[int] | Verdict:
    if isinstance(got, str):
        return Verdict(False, "That is a text; the model reads ids: encode each message.")
    if not isinstance(got, Iterable):
        return Verdict(False, f"Return a list of ids, not {got!r}.")
    try:
        listed: list[Any] = list(got)
        if any(isinstance(one, (list, tuple)) for one in listed):
            return Verdict(False, "There is a list inside your list: join them with +, or with * in front: [1, *ids].")
        ids = [int(one) for one in listed]
    except Exception:  # whatever an answer may hold
        return Verdict(False, "Return a flat list of whole numbers.")
    wrong = [one for one in ids if not 0 <= one < tokenizer.vocab]
    return Verdict(False, f"There is no token {wrong[0]}.") if wrong else ids


def _id(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of a control token, by its name; None if there is none."""
    known = (i for i in range(tokenizer.vocab) if tokenizer.is_control(i) and tokenizer.pieces([i]) == [name])
    return next(known, None)


def _number(got: object) -> float | None:
    try:
        return float(got)  # type: ignore[arg-type]
    except Exception:  # whatever an answer may be
        return None
