"""Checkers of lesson 07: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import pytest
import torch

import mixtral_lab
from mixtral_lab.exercises import check_gigabytes_and_speed, check_rms_norm, check_wrong_part, miswired


def rms_norm(x, weight, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, eps=eps)


def of_sum(x, weight, eps):
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (rms_norm, True, "same size"),
        (lambda x, weight, eps: None, None, "still returns None"),
        (layer_norm, False, "LayerNorm"),
        (of_sum, False, "take their mean"),
        (lambda x, weight, eps: rms_norm(x, 1.0, eps), False, "`weight` is missing"),
        (lambda x, weight, eps: rms_norm(x, weight, 0.0), False, "`eps` is missing"),
        (lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight, False, "outside"),
        (lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True) + eps) * weight, False, "root"),
        (lambda x, weight, eps: x / (x.square().mean(0) + eps).sqrt() * weight, False, "over the tokens"),
        (lambda x, weight, eps: x / (x.square().mean() + eps).sqrt() * weight, False, "one mean over everything"),
        (lambda x, weight, eps: x * (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight, False, "divide"),
        (lambda x, weight, eps: x, False, "off by up to"),
        (lambda x, weight, eps: x[0], False, "shape"),
        (lambda x, weight, eps: "no", False, "Wanted is"),
        (lambda x, weight, eps: x / (x.square().mean(-1) + eps), False, "stopped with RuntimeError"),
        (lambda x, weight, eps: x / (x.square().mean(-1) + eps).sqrt() * weight, False, "without `keepdim=True`"),
        (lambda x, weight, eps: rms_norm(x, weight, 1e-5), False, "do not write 1e-5"),
        (lambda x, weight, eps: x / (x.var(-1, keepdim=True) + eps).sqrt() * weight, False, "`var` takes"),
    ],
)
def test_rms_norm(answer, solved, says):
    verdict = check_rms_norm(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        ((4, "experts"), True, "w1 and w3"),
        (None, None, "still None"),
        ((4, "attention"), False, "residual.between"),
        ((5, "attention"), False, "One step late"),
        ((7, "experts"), False, "the largest"),
        ((2, "attention"), False, "look further on"),
        ((8, "experts"), False, "no layer 8"),
        (("last", "experts"), False, "must be a number"),
        ((4, "router"), False, "either"),
        (4, False, "a layer and a part"),
    ],
)
def test_wrong_part(answer, solved, says):
    verdict = check_wrong_part(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def test_the_miswired_model_differs_first_where_the_checker_says_and_leaves_the_model_alone():
    lab = mixtral_lab.load("mini-mixtral", device="cpu", dtype="float32")
    text, sites = "Once upon a time", "layers.*.residual.*"
    before, broken, after = (
        lab.trace(text, sites=sites),
        miswired(lab).trace(text, sites=sites),
        lab.trace(text, sites=sites),
    )
    names = [f"layers.{layer}.residual.{place}" for layer in range(8) for place in ("between", "after")]
    different = [name for name in names if not torch.allclose(before[name], broken[name], atol=1e-4)]
    assert different[0] == "layers.4.residual.after"
    assert all(torch.equal(before[name], after[name]) for name in names)


def solution(config, bits, bandwidth):
    return config.parameters * bits / 8e9, bandwidth / (config.active_parameters * bits / 8e9)


def stored_alone(config, bits, bandwidth):
    size = solution(config, bits, bandwidth)[0]
    return size, bandwidth / size


def active_alone(config, bits, bandwidth):
    size = config.active_parameters * bits / 8e9
    return size, bandwidth / size


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (solution, True, "must fit"),
        (lambda *given: None, None, "still returns None"),
        (lambda *given: solution(*given)[::-1], False, "wrong order"),
        (stored_alone, False, "only the active"),
        (active_alone, False, "all experts must be at hand"),
        (lambda c, b, w: (c.parameters * b / 1e9, 1.0), False, "gigabits"),
        (lambda c, b, w: (c.parameters * b / 8, 1.0), False, "divide by 1e9"),
        (lambda c, b, w: (c.parameters * b / 8 / 2**30, 1.0), False, "2**30"),
        (lambda c, b, w: solution(c, 16, w), False, "2 bytes per number"),
        (lambda c, b, w: (solution(c, b, w)[0], 1 / solution(c, b, w)[1]), False, "turn it over"),
        (lambda c, b, w: (solution(c, b, w)[0], w / (c.active_parameters / 1e9)), False, "not by numbers"),
        (lambda c, b, w: (solution(c, b, w)[0], 1.0), False, "that is not 1.0 tokens"),
        (lambda c, b, w: (7.0, 1.0), False, "are 93.4 GB"),
        (lambda c, b, w: 93.4, False, "Return two numbers"),
        (lambda c, b, w: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_gigabytes_and_speed(answer, solved, says):
    verdict = check_gigabytes_and_speed(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)
