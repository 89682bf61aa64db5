"""The training step: the hand-written gradient, the losses, the schedule, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_lab.config import PRESETS
from mixtral_lab.model import Routing, Transformer
from mixtral_lab.model.moe import Experts, Router, mix_dense, route
from mixtral_lab.train import pretrain, stream
from mixtral_lab.train.mixture import mix_for_training

TINY = replace(
    PRESETS["mini-mixtral"].config,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden=24,
    vocab=64,
)
RECIPE = replace(pretrain.RECIPES["cpu"], rows=6, seq=16, long_seq=32, long_every=3, warmup_steps=2)


@pytest.fixture(autouse=True)
def eager():
    """The compiled step computes the same; compiling it here would only cost a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@settings(max_examples=8)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(0, 99))
def test_the_gradient_by_hand_is_autograds(n_choices, seq, seed):
    torch.manual_seed(seed)
    experts, router = Experts(16, 24, 5), Router(16, 5, n_choices)
    x = torch.randn(2, seq, 16)

    def gradients(mix):
        read = x.clone().requires_grad_()
        parameters = [*experts.parameters(), *router.parameters()]
        out = mix(read, router(read), experts.ffn)
        (out * torch.linspace(-1, 1, 16)).sum().backward()
        found = [out.detach(), read.grad] + [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    for plain, fast in zip(gradients(mix_dense), gradients(mix_for_training), strict=True):
        assert (plain - fast).norm() <= 0.02 * plain.norm() + 1e-3  # bfloat16 keeps 8 bits


def test_balance_loss_is_one_when_even_and_grows_with_collapse():
    even = route(torch.eye(4).repeat(3, 1)[None] * 1e-3, 1)
    assert pretrain.balance_loss(even).item() == pytest.approx(1.0, abs=1e-3)
    collapsed = route(torch.tensor([[[9.0, 0.0, 0.0, 0.0]] * 12]), 1)
    assert pretrain.balance_loss(collapsed).item() == pytest.approx(4.0, abs=0.01)


def test_z_loss_by_hand():
    routing = Routing(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0]]]), torch.tensor([[[1.0]]]))
    assert pretrain.z_loss(routing).item() == pytest.approx(np.log(2) ** 2)


def test_the_learning_rate_rises_then_falls():
    recipe = pretrain.RECIPES["cpu"]
    assert pretrain.learning_rate(recipe, 0, 0.0) == pytest.approx(recipe.peak_lr / recipe.warmup_steps)
    assert pretrain.learning_rate(recipe, 10_000, 0.0) == pytest.approx(recipe.peak_lr)
    assert pretrain.learning_rate(recipe, 10_000, 1.0) == pytest.approx(recipe.peak_lr * recipe.min_lr_share)


def tokens(seed=0):
    random = np.random.default_rng(seed)
    return stream.Tokens(
        ("a", "b", "c"), tuple(random.integers(d * 20, d * 20 + 9, 500).astype(np.uint16) for d in range(3))
    )


def test_batches_draw_evenly_and_the_same_each_time():
    ids, domain = tokens().batch(step=5, rows=6, seq=10)
    again, _ = tokens().batch(step=5, rows=6, seq=10)
    other, _ = tokens().batch(step=6, rows=6, seq=10)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    assert domain.bincount().tolist() == [2, 2, 2]
    assert torch.equal(ids[:, 0] // 20, domain)


def test_bigram_loss_against_an_obvious_version():
    random = np.random.default_rng(0)
    train, held = random.integers(0, 5, 200), random.integers(0, 5, 50)
    losses = []
    for m in (3.0, 10.0, 30.0, 100.0, 300.0):
        total = 0.0
        for a, b in pairwise(held):
            pair = sum(1 for x, y in pairwise(train) if (x, y) == (a, b))
            before = sum(1 for x in train[:-1] if x == a)
            single = (sum(1 for x in train if x == b) + 1) / (200 + 5)
            total -= np.log((pair + m * single) / (before + m))
        losses.append(total / 49)
    got = stream.bigram_loss(train.astype(np.uint16), held.astype(np.uint16), 5)
    assert got == pytest.approx(min(losses))


@pytest.mark.parametrize("experts", [8, None])
def test_a_run_learns_logs_and_resumes_exactly(experts, tmp_path):
    config = TINY if experts else replace(TINY, n_experts=None, n_choices=None, window=8)
    torch.manual_seed(0)

    def new_run():
        model = Transformer(config)
        pretrain.initialise(model, seed=0)
        return pretrain.Run(model, replace(RECIPE, peak_lr=0.01), torch.device("cpu"))

    run, text = new_run(), tokens()
    before = run.held_out(text, rows=4)
    pretrain.train(run, text, text, tmp_path, tokens=96 * 12, minutes=60.0)
    after = run.held_out(text, rows=4)
    assert all(after[d] < before[d] - 0.3 for d in "abc")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    report = next(line for line in lines if "loss" in line)
    assert set(report["by_domain"]) == {"a", "b", "c"}
    assert ("largest_share" in report) == bool(experts)

    again = new_run()
    again.resume(tmp_path)
    assert (again.step, again.tokens) == (run.step, run.tokens) == (12, 96 * 12)
    assert again.held_out(text, rows=4) == after
    for one in (run, again):
        ids, domain = text.batch(one.step, 6, 16)
        one.train_step(ids, domain, lr=1e-3)
    for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", ["evaluate", "pretrain"])
def test_without_a_corpus_a_sentence_says_what_to_do(module, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", f"mixtral_lab.train.{module}", "--corpus", str(tmp_path / "none")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr and "mixtral-lab: " in ran.stderr
