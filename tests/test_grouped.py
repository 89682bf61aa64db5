"""All experts' products in one call: the same as expert by expert, on a CPU through the functions that a GPU takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import random_model
from test_parity import mixtral

import mixtral_lab
from mixtral_lab.edit import ablate, editing
from mixtral_lab.model import Transformer, moe
from mixtral_lab.model.linear import Linear, onednn_works, portable
from mixtral_lab.model.moe import Experts, Router, SwiGLU, take_grouped, take_one_by_one
from mixtral_lab.sites import recording

IDS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(3))


def laid_out(**changes) -> Transformer:
    model = random_model(mixtral(hidden=24, **changes)).requires_grad_(False)
    for block in model.blocks:
        block.experts.lay_out()
    return model


def dispatched(model: Transformer, dispatch: str) -> Transformer:
    for block in model.blocks:
        block.experts.dispatch = dispatch
    return model


@contextmanager
def counted(monkeypatch) -> Iterator[list[int]]:
    """How often rows were taken to all experts at once."""
    calls: list[int] = []

    def counting(rows, chosen, part, n_experts):
        calls.append(chosen.numel())
        return take_grouped(rows, chosen, part, n_experts)

    with monkeypatch.context() as patch:
        patch.setattr(moe, "take_grouped", counting)
        yield calls


@settings(max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(sorted),
    st.tuples(st.sampled_from([8, 24, 64]), st.sampled_from([8, 40])),
)
def test_it_is_expert_by_expert_whoever_gets_no_token(dtype, size, counts, shape):
    n_choices, n_experts = counts
    experts = Experts(*shape, n_experts).to(dtype).requires_grad_(False)
    experts.lay_out()
    x = torch.randn(*size, shape[0]).to(dtype)
    with torch.no_grad():
        routing = Router(shape[0], n_experts, n_choices).to(dtype)(x)
        assert experts._all_in_one(x) is not None
        bank = experts._all_in_one(x)
        rows = x.unsqueeze(-2).expand(*routing.experts.shape, -1)
        found = take_grouped(rows, routing.experts, bank.whole, n_experts).by_choice()
        expected = take_one_by_one(rows, routing.experts, experts.swiglus).by_choice()
        near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(found, expected, **near)
        outs = {}
        for experts.dispatch in ("grouped", "sorted"):
            outs[experts.dispatch] = experts(x, routing)
        torch.testing.assert_close(outs["grouped"], outs["sorted"], **near)


def test_on_a_cpu_it_pays_where_pytorchs_own_float32_product_is_taken(processor, monkeypatch):
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            model = laid_out().to(dtype)
            for block in model.blocks:
                block.experts.lay_out()
            with counted(monkeypatch) as calls:
                model(IDS)
            own = dtype == torch.float32 and not (processor == "AMD" and onednn_works())
            assert len(calls) == (len(model.blocks) if own else 0)
        with counted(monkeypatch) as calls, portable():
            laid_out()(IDS)
        with counted(monkeypatch) as more, torch.autocast("cpu", torch.bfloat16):
            laid_out()(IDS)
    with counted(monkeypatch) as learning:
        laid_out()(IDS)
    assert not calls and not more and not learning


def test_a_bank_waits_while_its_experts_are_others():
    model = dispatched(laid_out(), "grouped")
    experts = model.blocks[1].experts
    with torch.no_grad():
        before, bank = model(IDS), experts.bank
        assert bank is not None
        gate = experts.ffn[2].gate
        gate.forward = lambda x: Linear.forward(gate, x) * 2
        assert (model(IDS) - before).abs().max() > 1e-3 and experts.bank is bank
        del gate.forward
        torch.testing.assert_close(model(IDS), before)
        assert experts.bank is bank
        all_of_them, experts.ffn = experts.ffn, experts.ffn[:3]
        x = torch.randn(1, 5, 24)
        assert experts._all_in_one(x) is not None and len(experts.bank.gate) == 3
        experts.ffn = all_of_them.append(SwiGLU(24, 24))
        assert experts._all_in_one(x) is None  # the new one lies elsewhere
        torch.testing.assert_close(model(IDS), before)


def test_all_tokens_may_choose_one_expert():
    experts = Experts(16, 8, 4).requires_grad_(False)
    experts.lay_out()
    x, chosen = torch.randn(1, 5, 16), torch.full((1, 5, 1), 2)
    found = take_grouped(x.unsqueeze(-2), chosen, experts.bank.whole, 4).by_choice()
    torch.testing.assert_close(found[..., 0, :], experts.ffn[2](x))


def test_every_site_says_the_same(monkeypatch):
    model = laid_out()
    found = {}
    for dispatch in ("grouped", "sorted"):
        with counted(monkeypatch) as calls, torch.no_grad(), recording(dispatched(model, dispatch), ["*"]) as recorder:
            model(IDS[:1])
        found[dispatch] = recorder.values()
        assert len(calls) == (2 * 2 if dispatch == "grouped" else 0)  # hidden is looked at: twice in each of two layers
    assert found["grouped"].keys() == found["sorted"].keys()
    for site, values in found["sorted"].items():
        torch.testing.assert_close(found["grouped"][site], values, atol=1e-5, rtol=1e-4, msg=site)


@pytest.mark.parametrize("site", ["hidden", "out", "weighted"])
def test_a_write_takes_effect(site, monkeypatch):
    model, outs = laid_out(), {}
    for dispatch in ("grouped", "sorted"):
        dispatched(model, dispatch)
        with counted(monkeypatch) as calls, torch.no_grad():
            before = model(IDS)
            with editing(model, {f"layers.1.experts.{site}": lambda x: x * 0.5}):
                outs[dispatch] = model(IDS)
        assert bool(calls) == (dispatch == "grouped")
        assert (outs[dispatch] - before).abs().max() > 1e-3
    torch.testing.assert_close(outs["grouped"], outs["sorted"], atol=1e-4, rtol=1e-4)


def test_gradients_of_what_comes_in_and_of_trained_weights(monkeypatch):
    model, found = laid_out(), {}
    for dispatch in ("grouped", "sorted"):
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        block = dispatched(model, dispatch).blocks[0]
        with counted(monkeypatch) as calls:
            block.experts(x, block.router(x)).square().sum().backward()
        assert len(calls) == (dispatch == "grouped")
        found[dispatch] = x.grad
    torch.testing.assert_close(found["grouped"], found["sorted"], atol=1e-4, rtol=1e-4)
    model.requires_grad_(True)
    with counted(monkeypatch) as calls:
        dispatched(model, "grouped")(IDS).square().mean().backward()
    assert not calls  # weights that learn are taken expert by expert
    assert all(one.down.weight.grad is not None for one in model.blocks[0].experts.swiglus)


def test_hooks_inside_an_expert_are_not_passed_over(monkeypatch):
    model, seen = dispatched(laid_out(), "grouped"), []
    hook = model.blocks[0].experts.ffn[1].up.register_forward_hook(lambda *_: seen.append(1))
    with counted(monkeypatch) as calls, torch.no_grad():
        model(IDS)
    hook.remove()
    assert seen == [1] and len(calls) == 1  # the other layer


@pytest.mark.parametrize(
    "why", ["not laid out", "rows of 36 bytes", "a dtype apart", "no such operator", "small integers"]
)
def test_where_it_cannot_be_experts_run_in_turn(why, monkeypatch):
    changes = {"dim": 18, "n_heads": 2, "n_kv_heads": 1} if why == "rows of 36 bytes" else {}
    model = random_model(mixtral(**changes)).requires_grad_(False) if why == "not laid out" else laid_out(**changes)
    if why == "no such operator":
        monkeypatch.setattr(moe, "grouped_works", lambda device, dtype: False)
    if why == "rows of 36 bytes":
        model.bfloat16()
    if why == "small integers":
        for one in model.blocks[0].experts.ffn:
            one.gate = mixtral_lab.model.quantized.QuantizedLinear(torch.randn(64, 32), "int8")
        assert model.blocks[0].experts._all_in_one(torch.zeros(1, 1, 24)) is None
        return
    if why == "a dtype apart":
        assert model.blocks[0].experts._all_in_one(torch.zeros(1, 1, 24, dtype=torch.bfloat16)) is None
        return
    outs = {}
    with counted(monkeypatch) as calls, torch.no_grad():
        for dispatch in ("grouped", "dense"):
            outs[dispatch] = dispatched(model, dispatch)(IDS).float()
    assert not calls
    torch.testing.assert_close(outs["grouped"], outs["dense"], atol=0.3 if why.startswith("rows") else 1e-4, rtol=0.1)


def test_weights_that_were_replaced_are_seen():
    model = dispatched(laid_out(), "grouped")
    with torch.no_grad():
        before = model(IDS)
        for expert in model.blocks[0].experts.ffn:
            expert.down.weight.data = expert.down.weight * 3
        after = model(IDS)
        torch.testing.assert_close(dispatched(model, "dense")(IDS), after, atol=1e-4, rtol=1e-4)
    assert (before - after).abs().max() > 1e-2


def test_the_small_model_as_its_file_lies(monkeypatch):
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    dispatched(lab.model, "sorted")
    expected = lab.trace("Once upon a time there was", sites=["logits", "layers.*.router.experts"])
    dispatched(lab.model, "grouped")
    with counted(monkeypatch) as calls:
        found = lab.trace("Once upon a time there was", sites=["logits", "layers.*.router.experts"])
    assert len(calls) == 8
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
    with lab.edit(ablate(2, 5, how="next_best")):
        assert not (lab.trace("Once upon a time there was").experts[2] == 5).any()


def test_a_bank_made_in_inference_mode_serves_outside():
    model = random_model(mixtral(hidden=24)).requires_grad_(False)
    with torch.inference_mode():
        model.blocks[0].experts.lay_out()
    x = torch.randn(1, 5, 24, requires_grad=True)
    block = dispatched(model, "grouped").blocks[0]
    block.experts(x, block.router(x)).sum().backward()
    assert x.grad is not None
