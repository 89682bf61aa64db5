"""Checkpoints: parity with transformers, exact round trips, mapped memory, and every kind of bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import twin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixtral_lab import checkpoint, weights
from mixtral_lab.config import PRESETS, Config, ConfigError, LabError
from mixtral_lab.model import Transformer
from mixtral_lab.model.rope import rotate, rotation
from mixtral_lab.weights import (
    CheckpointError,
    CorruptFile,
    DeviceError,
    DtypeError,
    ExtraTensors,
    MissingShards,
    MissingTensors,
    NotEnoughMemory,
    PickleRefused,
    UnknownArchitecture,
    WrongShape,
    describe,
    free_memory,
    load_model,
    memory_needed,
    read_config,
    resolve_device,
    resolve_dtype,
    save_model,
)

SPARSE = Config(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=8, hidden=20, vocab=37, context=64,
    n_experts=4, n_choices=2, window=7, rope_theta=5e4, norm_eps=1e-6,
)  # fmt: skip
DENSE = replace(SPARSE, n_experts=None, n_choices=None)
LINUX = sys.platform == "linux"


def random_model(config: Config, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config).eval().requires_grad_(False).to(dtype)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) * 0.3 + (name.endswith("norm.weight")))
    return model


def texts(config: Config) -> torch.Tensor:
    """Two texts, three windows long."""
    return torch.randint(config.vocab, (2, 21))


def same(one: Transformer, other: Transformer) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, and what is in it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# --- The same numbers as transformers -------------------------------------------------------------


@pytest.mark.parametrize("how", ["single", "sharded", "fused"])
@pytest.mark.parametrize("config", [SPARSE, replace(DENSE, tied=True)], ids=["mixtral", "mistral"])
def test_a_folder_saved_by_transformers_gives_its_logits(config, how, tmp_path):
    theirs, _ = twin(config)
    options = {"single": {}, "sharded": {"max_shard_size": "10KB"}, "fused": {"save_original_format": False}}
    theirs.save_pretrained(tmp_path, **options[how])
    if how == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = load_model(tmp_path, device="cpu")
    assert replace(ours.config, context=64) == config
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ids = texts(config)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4


def test_a_llama_folder_is_a_dense_model_without_a_window(tmp_path):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    assert ours.config.window is None
    ids = texts(SPARSE)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", [SPARSE, DENSE, replace(SPARSE, window=None)], ids=["sparse", "dense", "open"])
def test_a_folder_saved_by_us_gives_transformers_our_logits(config, tied, tmp_path):
    config = replace(config, tied=tied)
    ours = random_model(config)
    folder = save_model(ours, tmp_path / "saved", bos=1, eos=2, pad=0, max_shard_bytes=8000 if tied else 10**9)
    assert (len(list(folder.glob("*.safetensors"))) > 3) is tied
    with torch.no_grad():
        theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        ids = texts(config)
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 2, 0)
    assert theirs.generation_config.eos_token_id == 2
    assert theirs.config.sliding_window == config.window
    assert theirs.config.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.config.tie_word_embeddings is tied


def test_transformers_loads_the_dtype_we_saved(tmp_path):
    folder = save_model(random_model(SPARSE, torch.bfloat16), tmp_path / "saved")
    assert AutoConfig.from_pretrained(folder).dtype is torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is torch.bfloat16


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [10**9, 6000], ids=["single", "sharded"])
@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_a_round_trip_is_exact(layout, size, dtype, tmp_path):
    for number, config in enumerate([SPARSE, replace(SPARSE, tied=True), DENSE, replace(DENSE, tied=True)]):
        model = random_model(config, dtype)
        folder = save_model(model, tmp_path / str(number), layout=layout, max_shard_bytes=size)
        back = load_model(folder, device="cpu", dtype=dtype)
        assert back.config == config == read_config(folder)
        assert same(model, back)
        files = sorted(folder.glob("*.safetensors"))
        assert all(file.stat().st_size <= size + 4000 for file in files)
        assert (len(files) > 2) is (size == 6000)
        if config.tied:
            assert not {"lm_head.weight", "output.weight"} & {tensor.name for tensor in describe(folder)}


def test_a_model_goes_through_every_layout_in_turn_unchanged(tmp_path):
    theirs, model = twin(SPARSE)
    theirs.save_pretrained(tmp_path / "0", save_original_format=False)
    for number, layout in enumerate(["mistral", "huggingface", "mistral"]):
        loaded = load_model(tmp_path / str(number), device="cpu")
        save_model(loaded, tmp_path / str(number + 1), layout=layout)
    assert same(load_model(tmp_path / "3", device="cpu"), model)


def test_shards_without_an_index_are_found_by_their_numbers(tmp_path):
    model = random_model(DENSE)
    folder = save_model(model, tmp_path / "saved", max_shard_bytes=6000)
    (folder / "model.safetensors.index.json").unlink()
    assert same(load_model(folder, device="cpu"), model)


def test_experts_that_share_one_memory_are_saved_one_by_one(tmp_path):
    model = random_model(SPARSE)
    for block in model.layers:
        for expert in block.experts.ffn[1:]:
            expert.load_state_dict(block.experts.ffn[0].state_dict(), assign=True)
    assert same(load_model(save_model(model, tmp_path / "saved"), device="cpu"), model)


def test_saving_and_loading_convert_the_dtype(tmp_path):
    model = random_model(SPARSE)
    folder = save_model(model, tmp_path / "saved", dtype="bfloat16")
    assert {tensor.dtype for tensor in describe(folder)} == {"BF16"}
    assert same(load_model(folder, "cpu", "float32"), random_like(model, torch.bfloat16).float())
    assert load_model(folder, "cpu", torch.float16).embed.weight.dtype is torch.float16


def random_like(model: Transformer, dtype: torch.dtype) -> Transformer:
    copy = Transformer(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    return copy


# --- Mistral's own layout -------------------------------------------------------------------------


def test_mistrals_files_pair_neighbouring_rows():
    """As mistral-inference does: neighbours are the real and imaginary part of one number, which is turned."""
    head_dim, seq, dim, heads = 8, 5, 6, 2
    query, key = torch.randn(2, heads * head_dim, dim)
    x = torch.randn(seq, dim)
    angles = torch.arange(seq)[:, None] * 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)

    def mistrals(weight):
        pairs = torch.view_as_complex((x @ weight.T).view(seq, heads, head_dim // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(seq, 4), angles)[:, None]).flatten(-2)

    def ours(weight):
        rows = x @ weights.halves_from_neighbours(weight, heads).T
        turn = rotation(torch.arange(seq)[None], head_dim, 1e4)
        return rotate(rows.view(1, seq, heads, 1, head_dim).permute(0, 2, 3, 1, 4), turn)[0, :, 0].transpose(0, 1)

    theirs, mine = (torch.einsum("qhd,khd->hqk", it(query), it(key)) for it in (mistrals, ours))
    assert torch.allclose(theirs, mine, atol=1e-4)
    assert weights.halves_from_neighbours(torch.arange(4.0)[:, None], 1).flatten().tolist() == [0, 2, 1, 3]
    assert torch.equal(weights.neighbours_from_halves(weights.halves_from_neighbours(key, heads), heads), key)


def test_mistrals_names_on_disk(tmp_path):
    folder = save_model(random_model(SPARSE), tmp_path / "saved", layout="mistral")
    names = {tensor.name: tensor for tensor in describe(folder)}
    assert {file.name for file in folder.iterdir()} == {"params.json", "consolidated.safetensors"}
    assert names["layers.1.feed_forward.experts.3.w2.weight"].ours == ("layers.1.experts.ffn.3.down.weight",)
    assert names["layers.0.feed_forward.gate.weight"].shape == (4, 24)
    assert {
        "tok_embeddings.weight",
        "norm.weight",
        "output.weight",
        "layers.0.attention.wq.weight",
    } <= names.keys()
    assert json.loads((folder / "params.json").read_text())["moe"] == {
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }


def test_params_json_of_the_published_models(tmp_path):
    v01 = {
        "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-05,
        "vocab_size": 32000,
    }  # fmt: skip
    file = tmp_path / "params.json"
    file.write_text(json.dumps(v01 | {"sliding_window": 4096}))
    assert read_config(tmp_path) == PRESETS["mistral-7b-v0.1"].config
    moe = {"num_experts_per_tok": 2, "num_experts": 8}
    file.write_text(json.dumps(v01 | {"moe": moe, "rope_theta": 1e6}))
    assert read_config(tmp_path) == PRESETS["mixtral-8x7b"].config
    file.write_text(json.dumps(v01))
    assert read_config(tmp_path).rope_theta == 1e6


# --- config.json, old and new ---------------------------------------------------------------------


MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"head_dim": None}, {}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"rope_theta": "absent"}, {}),
        (
            {"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_theta": 7.0},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
        ({"rope_scaling": None, "sliding_window": 12}, {"window": 12}),
        ({"tie_word_embeddings": True}, {"tied": True}),
        ({"architectures": None}, {}),
    ],
)
def test_config_json_old_and_new(changes, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    edit_json(tmp_path / "config.json", **changes)
    assert read_config(tmp_path) == replace(PRESETS["mixtral-8x7b"].config, **expected)


def test_where_config_json_is_silent_we_assume_what_transformers_assumes(tmp_path):
    for kind in ("mistral", "mixtral", "llama"):
        (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL_8X7B, "model_type": kind}))
        dense = {} if kind == "mixtral" else {"num_local_experts": "absent", "num_experts_per_tok": "absent"}
        silent = {
            "sliding_window": "absent",
            "rope_theta": "absent",
            "num_key_value_heads": "absent",
            "head_dim": "absent",
        }
        edit_json(tmp_path / "config.json", architectures="absent", **dense, **silent)
        theirs, ours = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
        assert ours.window == getattr(theirs, "sliding_window", None)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert (ours.n_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim or 128)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "gpt2"}, UnknownArchitecture, ["'gpt2'", "mistral, mixtral, llama"]),
        ({"model_type": ["mixtral"]}, CorruptFile, ["makes no sense"]),
        ({"architectures": ["MixtralForTokenClassification"]}, UnknownArchitecture, ["TokenClassification"]),
        ({"architectures": ["MistralForCausalLM"]}, UnknownArchitecture, ["MistralForCausalLM", "'mixtral'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, UnknownArchitecture, ["rope_type", "yarn"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, UnknownArchitecture, ["rope_type", "llama3"]),
        ({"attention_bias": True}, UnknownArchitecture, ["attention_bias = True"]),
        ({"hidden_act": "gelu"}, UnknownArchitecture, ["hidden_act = 'gelu'", "'silu'"]),
        ({"quantization_config": {"bits": 4}}, UnknownArchitecture, ["quantization_config", "bits"]),
        ({"num_key_value_heads": 5}, ConfigError, ["config.json", "32 query heads", "5 key/value heads"]),
        ({"num_experts_per_tok": 9}, ConfigError, ["cannot choose 9 of 8 experts"]),
        ({"num_hidden_layers": -1}, ConfigError, ["n_layers is -1"]),
        ({"num_hidden_layers": "many"}, ConfigError, ["num_hidden_layers = 'many'", "one number"]),
        ({"num_attention_heads": 0}, ConfigError, ["n_heads is 0"]),
        ({"sliding_window": 0}, ConfigError, ["window is 0"]),
        ({"hidden_size": 4100}, ConfigError, ["4100 numbers", "32 heads"]),
        ({"rope_parameters": {"rope_theta": 5.0}}, ConfigError, ["rope_theta twice: 1000000.0 and 5.0"]),
        (
            {"model_type": "mistral", "architectures": None},
            ConfigError,
            ["'mistral'", "dense", "num_local_experts"],
        ),
        ({"num_local_experts": "absent"}, CheckpointError, ["no 'num_local_experts'"]),
        ({"vocab_size": None}, CheckpointError, ["no 'vocab_size'"]),
        ({"rope_parameters": "yes"}, CorruptFile, ["makes no sense"]),
    ],
)
def test_a_config_that_is_not_ours_is_refused(changes, error, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(error) as caught:
        read_config(tmp_path)
    one_sentence(caught.value, ["config.json", *words])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "mamba"}, UnknownArchitecture, ["model_type = 'mamba'", "'transformer'"]),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, UnknownArchitecture, ["quantization", "fp8"]),
        ({"moe": {"num_experts": 8}}, CheckpointError, ["no 'num_experts_per_tok'"]),
        ({"hidden_dim": "absent"}, CheckpointError, ["no 'hidden_dim'"]),
        ({"n_kv_heads": 5}, ConfigError, ["6 query heads", "5 key/value heads"]),
        ({"moe": "yes"}, CorruptFile, ["makes no sense"]),
    ],
)
def test_a_params_json_that_is_not_ours_is_refused(changes, error, words, tmp_path):
    save_model(random_model(SPARSE), tmp_path / "saved", layout="mistral")
    edit_json(tmp_path / "saved" / "params.json", **changes)
    with pytest.raises(error) as caught:
        load_model(tmp_path / "saved")
    one_sentence(caught.value, ["params.json", *words])


def one_sentence(error: Exception, words: list[str]) -> None:
    message = str(error)
    assert isinstance(error, LabError)
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# --- Mapped, not copied ---------------------------------------------------------------------------


def mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's numbers lie in memory that is a map of this file, which writing does not reach."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *_, name = line.split(maxsplit=5)
        start, end = (int(edge, 16) for edge in span.split("-"))
        if name == str(file) and start <= tensor.data_ptr() < end:
            return mode.endswith("p")
    return False


@pytest.mark.skipif(not LINUX, reason="reads /proc/self/maps")
@pytest.mark.parametrize("how", ["per-expert", "fused", "mistral"])
def test_parameters_are_views_of_the_file(how, tmp_path):
    theirs, model = twin(SPARSE)
    if how == "fused":
        theirs.save_pretrained(tmp_path, save_original_format=False)
    else:
        save_model(model, tmp_path / "m", layout="mistral" if how == "mistral" else "huggingface")
    folder = tmp_path if how == "fused" else tmp_path / "m"
    (file,) = folder.glob("*.safetensors")
    before = file.read_bytes()
    loaded = load_model(folder, device="cpu", dtype="float32")
    copied = {name for name, parameter in loaded.named_parameters() if not mapped(parameter, file)}
    turned = {f"layers.{i}.attention.{role}.weight" for i in range(2) for role in ("query", "key")}
    assert copied == (turned if how == "mistral" else set())

    for parameter in loaded.parameters():
        parameter += 1
    assert torch.equal(loaded.embed.weight, model.embed.weight + 1)
    assert file.read_bytes() == before
    assert same(load_model(folder, device="cpu"), model)


SPY = """
import json, sys, torch
from pathlib import Path
from mixtral_lab.weights import load_model

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

