"""Low-rank adapters: what is added, where it is written, and that peft on transformers computes the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mixtral_lab
from mixtral_lab import lora
from mixtral_lab.config import PRESETS
from mixtral_lab.lab import Lab
from mixtral_lab.lora import PARTS, Adapted, AdapterError, Factors, LoRA
from mixtral_lab.model import Transformer
from mixtral_lab.model.linear import Linear
from mixtral_lab.train.pretrain import initialise
from mixtral_lab.weights import save_model

SPARSE = replace(
    PRESETS["mini-mixtral"].config, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=4096,
    context=256,
)  # fmt: skip
DENSE = replace(SPARSE, n_experts=None, n_choices=None, window=16)
CONFIGS = {"mixtral": SPARSE, "mistral": DENSE}
IDS = torch.arange(7, 47).view(2, 20)
CHOICES = [("attention",), ("experts",), ("router",), PARTS]


def made(config) -> Transformer:
    model = Transformer(config)
    initialise(model, seed=3)
    for name, parameter in model.named_parameters():
        if "layers" in name and "norm" not in name:
            parameter.data.mul_(8)  # so that the layers have a say in the logits
    return model.eval().requires_grad_(False)


def random_adapter(config, parts=PARTS, rank=3, seed=0, size=0.2) -> lora.Adapter:
    empty = lora.new_adapter(config, LoRA(rank, 6, parts), seed)
    generator = torch.Generator().manual_seed(seed)
    return lora.with_tensors(
        empty, {name: size * torch.randn(t.shape, generator=generator) for name, t in empty.tensors().items()}
    )


@pytest.fixture(scope="module")
def tokenizer():
    return mixtral_lab.load("mini-mixtral", device="cpu").tokenizer


# --- The change itself ----------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.integers(1, 12))
def test_the_two_ways_to_apply_a_change_agree(rows, features_in, features_out, rank, alpha):
    base = Linear(features_in, features_out).requires_grad_(False)
    factors = Factors(torch.randn(rank, features_in), torch.randn(features_out, rank))
    adapted, x = Adapted(base, factors, alpha / rank), torch.randn(rows, features_in)
    by_hand = base.weight + alpha / rank * factors.B @ factors.A
    assert torch.allclose(adapted.weight, by_hand, atol=1e-5)
    assert torch.allclose(adapted(x), x @ by_hand.T, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_adapter_changes_nothing_and_has_gradients_only_in_b(kind):
    """B is zero, so the logits are the very same; A gets its first gradient once B is not zero."""
    config = CONFIGS[kind]
    model, parts = made(config), PARTS if config.n_experts else ("attention", "experts")
    fresh = lora.new_adapter(config, LoRA(3, 6, parts))
    adapter = lora.with_tensors(fresh, {n: torch.nn.Parameter(t) for n, t in fresh.tensors().items()})
    before = model(IDS)
    with lora.attached(model, adapter):
        logits = model(IDS)
        assert torch.equal(logits, before)
        logits.float().log_softmax(-1)[..., 0].sum().backward()
        inside = {name for name, p in model.named_parameters() if p.requires_grad}
    assert inside and all(name.endswith((".A", ".B")) for name in inside)
    grads = {name: t.grad for name, t in adapter.tensors().items() if t.grad is not None}
    assert all(not grad.any() for name, grad in grads.items() if name.endswith(".A"))
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if name.endswith(".B"))
    assert all(p.grad is None for p in model.parameters())


def test_deviation_of_a_and_count_of_numbers():
    config = PRESETS["mini-mixtral"].config
    adapter = lora.new_adapter(config, LoRA(8, 16, PARTS))
    assert adapter.factors["layers.0.attention.query"].A.std() == pytest.approx(1 / 16, rel=0.05)
    attention = 8 * (4 * 256 + 256 + 128 + 128 + 256)
    expert = 8 * ((256 + 2 * 384) + (384 + 256))  # gate and up share one A
    router = 8 * (256 + 8)
    assert adapter.numbers == 8 * (attention + 8 * expert + router)
    assert adapter.parts == PARTS
    gate, up = (adapter.factors[f"layers.1.experts.ffn.5.{role}"] for role in ("gate", "up"))
    assert gate.A is up.A and gate.B is not up.B
    assert torch.equal(lora.new_adapter(config, LoRA(8, 16, PARTS)).factors["layers.7.router.score"].A,
                       adapter.factors["layers.7.router.score"].A)  # fmt: skip


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_attached_and_merged_compute_the_same_and_leave_the_base_alone(parts):
    model, adapter = made(SPARSE), random_adapter(SPARSE, parts)
    base = {name: p.clone() for name, p in model.state_dict().items()}
    plain = model(IDS)
    with lora.attached(model, adapter), torch.no_grad():
        beside = model(IDS)
    assert (beside - plain).abs().max() > 0.1
    assert model.state_dict().keys() == base.keys()
    assert all(torch.equal(p, base[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(IDS), plain)
    lora.merge(model, adapter)
    assert torch.allclose(model(IDS), beside, atol=1e-4)
    changed = {name.removesuffix(".weight") for name, p in model.state_dict().items() if not torch.equal(p, base[name])}
    assert changed == set(adapter.factors) == set(lora.targets(SPARSE, parts))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_way_to_run_the_model_sees_the_adapter(kind, tokenizer):
    """One token at a time takes another road through the experts (their bank); traces and edits another again."""
    config = CONFIGS[kind]
    parts = PARTS if config.n_experts else ("attention", "experts")
    lab, adapter = Lab(made(config), tokenizer, "tiny"), random_adapter(config, parts)
    merged = Lab(made(config), tokenizer, "tiny")
    lab.generate("Once upon", 4)  # the bank is laid over the bare weights
    lora.merge(merged.model, adapter)
    whole = merged.logits(IDS[:1])

    def one_by_one(of: Lab):
        cache = of.model.new_cache(1, 20)
        with torch.no_grad():
            return torch.cat([of.model(IDS[:1, i : i + 1], cache) for i in range(20)], 1)

    before = one_by_one(lab)
    assert torch.allclose(one_by_one(merged), whole, atol=1e-3)
    with lora.attached(lab.model, adapter):
        assert torch.allclose(one_by_one(lab), whole, atol=1e-3)
        sites = ["layers.1.residual.after"]
        assert torch.allclose(
            lab.trace_ids(IDS[0].tolist(), sites=sites)["layers.1.residual.after"],
            merged.trace_ids(IDS[0].tolist(), sites=sites)["layers.1.residual.after"],
            atol=1e-3,
        )
    assert torch.equal(one_by_one(lab), before)
    assert (before - whole).abs().max() > 0.1


def test_merging_in_bfloat16_rounds_each_sum_once():
    model, adapter = made(SPARSE).bfloat16(), random_adapter(SPARSE)
    name = "layers.1.experts.ffn.2.down"
    before = model.get_submodule(name).weight.clone()
    lora.merge(model, adapter)
    a, b = adapter.factors[name]
    assert torch.equal(model.get_submodule(name).weight, (before.float() + 2.0 * (b @ a)).bfloat16())


# --- Files ----------------------------------------------------------------------------------------


@given(st.sampled_from(["mixtral", "mistral"]), st.integers(1, 5), st.sets(st.sampled_from(PARTS), min_size=1))
def test_what_is_saved_is_loaded(tmp_path_factory, kind, rank, parts):
    config = CONFIGS[kind]
    parts = tuple(p for p in PARTS if p in parts and (config.n_experts or p != "router")) or ("attention",)
    adapter, folder = random_adapter(config, parts, rank), tmp_path_factory.mktemp("adapter")
    lora.save_adapter(adapter, folder, "mini-mixtral")
    back = lora.load_adapter(folder, config)
    assert (back.rank, back.alpha, back.parts) == (rank, 6, parts)
    assert list(back.tensors()) == list(adapter.tensors())
    assert all(torch.equal(back.tensors()[name], tensor) for name, tensor in adapter.tensors().items())
    assert sorted(path.name for path in folder.iterdir()) == [lora.CONFIG, lora.WEIGHTS]
    assert lora.is_adapter(folder) and lora.base_of(folder) == "mini-mixtral"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind, config in CONFIGS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        save_model(made(config), found[kind])
    return found


def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "parts"), [("mixtral", parts) for parts in CHOICES] + [("mistral", ("attention",)), ("mistral", PARTS[:2])]
)
def test_peft_on_transformers_gives_the_same_logits(kind, parts, folders, tmp_path):
    import peft

    adapter, model = random_adapter(CONFIGS[kind], parts), made(CONFIGS[kind])
    lora.save_adapter(adapter, tmp_path, str(folders[kind]))
    plain = model(IDS)
    lora.merge(model, lora.load_adapter(tmp_path, CONFIGS[kind]))
    wrapped = peft.PeftModel.from_pretrained(theirs(folders[kind]), str(tmp_path))
    with torch.no_grad():
        logits = wrapped(IDS).logits
    assert (logits - plain).abs().max() > 0.1
    assert (logits - model(IDS)).abs().max() <= 1e-4


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]], ids=len)
def test_an_adapter_that_peft_made_is_read(modules, folders, tmp_path):
    import peft

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"] if len(modules) > 2 else None
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=modules, target_parameters=parameters, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(theirs(folders["mixtral"]), config)
    wrapped.save_pretrained(str(tmp_path))
    adapter, model = lora.load_adapter(tmp_path, SPARSE), made(SPARSE)
    assert adapter.parts == (PARTS if parameters else ("attention",))
    lora.merge(model, adapter)
    with torch.no_grad():
        assert (wrapped(IDS).logits - model(IDS)).abs().max() <= 1e-4


# --- Opening --------------------------------------------------------------------------------------


@pytest.fixture
def adapter_folder(tmp_path):
    config = PRESETS["mini-mixtral"].config
    lora.save_adapter(random_adapter(config, size=0.05), tmp_path / "pirate", "mini-mixtral")
    return tmp_path / "pirate"


def test_load_opens_an_adapter_by_itself_or_over_a_named_model(adapter_folder):
    alone = mixtral_lab.load(adapter_folder, device="cpu", dtype="float32")
    named = mixtral_lab.load("mini-mixtral", device="cpu", dtype="float32", adapter=adapter_folder)
    plain = mixtral_lab.load("mini-mixtral", device="cpu", dtype="float32")
    assert alone.name == named.name == "mini-mixtral + pirate"
    assert torch.equal(alone.logits(IDS), named.logits(IDS))
    ours = lora.load_adapter(adapter_folder, plain.config)
    before = plain.logits(IDS)
    with lora.attached(plain.model, ours):
        assert torch.allclose(plain.logits(IDS), named.logits(IDS), atol=1e-4)
    assert torch.equal(plain.logits(IDS), before)  # nothing of the file was written to
    assert (named.logits(IDS) - before).abs().max() > 0.1
    assert named.generate("Once upon a time", 12) == alone.generate("Once upon a time", 12)


def test_stored_weights_stay_as_they_are_in_the_file(adapter_folder):
    """In the file's own dtype, parameters are views of the file: merging must not reach it."""
    from mixtral_lab import bundled

    weights = bundled.folder("mini-mixtral") / "model.safetensors"
    before = weights.read_bytes()
    mixtral_lab.load("mini-mixtral", device="cpu", dtype="bfloat16", adapter=adapter_folder)
    assert weights.read_bytes() == before


