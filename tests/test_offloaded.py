"""A model whose experts come and go, or are rounded, says what the whole model says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_gguf import OPEN, random_model, their_tensors, write

import mixtral_lab
from mixtral_lab.analysis.offload import guesses_from_router, replay
from mixtral_lab.edit import ablate
from mixtral_lab.model.quantized import BLOCK, KINDS, QuantizedLinear, kernel_works
from mixtral_lab.offload import Offloaded, OffloadError, parts
from mixtral_lab.weights import CheckpointError, load_model, save_model

PROMPT = "Once upon a time, there was a little"


def load(**how):
    return mixtral_lab.load("mini-mixtral", device="cpu", **{"dtype": "float32"} | how)


@pytest.fixture(scope="module")
def whole():
    lab = load()
    for block in lab.model.blocks:
        block.experts.dispatch = "sorted"  # the same products in the same order: equal to the last bit
    return lab


def away(resident=2, dispatch="sorted", **how):
    lab = load(experts="offload", resident=resident, **how)
    for block in lab.model.blocks:
        block.experts.dispatch = dispatch
    return lab


@pytest.mark.parametrize("resident", [2, 3, 8])
def test_logits_are_those_of_the_whole_model_bit_for_bit(whole, resident):
    ids = torch.tensor([whole.tokenizer.encode(PROMPT)])
    lab = away(resident)
    assert torch.equal(lab.logits(ids), whole.logits(ids))
    assert torch.equal(lab.logits(ids), whole.logits(ids)), "a second time, with experts at hand"
    assert lab.generate(PROMPT, max_new_tokens=30) == whole.generate(PROMPT, max_new_tokens=30)


@pytest.mark.parametrize("dispatch", ["auto", "every", "sorted", "grouped", "one_by_one", "dense"])
def test_every_dispatch_path_agrees(whole, dispatch):
    lab = away(2, dispatch)
    trace, expected = (one.trace(PROMPT, max_new_tokens=8, sites=["logits"]) for one in (lab, whole))
    assert torch.allclose(trace["logits"], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("resident", range(2, 9))
def test_hits_are_what_the_replay_predicts(whole, resident):
    """Same caches, same guesses: hits, right guesses and copies agree in every layer."""
    recorded = whole.trace(PROMPT, max_new_tokens=40, sites=["layers.*.router.experts", "layers.*.residual.between"])
    guesses = guesses_from_router(whole.model, recorded["layers.*.residual.between"], 2)
    expected = replay(recorded.experts, resident, guesses=guesses, n_prompt=recorded.n_prompt)
    lab = away(resident)
    lab.trace(PROMPT, max_new_tokens=40)
    counted = lab.expert_loads()
    for name in ("asked", "hits", "ahead", "loads"):
        assert counted[name].tolist() == getattr(expected, name).tolist(), name
    assert (counted["misses"] == counted["asked"] - counted["hits"]).all()
    one = 3 * lab.config.dim * lab.config.hidden * 4
    assert (counted["bytes"] == counted["loads"] * one).all()
    assert expected.ahead.sum() > 0 or resident == 8


def test_no_more_than_the_resident_experts_stay(whole):
    lab = away(3)
    lab.generate(PROMPT, max_new_tokens=5)
    mapped = mixtral_lab.load("mini-mixtral", device="cpu", dtype="bfloat16").model
    for block, stored in zip(lab.model.blocks, mapped.blocks, strict=True):
        assert isinstance(block.experts, Offloaded)
        kept = block.experts.shelf.copies
        assert sorted(kept) == sorted(block.experts.shelf.cache.resident)
        assert len(kept) == 3
        for number, expert in enumerate(block.experts.swiglus):
            weight = expert.gate.weight
            assert weight.dtype == (torch.float32 if number in kept else torch.bfloat16), "at home it is as in the file"
            assert torch.equal(weight.bfloat16(), stored.experts.swiglus[number].gate.weight)


def test_sites_edits_and_hooks_work_on_experts_that_come_and_go(whole):
    lab = away(2)
    sites = ["layers.*.experts.hidden", "layers.*.experts.out", "layers.*.experts.weighted", "logits"]
    ours, theirs = (one.trace(PROMPT, max_new_tokens=6, sites=sites) for one in (lab, whole))
    for site in sites:
        assert torch.equal(ours[site], theirs[site]), site
    with lab.edit(ablate(2, 5, how="next_best")), whole.edit(ablate(2, 5, how="next_best")):
        assert lab.generate(PROMPT, max_new_tokens=12) == whole.generate(PROMPT, max_new_tokens=12)
    seen = []
    hook = lab.model.layers[1].experts.ffn[4].gate.register_forward_hook(lambda *_: seen.append(1))
    lab.generate(PROMPT, max_new_tokens=20)
    hook.remove()
    assert seen


def test_an_error_in_the_middle_gives_experts_back():
    lab = away(2)

    def broken(*_):
        raise KeyError("stop")

    hooks = [expert.register_forward_hook(broken) for expert in lab.model.layers[0].experts.ffn]
    with pytest.raises(KeyError):
        lab.generate(PROMPT)
    for hook in hooks:
        hook.remove()
    shelf = lab.model.layers[0].experts.shelf
    assert set(shelf.copies) <= set(shelf.cache.resident)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_packed_experts_of_a_gguf_file_are_unpacked_when_asked_for(kind, tmp_path):
    model = random_model(replace(OPEN, dim=64, hidden=32, head_dim=16, n_heads=4))
    file = write(tmp_path / "model.gguf", model.config, their_tensors(model), kind)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    lean = load_model(file, "cpu", "float32", experts="offload", resident=model.config.n_choices)
    full = load_model(file, "cpu", "float32")
    with torch.no_grad():
        assert torch.allclose(lean(ids), full(ids), atol=1e-5)
    waiting = [not part.numel() for block in lean.blocks for expert in block.experts.ffn for part in parts(expert)]
    assert any(waiting) == (kind != "F32")
    if any(waiting):
        with pytest.raises(CheckpointError, match="offloaded"):
            save_model(lean, tmp_path / "out")


# --- Small integers ------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 3), groups=st.integers(1, 4), size=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99))
def test_rounding_is_off_by_half_a_step_at_most(rows, groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows * BLOCK, groups * size, generator=generator) * 3
    int8 = QuantizedLinear(weight, "int8")
    assert ((int8.weight - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 127 * 0.501).all()
    int4 = QuantizedLinear(weight, "int4")
    group = weight.shape[1] // int4.scales.shape[0]
    grouped = weight.unflatten(-1, (-1, group))
    step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
    error = (int4.weight - weight).abs().unflatten(-1, (-1, group))
    assert (error <= step * 0.501 + 1e-6).all()


def test_int4_by_hand():
    """A row from 0 to 15 in steps of 1 needs no rounding: integers are the numbers, the scale is 1, the middle 8."""
    row = torch.arange(16).repeat(2).float()
    layer = QuantizedLinear(row.repeat(BLOCK, 1), "int4")
    assert torch.equal(layer.scales[0, 0], torch.tensor([1.0, 8.0]))
    assert torch.allclose(layer.weight, row.repeat(BLOCK, 1))
    assert layer.integers.numel() == BLOCK * 32 // 2
    assert layer.integers[0, 0] == 0
    assert layer.integers.view(-1)[BLOCK // 2] == 1 | 1 << 4, "column 1: row 0 in the lower half, row 32 in the upper"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_products_with_small_integers_are_those_with_the_rounded_weight(kind, dtype, rows):
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(torch.randn(128, 256, generator=generator).to(dtype), kind)
    x = torch.randn(2, rows, 256, generator=generator).to(dtype)
    with torch.no_grad():
        out = layer(x)
    exact = F.linear(x.float(), layer.weight.float())
    assert out.dtype == dtype
    assert torch.allclose(out.float(), exact, atol={torch.float32: 1e-4}.get(dtype, 0.5), rtol=0.02)


def test_a_shape_that_int4_cannot_keep_is_refused():
    with pytest.raises(ValueError, match="rows by 64, and columns by 32"):
        QuantizedLinear(torch.zeros(65, 128), "int4")
    with pytest.raises(ValueError, match="no kind 'int2'"):
        QuantizedLinear(torch.zeros(64, 128), "int2")


@pytest.mark.parametrize(("kind", "nats"), [("int8", 0.002), ("int4", 0.1)])
def test_rounded_experts_cost_little(whole, kind, nats):
    """Mean nats per token on the excerpts of three kinds; and offloaded, the rounded model is the same."""
    rounded, moving = load(quantize=kind), away(3, "sorted", quantize=kind)
    losses = {name: [] for name in ("whole", "rounded")}
    for domain in ("stories", "french", "math"):
        ids = torch.tensor([whole.tokenizer.encode(mixtral_lab.excerpts()[domain][0]["text"])[:200]])
        for name, lab in (("whole", whole), ("rounded", rounded)):
            losses[name].append(F.cross_entropy(lab.logits(ids)[0, :-1], ids[0, 1:]).item())
        for block in rounded.model.blocks:
            block.experts.dispatch = "sorted"
        assert torch.equal(rounded.logits(ids), moving.logits(ids))
    assert abs(np.mean(losses["rounded"]) - np.mean(losses["whole"])) < nats
    assert np.mean(losses["rounded"]) != np.mean(losses["whole"])
    sizes = {name: sum(p.numel() * p.itemsize for p in parts(lab.model.layers[0].experts)) for name, lab in
             (("whole", whole), ("rounded", rounded))}  # fmt: skip
    assert sizes["rounded"] < sizes["whole"] * {"int8": 0.26, "int4": 0.15}[kind]


def test_a_dense_model_can_be_rounded():
    lab = mixtral_lab.load("mini-mistral", device="cpu", dtype="float32", quantize="int8")
    assert isinstance(lab.model.layers[0].feed_forward.up, QuantizedLinear)
    expected = mixtral_lab.load("mini-mistral", device="cpu", dtype="float32").trace(PROMPT, sites=["logits"])["logits"]
    assert (lab.trace(PROMPT, sites=["logits"])["logits"] - expected).abs().max() < 0.5


def test_whether_the_kernels_are_there_is_asked_once():
    for kind in KINDS:
        assert kernel_works(kind, torch.device("cpu"), torch.float32) in (True, False)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"experts": "offload"}, "go together"),
        ({"resident": 3}, "go together"),
        ({"experts": "disk", "resident": 3}, "not 'disk'"),
        ({"experts": "offload", "resident": 1}, "from 2, which each token takes, to all 8"),
        ({"experts": "offload", "resident": 9}, "to all 8"),
        ({"quantize": "int3"}, "int8 or int4, not 'int3'"),
    ],
)
def test_what_cannot_be_kept_so_is_refused(how, words):
    with pytest.raises(OffloadError, match=words):
        load(**how)


def test_more_that_is_refused(whole):
    with pytest.raises(OffloadError, match="dense"):
        mixtral_lab.load("mini-mistral", device="cpu", experts="offload", resident=2)
    with pytest.raises(OffloadError, match="all in memory"):
        whole.expert_loads()
    with pytest.raises(OffloadError, match="cannot be compiled"):
        away().compile()


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float32", "quantize": "int8"}])
def test_a_copy_that_is_interrupted_is_made_the_next_time(how):
    lab = load(experts="offload", resident=2, **how)
    right = lab.generate(PROMPT, max_new_tokens=12)
    lab = load(experts="offload", resident=2, **how)
    shelf = lab.model.layers[3].experts.shelf
    copy, calls = shelf._copy, []

    def interrupted(expert):
        calls.append(expert)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy(expert)

    shelf._copy = interrupted
    with pytest.raises(KeyboardInterrupt):
        lab.generate(PROMPT, max_new_tokens=12)
    shelf._copy = copy
    assert lab.generate(PROMPT, max_new_tokens=12) == right
    assert set(shelf.copies) == set(shelf.cache.resident)