small, large = sys.argv[1:]
torch.set_num_threads(1)
ids = torch.zeros(1, 1, dtype=torch.long)
with torch.no_grad():
    for dtype in ("bfloat16", "float16"):
        load_model(small, "cpu", dtype)(ids)  # whatever is imported or set up on first use
    start = private()
    model = load_model(large, "cpu", "bfloat16")
    loaded = private() - start
    model(ids)
    sum(parameter.sum() for parameter in model.parameters())
    used = private() - start
    copy = load_model(large, "cpu", "float16")
    print(json.dumps([loaded, used, private() - start - used]))
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc/self/status")
def test_loading_takes_no_private_memory_and_converting_takes_one_copy(good, tmp_path):
    """For a checkpoint of 200 MB. Counted as RssAnon: pages that belong to no file, unlike those of a map."""
    config = replace(SPARSE, dim=1024, hidden=2048, n_experts=8, vocab=512)
    model = checkpoint.blank(config).to(torch.bfloat16).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    large = save_model(model, tmp_path / "large", max_shard_bytes=150_000_000)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2**20
    command = [sys.executable, "-c", SPY, str(good), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    loaded, used, converted = json.loads(done.stdout)
    print(f"files {size:.0f} MiB; private: {loaded:.1f} loaded, {used:.1f} used, {converted:.1f} converted")
    assert size > 190
    assert loaded < 10
    assert used < 30
    assert size - 5 < converted < size + 30


# --- What lies there ------------------------------------------------------------------------------


def test_describe_lists_what_is_stored_and_what_we_call_it(tmp_path):
    theirs, model = twin(SPARSE)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    found = {tensor.name: tensor for tensor in describe(tmp_path)}
    stack = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert (stack.shape, stack.dtype, stack.bytes) == ((4, 40, 24), "F32", 4 * 40 * 24 * 4)
    assert stack.ours[:3] == tuple(f"layers.1.experts.ffn.{it}.weight" for it in ("0.gate", "0.up", "1.gate"))
    assert {name for tensor in found.values() for name in tensor.ours} == model.state_dict().keys()
    assert sum(tensor.bytes for tensor in found.values()) == memory_needed(SPARSE, "float32")


def test_describe_works_where_loading_would_not(tmp_path):
    folder = save_model(random_model(DENSE), tmp_path / "saved")
    edit_tensors(folder / "model.safetensors", lambda it: it.update(odd=it.pop("lm_head.weight")))
    found = {tensor.name: tensor for tensor in describe(folder)}
    assert found["odd"].ours == ()
    assert "lm_head.weight" not in found


# --- Bad checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path) -> Path:
    return save_model(random_model(SPARSE), tmp_path / "good")


def swap(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    def change(tensors):
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    edit_tensors(folder / "model.safetensors", change)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def header(file: Path, change) -> None:
    """Change a safetensors header, and leave the numbers alone."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    changed = change(content[8 : 8 + size])
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


Q = "model.layers.1.self_attn.q_proj.weight"
W3 = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
BAD = {
    "missing": (lambda d: swap(d, W3, None), MissingTensors, ["lacks 1 tensor", W3]),
    "extra": (lambda d: swap(d, "odd", torch.ones(3)), ExtraTensors, ["holds 1 tensor", "no place for", "odd"]),
    "bias": (
        lambda d: swap(d, Q.replace("weight", "bias"), torch.ones(48)), ExtraTensors, ["q_proj.bias"],
    ),
    "renamed": (
        lambda d: (swap(d, Q, None), swap(d, "odd", torch.ones(3))), MissingTensors, ["lacks", Q, "holds", "odd"],
    ),
    "shape": (lambda d: swap(d, Q, torch.ones(24, 48)), WrongShape, [Q, "(24, 48)", "(48, 24)"]),
    "vocab": (
        lambda d: edit_json(d / "config.json", vocab_size=38), WrongShape, ["embed_tokens", "(37, 24)", "(38, 24)"],
    ),
    "more layers": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=3), MissingTensors,
        ["lacks 19 tensors", "model.layers.2.", "and 14 more"],
    ),
    "fewer experts": (lambda d: edit_json(d / "config.json", num_local_experts=3), ExtraTensors, ["experts.3.w1"]),
    "absurd": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=10**9), MissingTensors, ["do not belong together"],
    ),
    "tied": (
        lambda d: edit_json(d / "config.json", tie_word_embeddings=True), ExtraTensors, ["lm_head.weight"],
    ),
    "int8": (
        lambda d: swap(d, Q, torch.ones(48, 24, dtype=torch.int8)), DtypeError, [Q, "I8", "F32, BF16, F16"],
    ),
    "cut in the numbers": (lambda d: cut(d / "model.safetensors", 9000), CorruptFile, ["model.safetensors", "cut short"]),
    "cut in the header": (lambda d: cut(d / "model.safetensors", 100), CorruptFile, ["model.safetensors", "cut short"]),
    "empty": (lambda d: cut(d / "model.safetensors", 0), CorruptFile, ["model.safetensors", "cut short"]),
    "header": (
        lambda d: header(d / "model.safetensors", lambda h: b"[" + h[1:]), CorruptFile, ["model.safetensors", "damaged"],
    ),
    "offsets": (
        lambda d: header(d / "model.safetensors", lambda h: h.replace(b"[48,24]", b"[48,25]", 1)), CorruptFile,
        ["model.safetensors", "damaged"],
    ),
    "git-lfs": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7\n"),
        CorruptFile, ["model.safetensors", "git lfs pull"],
    ),
    "config is no JSON": (lambda d: cut(d / "config.json", 50), CorruptFile, ["config.json", "JSON"]),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), CorruptFile, ["config.json", "list"]),
    "no config": (lambda d: (d / "config.json").unlink(), CheckpointError, ["no checkpoint", "config.json"]),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(), CheckpointError, ["no checkpoint", "found config.json"],
    ),
    "pickle": (to_pickle, PickleRefused, ["pytorch_model.bin", "can run any program", "save_pretrained('new-folder')"]),
    "layers of another size": (
        lambda d: edit_json(d / "config.json", intermediate_size=21), WrongShape, ["(20, 24)", "(21, 24)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_costs_one_sentence(case, good):
    damage, error, words = BAD[case]
    damage(good)
    before = snapshot(good.parent)
    with pytest.raises(error) as caught:
        load_model(good, device="cpu")
    assert caught.type is error
    one_sentence(caught.value, [*words, str(good)])
    assert snapshot(good.parent) == before


def test_no_weight_is_read_before_everything_is_checked(good, monkeypatch):
    swap(good, "zzz.odd", torch.ones(3))
    monkeypatch.setattr(Transformer, "load_state_dict", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ExtraTensors):
        load_model(good)


def test_missing_shards_are_named(tmp_path):
    folder = save_model(random_model(SPARSE), tmp_path / "saved", max_shard_bytes=6000)
    total = len(list(folder.glob("*.safetensors")))
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    for step in ("with the index", "without it"):
        with pytest.raises(MissingShards) as caught:
            load_model(folder)
        one_sentence(caught.value, [str(folder), f"lacks 1 of {total}", lost.name])
        if step == "with the index":
            (folder / "model.safetensors.index.json").unlink()


def test_a_damaged_shard_or_index_is_named(tmp_path):
    folder = save_model(random_model(SPARSE), tmp_path / "saved", max_shard_bytes=6000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    index, whole = folder / "model.safetensors.index.json", second.read_bytes()
    cut(second, 3000)
    with pytest.raises(CorruptFile, match=second.name):
        load_model(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CorruptFile, match="and so does another file"):
        load_model(folder)
    second.write_bytes(whole)
    for wrong in ({"weight_map": 3}, {"weight_map": {"a": "../other/file"}}, {}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(CorruptFile, match="has no weight_map"):
            load_model(folder)
    index.write_text("{")
    with pytest.raises(CorruptFile, match=r"index\.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_stays_closed(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    torch.save({"weight": Trap()}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(PickleRefused) as caught:
            load_model(path)
        one_sentence(caught.value, [name, "weights_only=True", "save_file"])


def test_paths_that_hold_no_checkpoint(tmp_path, good):
    nothing = {
        tmp_path / "nowhere": "There is no file or folder",
        good / "model.safetensors": "give the folder that holds it",
        tmp_path: "holds no checkpoint",
        good / "config.json": "GGUF magic invalid",
    }
    for path, words in nothing.items():
        for use in (load_model, describe, read_config):
            with pytest.raises(CheckpointError) as caught:
                use(path)
            one_sentence(caught.value, [str(path), words])


# --- Devices, dtypes, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "cpu:x", "mps" if LINUX else "hpu"])
def test_no_such_device(device, good):
    with pytest.raises(DeviceError) as caught:
        load_model(good, device=device)
    one_sentence(caught.value, [repr(device), "there is cpu"])


@pytest.mark.parametrize("dtype", ["float99", "int8", "F32", torch.float64, torch.int32])
def test_no_such_dtype(dtype, good):
    with pytest.raises(DtypeError) as caught:
        load_model(good, dtype=dtype)
    one_sentence(caught.value, [str(dtype), "float32, bfloat16, float16"])
    with pytest.raises(DtypeError):
        save_model(load_model(good), good.parent / "new", dtype=dtype)
    assert not (good.parent / "new").exists()


def test_auto_device_and_dtype(monkeypatch):
    small, big = PRESETS["mini-mixtral"].config, PRESETS["mistral-7b-v0.1"].config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_dtype("auto", torch.bfloat16, "cpu", small) is torch.float32
    assert resolve_dtype("auto", torch.bfloat16, "cpu", big) is torch.bfloat16
    assert resolve_dtype("auto", torch.float16, "cpu") is torch.float16
    assert resolve_dtype("float16", torch.bfloat16, "cpu", small) is torch.float16
    monkeypatch.setattr(weights, "free_memory", lambda device: 50_000_000)
    assert resolve_dtype("auto", torch.bfloat16, "cpu", small) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setattr(weights, "resolve_device", torch.device)
    assert resolve_dtype("auto", torch.float32, "cuda", small) is torch.bfloat16


def test_auto_dtype_of_a_loaded_model(good):
    for dtype in ("bfloat16", "float16"):
        folder = save_model(load_model(good), good.parent / dtype, dtype=dtype)
        assert load_model(folder, "cpu").embed.weight.dtype is torch.float32


def test_memory_is_estimated_before_anything_is_read(good, monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda device: 1000)
    for dtype, words in {"float32": ["float32", "bfloat16"], "bfloat16": ["0.0 GB in bfloat16"]}.items():
        with pytest.raises(NotEnoughMemory) as caught:
            load_model(good, "cpu", dtype)
        one_sentence(caught.value, [*words, "GB are free on cpu", "a smaller model"])


def test_memory_needed_in_the_message(monkeypatch):
    config = PRESETS["mixtral-8x7b"].config
    assert f"{memory_needed(config, 'bfloat16') / 1e9:.1f}" == "93.4"
    assert memory_needed(config, torch.float32) == 2 * memory_needed(config, "bfloat16")
    monkeypatch.setattr(weights, "free_memory", lambda device: 21_000_000_000)
    with pytest.raises(NotEnoughMemory, match=r"need 93\.4 GB in bfloat16, but 21\.0 GB are free on cpu"):
        weights._check_memory(config, torch.bfloat16, torch.device("cpu"), config.n_experts or 1, None)


def test_free_memory_with_and_without_proc(monkeypatch):
    free = free_memory("cpu")
    assert free is not None
    assert free > 10**8
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError("no /proc")))
    fallback = free_memory("cpu")
    assert fallback is not None
    assert fallback >= free
    monkeypatch.setattr(weights.os, "sysconf", lambda _: (_ for _ in ()).throw(ValueError("unknown")))
    assert free_memory("cpu") is None
    assert resolve_dtype("auto", torch.float16, "cpu", SPARSE) is torch.float32


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_an_existing_checkpoint_is_never_overwritten_unasked(layout, good):
    before = snapshot(good)
    with pytest.raises(CheckpointError) as caught:
        save_model(random_model(DENSE), good, layout=layout)
    one_sentence(caught.value, [str(good), "config.json", "overwrite=True"])
    assert snapshot(good) == before


def test_overwriting_replaces_the_checkpoint_and_nothing_else(tmp_path):
    folder, (first, second, third) = tmp_path / "saved", (random_model(it) for it in (SPARSE, DENSE, SPARSE))
    folder.mkdir()
    (folder / "tokenizer.json").write_text("ours")
    (folder / "trace.safetensors").write_text("ours too")
    save_model(first, folder, max_shard_bytes=6000)
    save_model(second, folder, overwrite=True)
    kept = {"tokenizer.json", "trace.safetensors"}
    assert {file.name for file in folder.iterdir()} == kept | {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert same(load_model(folder, device="cpu"), second)
    save_model(third, folder, layout="mistral", overwrite=True)
    assert {file.name for file in folder.iterdir()} == kept | {"params.json", "consolidated.safetensors"}
    assert (folder / "trace.safetensors").read_text() == "ours too"
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_a_mapped_model_can_be_saved_over_its_own_files(good):
    loaded = load_model(good, device="cpu")
    copy = random_like(loaded, torch.float32)
    save_model(loaded, good, overwrite=True, max_shard_bytes=6000)
    assert same(loaded, copy)
    assert same(load_model(good, device="cpu"), copy)


@pytest.mark.parametrize("target", ["new", "deep/er/new", "good"])
def test_a_failed_save_leaves_nothing(target, good, monkeypatch):
    shards = []

    def disk_full(tensors, file, metadata):
        if shards:
            raise OSError(errno.ENOSPC, "No space left on device")
        shards.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(weights, "save_file", disk_full)
    before = snapshot(good.parent)
    folders = sorted(good.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        save_model(load_model(good), good.parent / target, max_shard_bytes=6000, overwrite=True)
    one_sentence(caught.value, [target, "could not be written", "No space left on device"])
    assert len(shards) == 1
    assert snapshot(good.parent) == before
    assert sorted(good.parent.rglob("*")) == folders


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(random_model(DENSE), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved(tmp_path):
    model = random_model(SPARSE)
    (tmp_path / "file").write_text("text")
    cases = [
        ({"folder": tmp_path / "file"}, CheckpointError, "is a file"),
        ({"layout": "gguf"}, CheckpointError, "no layout 'gguf'"),
        ({"layout": "mistral", "bos": 1}, CheckpointError, "no place for bos_token_id"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error) as caught:
            save_model(model, **{"folder": tmp_path / "new", **arguments})
        one_sentence(caught.value, [words])
    model.layers[0].experts.ffn[1].up = torch.nn.Linear(5, 6, bias=False)
    with pytest.raises(WrongShape, match=r"layers\.0\.experts\.ffn\.1\.up\.weight has shape \(6, 5\)"):
        save_model(model, tmp_path / "new")
    model.layers[0].experts.ffn[1].up = torch.nn.Sequential(torch.nn.Linear(24, 20, bias=False))
    with pytest.raises(CheckpointError, match=r"differ in layers\.0\.experts\.ffn\.1\.up\.0\.weight"):
        save_model(model, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_files_name_every_parameter_of_every_kind_of_model():
    for layout in (
        checkpoint.HUGGING_FACE,
        checkpoint.HUGGING_FACE_FUSED,
        checkpoint.MISTRAL,
        checkpoint.GGUF,
    ):
        for config in (SPARSE, DENSE):
            names = checkpoint.blank(config).state_dict()
            places = [checkpoint.place_of(name, layout) for name in names]
            assert len(set(places)) == len(names)


def test_safetensors_files_say_that_they_are_pytorchs(good):
    with safe_open(good / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
