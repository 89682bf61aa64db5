"""A token alone goes by `row`: it is what `forward` computes, and nobody who watches or replaces a part is passed over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import random_model
from test_parity import configs, mixtral
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from mixtral_lab.config import LabError
from mixtral_lab.generate import compile_decode, decode, prefill
from mixtral_lab.model.attention import FixedCache
from mixtral_lab.model.linear import onednn_works, packing_works
from mixtral_lab.model.moe import grouped_works
from mixtral_lab.model.rope import AHEAD, rotate, rotation, turn_at
from mixtral_lab.model.site import Site
from mixtral_lab.model.transformer import RMSNorm, Transformer

pytestmark = pytest.mark.usefixtures("processor")


def written(model: Transformer, n: int = 24, general: bool = False) -> torch.Tensor:
    """Logits of `n` tokens read one by one after a prompt, by `row` or by the general way."""
    torch.manual_seed(5)
    ids = torch.randint(model.config.vocab, (1, 6 + n))
    cache = model.new_cache(1, 6 + n)
    prefill(model, ids[:, :6], cache)
    hook = model.logits.register_forward_hook(lambda *_: None) if general else None
    with torch.no_grad():
        assert model.alone(ids[:, :1], cache) is not general
    out = [decode(model, one, cache) for one in ids[0, 6:].split(1)]
    if hook is not None:
        hook.remove()
    return torch.cat(out)


@settings(max_examples=40)
@given(configs() | configs(dense=True), st.booleans())
def test_it_is_the_general_way_beyond_the_window(config, laid_out):
    model = random_model(config)
    if laid_out and config.n_experts:
        for block in model.blocks:
            block.experts.lay_out()
    torch.testing.assert_close(written(model), written(model, general=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("laid_out", [False, True])
def test_it_is_the_general_way_in_bfloat16(laid_out):
    model = random_model(mixtral(window=6)).bfloat16()
    if laid_out:
        for block in model.blocks:
            block.experts.lay_out()
    by_row, general = written(model), written(model, general=True)
    assert by_row.dtype == torch.bfloat16
    # A near tie may be routed otherwise, which moves everything after it; most of the logits agree to bfloat16's precision.
    apart = (by_row.float() - general.float()).norm(dim=-1) / general.float().norm(dim=-1)
    assert apart.median() < 0.03


@pytest.mark.parametrize("position", [0, 1, AHEAD - 1, AHEAD, 1000])
def test_a_turn_is_a_matrix(position):
    heads = torch.randn(2, 3, 1, 1, 10)
    turned = rotate(heads, rotation(torch.tensor([[position]]), 10, 100.0))
    torch.testing.assert_close(heads @ turn_at(position, 10, 100.0), turned, atol=1e-5, rtol=1e-5)


def test_a_turn_made_in_inference_mode_may_be_kept_outside():
    with torch.inference_mode():
        turn = turn_at(12345, 10, 77.0)
    assert not turn.is_inference()


def test_who_is_not_alone():
    model = random_model(mixtral())
    ids, cache = torch.tensor([[3]]), model.new_cache(1, 8)
    with torch.no_grad():
        assert model.alone(ids, cache)
        assert not model.alone(torch.tensor([[3, 4]]), cache)
        assert not model.alone(torch.tensor([[3], [4]]), model.new_cache(2, 8))
        assert not model.alone(ids, [FixedCache(one.keys, one.values, torch.tensor(0)) for one in cache])
        hook = model.layers[1].experts.ffn[2].up.register_forward_hook(lambda *_: None)
        assert not model.alone(ids, cache)
        hook.remove()
        hook = register_module_forward_hook(lambda *_: None)
        assert not model.alone(ids, cache)
        hook.remove()
        assert model.alone(ids, cache)
        model.layers[0].attention.plain = True
        assert not model.alone(ids, cache)
        model.layers[0].attention.plain = False
        for dispatch in ("dense", "sorted", lambda x, *_: x):
            model.layers[1].experts.dispatch = dispatch
            assert not model.alone(ids, cache)
        model.layers[1].experts.dispatch = "auto"
    assert not model.alone(ids, cache)  # gradients are wanted
    assert not model.half().alone(ids, cache)


@pytest.mark.parametrize(
    "part",
    [
        "embed", "final_norm", "layers.1", "layers.1.attention_norm", "layers.1.ffn_norm", "layers.1.attention",
        "layers.1.attention.query", "layers.1.attention.key", "layers.1.attention.value", "layers.1.attention.output",
        "layers.1.router", "layers.1.router.score", "layers.1.experts", "layers.1.experts.ffn.2",
        "layers.1.experts.ffn.2.gate", "layers.1.experts.ffn.2.up", "layers.1.experts.ffn.2.down",
    ],
)  # fmt: skip
@pytest.mark.parametrize("laid_out", [False, True])
def test_another_forward_is_not_passed_over(part, laid_out):
    model = random_model(mixtral(n_experts=3, n_choices=2))
    if laid_out:
        for block in model.blocks:
            block.experts.lay_out()
    before = written(model)
    module = model.get_submodule(part)
    forward, called = module.forward, []
    module.forward = lambda *given: (called.append(1), forward(*given))[1]
    torch.testing.assert_close(written_anyhow(model), before, atol=1e-4, rtol=1e-4)
    assert len(called) > 10  # not in the prompt alone
    del module.forward
    torch.testing.assert_close(written(model), before)


def written_anyhow(model: Transformer) -> torch.Tensor:
    torch.manual_seed(5)
    ids = torch.randint(model.config.vocab, (1, 30))
    cache = model.new_cache(1, 30)
    prefill(model, ids[:, :6], cache)
    return torch.cat([decode(model, one, cache) for one in ids[0, 6:].split(1)])


@pytest.mark.parametrize("laid_out", [False, True])
def test_a_part_of_another_kind_is_asked(laid_out):
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = random_model(mixtral(n_experts=3, n_choices=2))
    if laid_out:
        for block in model.blocks:
            block.experts.lay_out()
    before = written_anyhow(model)
    expert = model.layers[1].experts.ffn[1]
    expert.up = Twice(expert.up)
    replaced = written_anyhow(model)
    assert (replaced - before).abs().max() > 1e-3
    expert.up = expert.up.inner
    expert.up.weight.data = 2 * expert.up.weight.data  # elsewhere in memory, too
    torch.testing.assert_close(written_anyhow(model), replaced, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        expert.up.weight.mul_(0.5)
    torch.testing.assert_close(written_anyhow(model), before, atol=1e-4, rtol=1e-4)
    model.layers[0].ffn_norm, old = RMSNorm(model.config.dim, eps=10.0), model.layers[0].ffn_norm
    assert (written_anyhow(model) - before).abs().max() > 1e-3
    model.layers[0].ffn_norm = old
    torch.testing.assert_close(written_anyhow(model), before, atol=1e-4, rtol=1e-4)


SITES = [
    "logits", "layers.1.residual.before", "layers.1.residual.between", "layers.0.residual.after", "layers.1.attention.heads.query",
    "layers.1.attention.heads.key", "layers.1.attention.heads.value", "layers.1.attention.heads.out", "layers.1.router.logits",
    "layers.1.router.weights", "layers.1.experts.out",
]  # fmt: skip


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("laid_out", [False, True])
def test_another_module_in_the_place_of_a_site_is_asked(name, laid_out):
    class Half(nn.Module):
        watched = False
        calls = 0

        def forward(self, value, *known):
            Half.calls += 1
            return value / 2

    model = random_model(mixtral(n_experts=3, n_choices=2))
    if laid_out:
        for block in model.blocks:
            block.experts.lay_out()
    before = written_anyhow(model)
    owner, _, own = name.rpartition(".")
    holder = model.get_submodule(owner)
    site = getattr(holder, own)
    setattr(holder, own, Half())
    changed = written_anyhow(model)
    assert Half.calls > 20 and (changed - before).abs().max() > 1e-3
    setattr(holder, own, site)
    torch.testing.assert_close(written(model), before, atol=1e-4, rtol=1e-4)


def test_defaults_of_the_caller_do_not_matter():
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            turn = turn_at(4321, 10, 55.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert turn.dtype == torch.float32 and turn.device.type == "cpu"


def test_reading_does_not_mind_them_either():
    model = random_model(mixtral(n_experts=4))
    for block in model.blocks:
        block.experts.lay_out()
    ids = torch.randint(model.config.vocab, (1, 12))
    with torch.no_grad():
        before = model(ids, model.new_cache(1, 12))
        for probe in (grouped_works, onednn_works, packing_works):
            probe.cache_clear()
        with torch.device("meta"):
            assert torch.equal(model(ids, model.new_cache(1, 12)), before)
            assert onednn_works() in (True, False) and packing_works() in (True, False)


def test_an_id_beyond_the_vocabulary_is_no_other_token():
    model = random_model(mixtral())
    for wrong in (-1, model.config.vocab):
        with pytest.raises((IndexError, RuntimeError)):
            decode(model, torch.tensor([wrong]), model.new_cache(1, 4))


def test_under_autocast_a_token_is_not_alone():
    model = random_model(mixtral(window=6))
    cache = model.new_cache(1, 8)
    prefill(model, torch.arange(1, 6)[None], cache)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not model.alone(torch.tensor([[1]]), cache)
        assert decode(model, torch.tensor([1]), cache).isfinite().all()


def test_a_hook_on_a_part_that_is_put_back_sees_every_token():
    model, seen = random_model(mixtral(window=6)), []
    own, other = model.layers[1].experts, random_model(mixtral(window=6)).layers[1].experts
    own.register_forward_hook(lambda *_: seen.append(1))
    model.layers[1].experts = other
    written(model, 3)
    assert not seen
    model.layers[1].experts = own
    cache = model.new_cache(1, 8)
    prefill(model, torch.arange(1, 4)[None], cache)
    for _ in range(4):
        decode(model, torch.tensor([1]), cache)
    assert len(seen) == 5


def test_a_model_with_fewer_layers_writes():
    model = random_model(mixtral(window=6))
    before = written(model)
    del model.layers[0]
    assert not torch.allclose(written(model), before)
    torch.testing.assert_close(written(model), written(model, general=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["a forward of its own", "a kind of its own"])
@pytest.mark.parametrize(
    "name", ["residual.after", "router.experts", "attention.pattern", "attention.heads.out", "experts.out"]
)
def test_a_site_that_does_something_is_asked(name, how):
    """As a forward hook is, in the prompt and in every written token."""
    model, met = random_model(mixtral(window=6)), []
    place, _, last = f"layers.1.{name}".rpartition(".")

    def forward(value, *known):
        met.append(value.shape)
        return value

    if how == "a forward of its own":
        model.get_submodule(f"layers.1.{name}").forward = forward
    else:
        setattr(
            model.get_submodule(place), last, type("Mine", (Site,), {"forward": lambda _, *given: forward(*given)})()
        )
    written_anyhow(model)
    assert len(met) > 3


@pytest.mark.parametrize("part", ["attention", "router", "experts", "experts.ffn", "ffn_norm"])
def test_a_module_of_somebody_elses_stands_in_a_layer(part):
    """It knows nothing of the package but its one way of being called."""

    class Wrapped(nn.Module):
        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *given):
            Wrapped.calls += 1
            return self.inner(*given)

    model = random_model(mixtral(window=6))
    before = written_anyhow(model)
    place, _, last = f"layers.1.{part}".rpartition(".")
    holder = model.get_submodule(place)
    own = getattr(holder, last)
    if isinstance(own, nn.ModuleList):
        for i, one in enumerate(own):
            own[i] = Wrapped(one)
    else:
        setattr(holder, last, Wrapped(own))
    torch.testing.assert_close(written_anyhow(model), before, atol=1e-4, rtol=1e-4)
    assert Wrapped.calls > 20


@pytest.mark.parametrize("part", ["experts", "experts.ffn.1"])
def test_what_cannot_be_compiled_is_said(part):
    model = random_model(mixtral(window=6))
    place, _, last = f"layers.1.{part}".rpartition(".")
    model.get_submodule(place).add_module(last, nn.Identity())
    with pytest.raises(LabError, match=r"Identity.*Write without compiling"):
        compile_decode(model)


def test_a_layer_put_in_between_is_asked():
    class Louder(nn.Module):
        def forward(self, x, *given):
            return 2 * x

    model = random_model(mixtral(window=6))
    before = written(model)
    model.layers.insert(1, Louder())
    between = written_anyhow(model)
    assert not torch.allclose(between, before)
    del model.layers[1]
    torch.testing.assert_close(written(model), before)


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_weights_that_are_made_anew_at_every_call(role):
    """`torch.nn.utils.prune` takes the parameter away and sets an attribute of its name before each call."""
    model = random_model(mixtral(window=6))
    before = written_anyhow(model)
    for expert in model.layers[0].experts.ffn:
        prune.l1_unstructured(getattr(expert, role), "weight", amount=0.5)
    pruned = written_anyhow(model)
    assert not torch.allclose(pruned, before)
    for expert in model.layers[0].experts.ffn:
        prune.remove(getattr(expert, role), "weight")
    torch.testing.assert_close(written_anyhow(model), pruned, atol=1e-4, rtol=1e-4)