@pytest.mark.parametrize("how", [{"quantize": "int8"}, {"experts": "offload", "resident": 2}, {"share": (0, 2)}])
def test_experts_that_are_not_ordinary_matrices_are_refused(adapter_folder, how):
    with pytest.raises(AdapterError, match=r"not kept as an ordinary matrix.*mixtral-lab merge"):
        mixtral_lab.load("mini-mixtral", device="cpu", adapter=adapter_folder, **how)


def test_an_adapter_of_attention_alone_goes_with_quantized_experts(tmp_path):
    config = PRESETS["mini-mixtral"].config
    lora.save_adapter(random_adapter(config, ("attention", "router")), tmp_path / "a", "mini-mixtral")
    lab = mixtral_lab.load("mini-mixtral", device="cpu", quantize="int8", adapter=tmp_path / "a")
    plain = mixtral_lab.load("mini-mixtral", device="cpu", quantize="int8")
    assert (lab.logits(IDS) - plain.logits(IDS)).abs().max() > 0.1


def _config(**changes):
    def change(folder):
        file = folder / lora.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _weights(change):
    def apply(folder):
        tensors = load_file(folder / lora.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / lora.WEIGHTS)

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
X = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
BROKEN = {
    "no config": (lambda folder: (folder / lora.CONFIG).unlink(), "holds no adapter: looked for adapter_config.json"),
    "no weights": (lambda folder: (folder / lora.WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "config is not JSON": (lambda folder: (folder / lora.CONFIG).write_text("{"), "not JSON at all"),
    "config is a list": (lambda folder: (folder / lora.CONFIG).write_text("[]"), "holds a list"),
    "cut short": (lambda folder: (folder / lora.WEIGHTS).write_bytes(b"12345678901"), "damaged, cut short"),
    "another method": (_config(peft_type="IA3"), "peft_type = 'IA3'"),
    "DoRA": (_config(use_dora=True), "use_dora = True"),
    "other ranks": (_config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "no rank": (_config(r=None), "r = None"),
    "alpha is a text": (_config(lora_alpha="16"), "lora_alpha = '16'"),
    "rank does not fit": (_config(r=5), "ask for"),
    "half a pair": (_weights(lambda t: t.pop(Q)), "without its other half"),
    "wrong shape": (_weights(lambda t: t.update({X: t[X][:5].clone()})), r"has shape \(5, 24\)"),
    "unknown tensor": (_weights(lambda t: t.update({"lm_head.lora_A.weight": t[Q].clone()})), "no place"),
    "nothing": (_weights(lambda t: t.clear()), "holds no matrix"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_cannot_be_an_adapter(what, tmp_path):
    breaks, message = BROKEN[what]
    lora.save_adapter(random_adapter(SPARSE), tmp_path, "mini-mixtral")
    breaks(tmp_path)
    with pytest.raises(AdapterError, match=message):
        lora.load_adapter(tmp_path, SPARSE)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LoRA(parts=("norms",)), "norms"),
        (lambda: LoRA(parts=()), "asked for nothing"),
        (lambda: LoRA(rank=0), "rank is 0"),
        (lambda: lora.new_adapter(DENSE, LoRA(parts=("router",))), "dense: it has no router"),
        (lambda: lora.merge(made(DENSE), random_adapter(SPARSE)), "which the model does not have"),
        (lambda: lora.merge(made(SPARSE), random_adapter(replace(SPARSE, hidden=16))), "do not belong together"),
    ],
)
def test_what_cannot_be_asked_for(act, message):
    with pytest.raises(AdapterError, match=message):
        act()


def test_an_adapter_is_not_put_on_twice_and_is_taken_off_after_an_error():
    model, adapter = made(SPARSE), random_adapter(SPARSE)
    plain = model(IDS)
    with pytest.raises(AdapterError, match="adapted already"), lora.attached(model, adapter):
        lora.merge(model, adapter)
    assert torch.equal(model(IDS), plain)


def test_an_adapter_of_an_adapter_or_of_nothing(adapter_folder, tmp_path):
    lora.save_adapter(random_adapter(SPARSE), tmp_path / "second", str(adapter_folder))
    with pytest.raises(AdapterError, match="is an adapter, not a model"):
        mixtral_lab.load(tmp_path / "second")
    _config(base_model_name_or_path=None)(adapter_folder)
    with pytest.raises(AdapterError, match="does not name the model"):
        mixtral_lab.load(adapter_folder)
    _config(base_model_name_or_path="gone/away")(adapter_folder)
    with pytest.raises(mixtral_lab.LabError, match="There is no file or folder gone/away"):
        mixtral_lab.load(adapter_folder)
