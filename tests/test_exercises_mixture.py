"""Checkers of lesson 06: the solution, the stub, and a word for each usual mistake."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixtral_lab.exercises import check_feed_forward_numbers, check_mixture, check_swiglu


def swiglu(x, gate, up, down):
    return down @ (F.silu(gate @ x) * (up @ x))


def mixture(x, chosen, weights, experts):
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token, choice = (chosen == i).nonzero(as_tuple=True)
        if len(token):
            y[token] += weights[token, choice, None] * expert(x[token])
    return y


def every_expert(x, chosen, weights, experts):
    gates = torch.zeros(len(x), len(experts)).scatter(-1, chosen, weights)
    return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(experts))


def token_by_token(x, chosen, weights, experts):
    rows = [
        sum(w * experts[e](x[t : t + 1]) for e, w in zip(chosen[t], weights[t], strict=True)) for t in range(len(x))
    ]
    return torch.cat(rows)


def overwriting(x, chosen, weights, experts):
    y = torch.zeros_like(x)
    for c in range(chosen.shape[1]):
        for t in range(len(x)):
            y[t] = weights[t, c] * experts[chosen[t, c]](x[t : t + 1])[0]
    return y


def unweighed(x, chosen, weights, experts):
    return mixture(x, chosen, torch.ones_like(weights), experts)


def averaged(x, chosen, weights, experts):
    return mixture(x, chosen, torch.full_like(weights, 0.5), experts)


def first_alone(x, chosen, weights, experts):
    return mixture(x, chosen[:, :1], weights[:, :1], experts)


def exchanged(x, chosen, weights, experts):
    return mixture(x, chosen, weights.flip(1), experts)


def calling_all(x, chosen, weights, experts):
    experts[3](x[:0])
    return mixture(x, chosen, weights, experts)


def assigning(x, chosen, weights, experts):
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token, choice = (chosen == i).nonzero(as_tuple=True)
        y[token] = weights[token, choice, None] * expert(x[token])
    return y


def weighing_the_question(x, chosen, weights, experts):
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        token, choice = (chosen == i).nonzero(as_tuple=True)
        y[token] += expert(weights[token, choice, None] * x[token])
    return y


def one_row_too_many(x, chosen, weights, experts):
    experts[3](x[:1])
    return mixture(x, chosen, weights, experts)


def numbers(config):
    one = 3 * config.dim * config.hidden * config.n_layers
    return config.n_experts * one, config.n_choices * one


def with_router(config):
    return [n + config.n_layers * config.n_experts * config.dim for n in numbers(config)]


def one_of(config):
    return 3 * config.dim * config.hidden * config.n_layers


CASES = [
    (check_swiglu, swiglu, True, "The gate opens"),
    (check_swiglu, lambda x, g, u, d: None, None, "still returns None"),
    (check_swiglu, lambda x, g, u, d: d @ ((g @ x) * F.silu(u @ x)), False, "wrong side"),
    (check_swiglu, lambda x, g, u, d: d @ ((g @ x).sigmoid() * (u @ x)), False, "sigmoid of the gate"),
    (check_swiglu, lambda x, g, u, d: d @ ((g @ x).relu() * (u @ x)), False, "a relu"),
    (check_swiglu, lambda x, g, u, d: d @ ((g @ x) * (u @ x)), False, "no bend"),
    (check_swiglu, lambda x, g, u, d: d @ (F.silu(g @ x) + u @ x), False, "added the two"),
    (check_swiglu, lambda x, g, u, d: d @ F.silu(g @ x), False, "`up` is missing"),
    (check_swiglu, lambda x, g, u, d: d @ F.silu(u @ x), False, "`gate` is missing"),
    (check_swiglu, lambda x, g, u, d: d @ F.silu((g @ x) * (u @ x)), False, "silu of the product"),
    (check_swiglu, lambda x, g, u, d: F.silu(g @ x) * (u @ x), False, "shape (4,), but has (6,)"),
    (check_swiglu, lambda x, g, u, d: x @ g, False, "so `gate @ x`"),
    (check_swiglu, lambda x, g, u, d: torch.zeros(4), False, "off by"),
    (check_swiglu, lambda x, g, u, d: "out", False, "Wanted is"),
    (check_mixture, mixture, True, "Each expert once"),
    (check_mixture, token_by_token, True, "called the experts 10 times"),
    (check_mixture, calling_all, False, "nobody chose expert 3"),
    (check_mixture, assigning, False, "add it (+=)"),
    (check_mixture, lambda x, c, w, e: mixture(x, c, w[:, :1].expand_as(w), e), False, "weight of the first choice"),
    (check_mixture, weighing_the_question, False, "not the question"),
    (check_mixture, lambda x, c, w, e: None, None, "still returns None"),
    (check_mixture, every_expert, False, "every expert read every row"),
    (check_mixture, one_row_too_many, False, "[3, 3, 4, 1] rows"),
    (check_mixture, unweighed, False, "without their weights"),
    (check_mixture, averaged, False, "averaged"),
    (check_mixture, first_alone, False, "Only the first choice"),
    (check_mixture, overwriting, False, "do not overwrite"),
    (check_mixture, exchanged, False, "exchanged"),
    (check_mixture, lambda x, c, w, e: x[:2], False, "shape (5, 3)"),
    (check_mixture, lambda x, c, w, e: e[9](x), False, "IndexError"),
    (check_feed_forward_numbers, numbers, True, "Memory goes with"),
    (check_feed_forward_numbers, lambda c: None, None, "still returns None"),
    (check_feed_forward_numbers, lambda c: numbers(c)[::-1], False, "wrong order"),
    (check_feed_forward_numbers, lambda c: [n // c.n_layers for n in numbers(c)], False, "one layer"),
    (check_feed_forward_numbers, lambda c: [n // 3 for n in numbers(c)], False, "one matrix"),
    (check_feed_forward_numbers, lambda c: [n * 2 // 3 for n in numbers(c)], False, "two matrices"),
    (check_feed_forward_numbers, with_router, False, "router too"),
    (check_feed_forward_numbers, lambda c: (c.parameters, c.active_parameters), False, "whole model"),
    (check_feed_forward_numbers, lambda c: (numbers(c)[0], one_of(c)), False, "not one"),
    (check_feed_forward_numbers, lambda c: (numbers(c)[0], numbers(c)[0]), False, "only 2 of 8"),
    (check_feed_forward_numbers, lambda c: (8 * one_of(c), 2 * one_of(c)), False, "written into your code"),
    (check_feed_forward_numbers, lambda c: (numbers(c)[0], 5), False, "not 5"),
    (check_feed_forward_numbers, lambda c: (5, 5), False, "not 5"),
    (check_feed_forward_numbers, lambda c: 5, False, "two numbers"),
    (check_feed_forward_numbers, lambda c: c.experts, False, "AttributeError"),
]


@pytest.mark.parametrize(("check", "answer", "solved", "says"), CASES)
def test_mixture(check, answer, solved, says):
    verdict = check(answer)
    assert verdict.solved is solved, verdict
    assert says in repr(verdict)
