"""Every checker accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch

from mixtral_lab import bundled
from mixtral_lab.exercises import check_apply_merges, check_bytes_per_token, check_chat_by_hand
from mixtral_lab.exercises.tokens import apply_merges
from mixtral_lab.tokenizer import BPETokenizer, load_tokenizer

OURS = BPETokenizer.load(bundled.folder("mini-mixtral"))


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda text, tok: len(text.encode()) / len(tok.encode(text, bos=False)), True, "23 bytes in 12"),
        (lambda text, tok: None, None, "still returns None"),
        (lambda text, tok: len(text) / len(tok.encode(text, bos=False)), False, "19 characters"),
        (lambda text, tok: len(text.encode()) / len(tok.encode(text)), False, "counted <s> too"),
        (lambda text, tok: len(text) / len(tok.encode(text)), False, "and <s> as a token"),
        (lambda text, tok: len(tok.encode(text, bos=False)) / len(text.encode()), False, "turn the fraction over"),
        (lambda text, tok: len(text.encode()) // len(tok.encode(text, bos=False)), False, "drops the rest"),
        (lambda text, tok: len(text.encode()), False, "number of bytes"),
        (lambda text, tok: len(tok.encode(text, bos=False)), False, "number of tokens"),
        (lambda text, tok: 7.0, False, "yours is 7.000"),
        (lambda text, tok: float("nan"), False, "yours is nan"),
        (lambda text, tok: "many", False, "one number"),
        (lambda text, tok: torch.ones(2), False, "one number"),
        (lambda text: 1.0, False, "TypeError"),
    ],
)
def test_bytes_per_token(answer, solved, says):
    verdict = check_bytes_per_token(answer, OURS)
    assert verdict.solved is solved
    assert says in repr(verdict)


def by_replacing(word, merges):
    text = " ".join(word)
    for left, right in merges:
        text = text.replace(f"{left} {right}", left + right)
    return text.split(" ")


def longest_first(word, merges):
    known, pieces = {*word, *(left + right for left, right in merges)}, []
    while word:
        size = max(n for n in range(1, len(word) + 1) if word[:n] in known)
        pieces.append(word[:size])
        word = word[size:]
    return pieces


def first_place_only(word, merges):
    pieces = list(word)
    for left, right in merges:
        for at in range(len(pieces) - 1):
            if pieces[at : at + 2] == [left, right]:
                pieces[at : at + 2] = [left + right]
                break
    return pieces


def overlapping(word, merges):
    pieces = list(word)
    for left, right in merges:
        joined, used = [], False
        for at, piece in enumerate(pieces):
            if pieces[at : at + 2] == [left, right]:
                joined.append(left + right)
                used = True
            elif not used:
                joined.append(piece)
            else:
                used = False
        pieces = joined
    return pieces


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (lambda word, merges: list(apply_merges(word, merges)), True, "in the order"),
        (lambda word, merges: None, None, "still returns None"),
        (lambda word, merges: None if merges else list(word), False, "returns None"),
        (lambda word, merges: list(word), False, "nothing was merged"),
        (first_place_only, False, "first place only"),
        (lambda word, merges: apply_merges(word, merges[::-1]), False, "from the last to the first"),
        (longest_first, False, "longest token"),
        (by_replacing, False, "used up by the first merge"),
        (overlapping, False, "only one pair can join"),
        (lambda word, merges: "".join(word), False, "list of pieces"),
        (lambda word, merges: list(word)[1:], False, "must spell it"),
        (lambda word, merges: [word], False, "the pieces are ['r', 'e', 'd']"),
        (lambda word, merges: [word[:9] / 2], False, "TypeError"),
    ],
)
def test_apply_merges(answer, solved, says):
    verdict = check_apply_merges(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)


def test_merges_give_what_the_library_gives():
    tiny = BPETokenizer.train(["the", "then", "there", "these", "thin", "red", "reed"], vocab=6 + 256 + 3)
    merges = [("t", "h"), ("th", "e"), ("r", "e")]
    for word in ("there", "three", "reread", "theatre", "hthe"):
        assert list(apply_merges(word, merges)) == tiny.pieces(tiny.encode(word, bos=False))


def by_hand(begin=(1,), question=" {} ", answer=" {}", end=(2,), opens=(4,), closes=(5,), bos=False):
    def write(messages):
        ids = list(begin)
        for message in messages:
            user = message["role"] == "user"
            new = OURS.encode((question if user else answer).format(message["content"]), bos=bos)
            ids += [*opens, *new, *closes] if user else [*new, *end]
        return ids

    return write


def spaces_by_themselves(messages):
    space, ids = OURS.encode(" ", bos=False), [1]
    for message in messages:
        said = OURS.encode(message["content"], bos=False)
        ids += [4, *space, *said, *space, 5] if message["role"] == "user" else [*space, *said, 2]
    return ids


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (by_hand(), True, "27 ids"),
        (spaces_by_themselves, False, "in one piece"),
        (lambda messages: tuple(by_hand()(messages)), True, "27 ids"),
        (lambda messages: None, None, "still returns None"),
        (by_hand(question="[INST] {} [/INST]", opens=(), closes=()), False, "typed as text"),
        (by_hand(bos=True), False, "start of every message"),
        (by_hand(begin=()), False, "begin with <s>"),
        (by_hand(end=()), False, "how the model learnt to stop"),
        (lambda messages: [*by_hand()(messages), 2], False, "assistant's turn"),
        (by_hand(closes=()), False, "one [INST] before it"),
        (by_hand(opens=(5,), closes=(4,)), False, "must come as"),
        (by_hand(question="{}"), False, "but the spaces"),
        (by_hand(answer=" {} "), False, "but the spaces"),
        (lambda messages: by_hand()([*messages[:2], messages[0]]), False, "The first 18 ids are right"),
        (lambda messages: by_hand()(messages)[:5], False, "end with </s>"),
        (lambda messages: by_hand()([dict(m, content=m["content"].lower()) for m in messages]), False, "first 2 ids"),
        (lambda messages: by_hand()(messages) if len(messages) == 3 else [], False, "a single one does not"),
        (lambda messages: [1, [4]], False, "list inside your list"),
        (lambda messages: "<s>[INST]", False, "the model reads ids"),
        (lambda messages: 7, False, "list of ids"),
        (lambda messages: ["a"], False, "whole numbers"),
        (lambda messages: [99_999], False, "no token 99999"),
        (lambda messages: messages[9], False, "IndexError"),
    ],
)
def test_chat_by_hand(answer, solved, says):
    verdict = check_chat_by_hand(answer, OURS)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)


def test_another_chat_format_is_judged_without_our_control_tokens():
    """Mistral's first tokenizer writes [INST] as three tokens."""
    theirs = load_tokenizer(str(files("mistral_common") / "data" / "tokenizer.model.v1"))
    assert check_chat_by_hand(theirs.chat, theirs).solved is True
    wrong = check_chat_by_hand(lambda messages: theirs.chat(messages)[1:], theirs)
    assert wrong.solved is False and "Not what tokenizer.chat gives" in wrong.message
