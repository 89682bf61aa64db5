"""The compiled decode step is the decode step. Run by test_compile.py, without the checks of shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_model import random_model
from test_parity import mixtral

from mixtral_lab import generate
from mixtral_lab.edit import editing
from mixtral_lab.generate import Sampling, compile_decode, decode, generate_ids, prefill
from mixtral_lab.lora import Factors, LoRA, attached, new_adapter
from mixtral_lab.model import Transformer
from mixtral_lab.model.linear import dots
from mixtral_lab.model.moe import bank


@pytest.fixture(scope="module", params=["sparse", "dense", "bfloat16"])
def model(request) -> Transformer:
    torch.manual_seed(1)
    dense = {"n_experts": None, "n_choices": None} if request.param == "dense" else {}
    found = random_model(mixtral(window=6, **dense)).requires_grad_(False)
    return found.bfloat16() if request.param == "bfloat16" else found


@pytest.fixture(scope="module")
def step(model):
    return compile_decode(model)


@pytest.mark.parametrize("length", [9, 40])
def test_it_is_decode_beyond_the_window_and_for_any_length(model, step, length):
    ids = torch.randint(model.config.vocab, (1, 4))
    mine, theirs = model.new_cache(1, length), model.new_cache(1, length)
    prefill(model, ids, mine)
    prefill(model, ids, theirs)
    near = {"atol": 1e-4, "rtol": 1e-4} if model.embed.weight.dtype == torch.float32 else {"atol": 0.25, "rtol": 0.1}
    for token in torch.randint(model.config.vocab, (length - 4, 1)):
        torch.testing.assert_close(step(model, token, mine, None), decode(model, token, theirs), **near)
    for one, other in zip(mine, theirs, strict=True):
        assert one.seen == other.seen == length
        torch.testing.assert_close(one.keys, other.keys, **near)


def test_matrices_read_at_several_places(model, monkeypatch):
    """As large ones are: here all whose rows can be shared out, in attention, experts and at the end."""
    monkeypatch.setattr("mixtral_lab.model.linear.LARGE", 0)
    test_it_is_decode_beyond_the_window_and_for_any_length(model, compile_decode(model), 9)


def test_dots_by_hand(monkeypatch):
    monkeypatch.setattr("mixtral_lab.model.linear.LARGE", 0)
    compiled = torch.compile(lambda matrix, vector: dots(matrix, vector), fullgraph=True)
    vector = torch.randn(24)
    for rows in (4, 10, 40):  # 10 cannot be shared out among four places
        matrix = torch.randn(3, rows, 24)
        torch.testing.assert_close(compiled(matrix, vector), matrix @ vector, atol=1e-5, rtol=1e-5)


def test_hooks_and_edits_are_not_passed_over(model, step):
    if model.config.n_experts is None or model.embed.weight.dtype != torch.float32:
        return
    cache, same, edited = (model.new_cache(1, 9) for _ in range(3))
    ids = torch.randint(model.config.vocab, (1, 4))
    for one in (cache, same, edited):
        prefill(model, ids, one)
    token = torch.tensor([3])
    plain = step(model, token, cache, None)
    with editing(model, {"layers.0.residual.after": lambda x: x.flip(-1)}):
        changed = step(model, token, edited, None)
    assert (plain - changed).abs().max() > 1e-3
    seen = []
    hook = model.layers[0].experts.ffn.register_forward_hook(lambda *_: seen.append("never: a list is not called"))
    down = [expert.down.register_forward_hook(lambda *_: seen.append("down")) for expert in model.layers[0].experts.ffn]
    step(model, token, same, None)
    for one in (hook, *down):
        one.remove()
    assert seen == ["down"] * model.config.n_choices


def put(name: str, value: Callable[[Any], Any]):
    """A change that can be taken back: another part, parameter or number under this name."""
    where, _, own = name.rpartition(".")

    @contextmanager
    def change(model):
        owner = model.get_submodule(where)
        before = getattr(owner, own)
        setattr(owner, own, value(before))
        try:
            yield
        finally:
            if own == "forward":
                delattr(owner, own)
            else:
                setattr(owner, own, before)

    return change


@contextmanager
def moved(model):
    weight = model.layers[1].experts.ffn[2].up.weight
    before = weight.data
    weight.data = before * 3
    try:
        yield
    finally:
        weight.data = before


@contextmanager
def adapted(model):
    adapter = new_adapter(model.config, LoRA(rank=2))
    changed = {name: Factors(a, torch.ones_like(b)) for name, (a, b) in adapter.factors.items()}
    with attached(model, replace(adapter, factors=changed)):
        yield


class Silent(torch.nn.Module):
    def forward(self, x, *_):
        return torch.zeros_like(x)


def tripled(weight):
    return torch.nn.Parameter(weight.detach() * 3, requires_grad=False)


def half(_):
    return lambda x, *_: 0.5 * x


CHANGES = {
    "an expert's parameter": put("layers.0.experts.ffn.1.gate.weight", tripled),
    "attention's parameter": put("layers.1.attention.query.weight", tripled),
    "the embedding": put("embed.weight", tripled),
    "an expert": put("layers.1.experts.ffn.3", lambda _: Silent()),
    "an expert's forward": put("layers.0.experts.ffn.0.forward", half),
    "a norm's forward": put("final_norm.forward", half),
    "attention's forward": put("layers.0.attention.forward", half),
    "a site": put("layers.0.residual.after", lambda _: Silent()),
    "a number": put("layers.0.router.n_choices", lambda _: 1),
    "where a weight lies": moved,
    "an adapter": adapted,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_writes_as_it_is_now(model, step, change, monkeypatch):
    if model.config.n_experts is None or model.embed.weight.dtype != torch.float32:
        return
    ids, eager = torch.randint(model.config.vocab, (1, 60)), []
    monkeypatch.setattr(generate, "decode", lambda *given: eager.append(1) or decode(*given))

    def after(step):
        cache = model.new_cache(1, 60)
        prefill(model, ids[:, :12], cache)
        return torch.cat([step(model, token, cache, None) for token in ids[0, 12:, None]])

    before = after(step)
    assert not eager
    with change(model):
        # Not bit by bit: MKL's products on an AMD processor depend on where their factors lie in memory.
        torch.testing.assert_close(after(step), after(decode), atol=1e-5, rtol=1e-5)
        assert eager
        assert (after(step) - before).abs().max() > 1e-3
    eager.clear()
    torch.testing.assert_close(after(step), before, atol=1e-5, rtol=1e-4)
    assert not eager


def test_a_model_with_other_parts_is_compiled_with_them(model):
    if model.config.n_experts is None or model.embed.weight.dtype != torch.float32:
        return
    ids = torch.randint(model.config.vocab, (1, 30))

    def after(step):
        cache = model.new_cache(1, 30)
        prefill(model, ids[:, :12], cache)
        return torch.cat([step(model, token, cache, None) for token in ids[0, 12:, None]])

    with adapted(model):
        step = compile_decode(model)
        inside = after(step)
        assert not torch.equal(inside, after(decode))  # compiled, so rounded otherwise
        torch.testing.assert_close(inside, after(decode), atol=1e-4, rtol=1e-4)
    assert (after(decode) - inside).abs().max() > 1e-3
    assert torch.equal(after(step), after(decode))


def test_models_do_not_share_a_step(model, step):
    """torch.compile keeps what it made with the code that it made it of."""
    if model.config.n_experts is None or model.embed.weight.dtype != torch.float32:
        return
    other = random_model(mixtral(window=6, n_choices=3)).requires_grad_(False)
    cache, same = other.new_cache(1, 9), other.new_cache(1, 9)
    token = torch.tensor([3])
    prefill(other, torch.tensor([[1, 2, 3]]), cache)
    prefill(other, torch.tensor([[1, 2, 3]]), same)
    torch.testing.assert_close(
        compile_decode(other)(other, token, cache, None), decode(other, token, same), atol=1e-4, rtol=1e-4
    )


def test_texts_are_the_same(model, step):
    if model.embed.weight.dtype != torch.float32:
        return
    prompt = [[1, 2, 3, 4, 5]]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        plain = list(generate_ids(model, prompt, 20, sampling))
        assert list(generate_ids(model, prompt, 20, sampling, decode=step)) == plain
    several = [[1, 2, 3], [4, 5, 6, 7]]
    assert list(generate_ids(model, several, 5, decode=step)) == list(generate_ids(model, several, 5))


def test_a_bank_is_a_view_where_weights_lie_evenly():
    model = random_model(mixtral()).requires_grad_(False)
    experts = model.layers[0].experts.swiglus
    assert bank(experts) is None
    before = [expert.up.weight.clone() for expert in experts]
    laid = bank(experts, copy=True)
    for e, expert in enumerate(experts):
        assert laid.up[e].data_ptr() == expert.up.weight.data_ptr()
        assert torch.equal(expert.up.weight, before[e])
    again = bank(experts)
    assert again is not None and again.down.data_ptr() == laid.down.data_ptr()


def test_a_weight_that_was_replaced_is_seen():
    model = random_model(mixtral()).requires_grad_(False).eval()
    for block in model.blocks:
        block.experts.lay_out()
    ids = torch.tensor([[5]])
    with torch.no_grad():
        before = model(ids)
        for expert in model.layers[0].experts.ffn:
            expert.down.weight.data = expert.down.weight * 3
        after = model(ids)
        model.layers[0].experts.dispatch = "dense"
        torch.testing.assert_close(model(ids), after, atol=1e-5, rtol=1e-4)
    assert (before - after).abs().max() > 1e-3
