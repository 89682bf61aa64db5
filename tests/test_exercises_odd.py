"""Whatever an answer is, a checker has a verdict: never a traceback, never "Right" for nonsense; errors are the learner's own."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

import mixtral_lab
from mixtral_lab import exercises
from mixtral_lab.analysis import lens
from mixtral_lab.config import PRESETS

CHECKS = [name for name in exercises.__all__ if name.startswith("check_")]
ODD = [
    "cat", "", b"cat", math.nan, math.inf, 10**400, -1, True, 1 + 2j, [], (), {}, {1}, [[1], 2], ["a", None], [None], [[1, 2], [3]],
    {"a": 1}, {0: "b"}, object(), int, range(3), iter([1, "b"]), np.zeros((2, 3)), np.array(["a", "b"]), torch.zeros(2, 3),
    torch.tensor([math.nan, 1.0]), torch.zeros(0),
]  # fmt: skip


@pytest.fixture(scope="module")
def others():
    """What the checkers take besides the answer, by name."""
    lab = mixtral_lab.load("mini-mixtral")
    trace = lab.trace(
        "Once upon a time there was a", sites=[*lens.attribution_sites(lab.config), "layers.*.router.logits"]
    )
    chosen = trace.routing.experts
    return {
        "config": PRESETS["mistral-7b-v0.1"].config, "seq": 32768, "said": lens.attribution(lab.model, trace),
        "chosen": chosen[0], "machines": 4, "fine": chosen, "rounded": chosen.roll(1, dims=1), "tokenizer": lab.tokenizer,
        "trace": trace, "layer": 2, "position": 3, "logits": [2.0, 1.0, 0.5, 0.0],
    }  # fmt: skip


def ask(name, answer, others):
    check = getattr(exercises, name)
    _, *wanted = inspect.signature(check).parameters.values()
    return check(answer, **{one.name: others[one.name] for one in wanted if one.default is one.empty})


def wants_a_function(name):
    return getattr(exercises, name).__doc__.startswith("A function")


@pytest.mark.parametrize("name", CHECKS)
def test_odd_answers_get_a_verdict(name, others):
    for odd in ODD:
        verdict = ask(name, (lambda *_, odd=odd: odd) if wants_a_function(name) else odd, others)
        assert isinstance(verdict, exercises.Verdict)
        assert verdict.solved is False, (odd, verdict)
        assert verdict.message.strip()


@pytest.mark.parametrize("name", [name for name in CHECKS if wants_a_function(name)])
def test_a_result_in_place_of_the_function(name, others):
    assert "Give the function itself" in repr(ask(name, 3.5, others))


@pytest.mark.parametrize("error", [TypeError, ValueError, IndexError, RuntimeError])
@pytest.mark.parametrize("name", [name for name in CHECKS if wants_a_function(name)])
def test_an_error_of_the_learners_own_is_shown_as_such(name, error, others):
    def answer(*_):
        raise error("a slip of the learner's")

    said = repr(ask(name, answer, others))
    assert f"{error.__name__}: a slip of the learner's" in said
    assert "stopped" in said


def test_rounding_is_called_rounding():
    def intensity(tokens, n_in, n_out, size):
        return round(2 * tokens * n_in * n_out / (size * (n_in * n_out + tokens * (n_in + n_out))), 2)

    assert "rounded" in repr(exercises.check_intensity(intensity))
    assert "rounded" in repr(exercises.check_route_by_hand(lambda logits, k: {1: 0.73, 3: 0.27}))


def test_the_kind_of_list_does_not_matter(others):
    tokenizer = others["tokenizer"]
    assert exercises.check_chat_by_hand(lambda talk: torch.tensor(tokenizer.chat(talk)), tokenizer).solved
    heads = exercises.check_shared_head(lambda head, n, kv: torch.arange(n) // (n // kv))
    assert "one query head" in heads.message


def test_empty_slots_are_to_be_left_out():
    def with_none(store, seen):
        cut = seen % len(store) if seen > len(store) else 0
        store = [x if i < seen else None for i, x in enumerate(store)]
        return store[cut:] + store[:cut]

    assert "leave them out" in repr(exercises.check_oldest_first(with_none))
