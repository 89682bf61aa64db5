"""What lies in checkpoint files: names, shapes and the config, read from their headers. No weight is read
here.

Three kinds are known: a Hugging Face folder (`config.json` with `model*.safetensors`), a folder in Mistral's
own layout (`params.json` with `consolidated*.safetensors`), and a GGUF file of the llama family. Every name
that a file gives to a weight or a setting stands in the tables below, and nowhere else in this package.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mixtral_lab.config import Config, ConfigError, LabError
from mixtral_lab.model import Transformer


class CheckpointError(LabError):
    """A checkpoint cannot be read or written; the subclasses say why."""


class MissingTensors(CheckpointError):
    """The files lack tensors that the config promises."""


class ExtraTensors(CheckpointError):
    """The files hold tensors that the config has no place for."""


class WrongShape(CheckpointError):
    """A tensor has another shape than the config promises."""


class MissingShards(CheckpointError):
    """Some of the files that make up a checkpoint are not there."""


class CorruptFile(CheckpointError):
    """A file is cut short, or is not what its name says."""


class PickleRefused(CheckpointError):
    """The checkpoint is a pickle, and opening a pickle can run any program."""


class UnknownArchitecture(CheckpointError):
    """The checkpoint is of a model that `mixtral_lab.model` is not."""


class NotEnoughMemory(CheckpointError):
    """The weights would not fit into the memory that is free."""


class DeviceError(LabError, ValueError):
    """There is no such device here."""


class DtypeError(LabError, ValueError):
    """There is no such dtype, or the model does not compute in it."""


# --- What the files call things -------------------------------------------------------------------

# Our parameters, all of which end in ".weight". L is the layer, E the expert; "[E]" means that the experts of
# a layer are stacked in one tensor.
# fmt: off
OUTSIDE_THE_LAYERS = {
    # ours                 Hugging Face                     Mistral                      GGUF
    "embed":              ("model.embed_tokens",            "tok_embeddings",            "token_embd"),
    "final_norm":         ("model.norm",                    "norm",                      "output_norm"),
    "unembed":            ("lm_head",                       "output",                    "output"),
}
IN_A_LAYER = {
    "layers.L.":          ("model.layers.L.",               "layers.L.",                 "blk.L."),
    "attention_norm":     ("input_layernorm",               "attention_norm",            "attn_norm"),
    "attention.query":    ("self_attn.q_proj",              "attention.wq",              "attn_q"),
    "attention.key":      ("self_attn.k_proj",              "attention.wk",              "attn_k"),
    "attention.value":    ("self_attn.v_proj",              "attention.wv",              "attn_v"),
    "attention.output":   ("self_attn.o_proj",              "attention.wo",              "attn_output"),
    "ffn_norm":           ("post_attention_layernorm",      "ffn_norm",                  "ffn_norm"),
    "feed_forward.gate":  ("mlp.gate_proj",                 "feed_forward.w1",           "ffn_gate"),
    "feed_forward.up":    ("mlp.up_proj",                   "feed_forward.w3",           "ffn_up"),
    "feed_forward.down":  ("mlp.down_proj",                 "feed_forward.w2",           "ffn_down"),
    "router.score":       ("block_sparse_moe.gate",         "feed_forward.gate",         "ffn_gate_inp"),
    "experts.ffn.E.gate": ("block_sparse_moe.experts.E.w1", "feed_forward.experts.E.w1", "ffn_gate_exps[E]"),
    "experts.ffn.E.up":   ("block_sparse_moe.experts.E.w3", "feed_forward.experts.E.w3", "ffn_up_exps[E]"),
    "experts.ffn.E.down": ("block_sparse_moe.experts.E.w2", "feed_forward.experts.E.w2", "ffn_down_exps[E]"),
}
# The numbers of our Config.
FIELDS = {
    "dim":        ("hidden_size",             "dim",                 "embedding_length"),
    "n_layers":   ("num_hidden_layers",       "n_layers",            "block_count"),
    "n_heads":    ("num_attention_heads",     "n_heads",             "attention.head_count"),
    "n_kv_heads": ("num_key_value_heads",     "n_kv_heads",          "attention.head_count_kv"),
    "head_dim":   ("head_dim",                "head_dim",            "attention.key_length"),
    "hidden":     ("intermediate_size",       "hidden_dim",          "feed_forward_length"),
    "vocab":      ("vocab_size",              "vocab_size",          "vocab_size"),
    "context":    ("max_position_embeddings", "max_seq_len",         "context_length"),
    "n_experts":  ("num_local_experts",       "num_experts",         "expert_count"),
    "n_choices":  ("num_experts_per_tok",     "num_experts_per_tok", "expert_used_count"),
    "window":     ("sliding_window",          "sliding_window",      "attention.sliding_window"),
    "rope_theta": ("rope_theta",              "rope_theta",          "rope.freq_base"),
    "norm_eps":   ("rms_norm_eps",            "norm_eps",            "attention.layer_norm_rms_epsilon"),
    "tied":       ("tie_word_embeddings",     "tied_embeddings",     "(tied if output.weight is absent)"),
}
# Settings of models that ours is not: any value but the one here is refused.
PLAIN: tuple[dict[str, Any], ...] = (
    {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
        "rope_type": "default", "quantization_config": None, "layer_types": None,
    },
    {
        "model_type": "transformer", "use_biases": False, "causal": True, "lora": None, "quantization": None,
        "rope_scaling": None, "yarn": None, "llama_4_scaling": None, "q_lora_rank": None,
        "vision_encoder": None,
    },
    {"rope.scaling.type": "none", "expert_shared_count": 0},
)
# Hugging Face's model types: the class, and what transformers takes where config.json is silent.
MODEL_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {"n_kv_heads": 8, "window": 4096, "rope_theta": 1e4}),
    "mixtral": ("MixtralForCausalLM", {"n_kv_heads": 8, "window": None, "rope_theta": 1e6}),
    "llama":   ("LlamaForCausalLM",   {"window": None, "rope_theta": 1e4}),
}
# fmt: on

STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PICKLES = (".bin", ".pth", ".pt")


class Layout(NamedTuple):
    """One kind of checkpoint: its names for our parameters, and how it pairs the rows that rotate together.

    Neighbours: (0, 1), (2, 3), ... Otherwise, as in our model, row `i` of a head with row `i + head_dim / 2`.
    """

    names: dict[str, str]
    neighbours: bool


def _layout(column: int, neighbours: bool) -> Layout:
    inside = {ours: row[column] for ours, row in IN_A_LAYER.items()}
    prefix = inside.pop("layers.L.")
    names = {ours: row[column] for ours, row in OUTSIDE_THE_LAYERS.items()}
    names |= {f"layers.L.{ours}": prefix + theirs for ours, theirs in inside.items()}
    ended = {}
    for ours, theirs in names.items():
        name, stack, _ = theirs.partition("[E]")
        ended[f"{ours}.weight"] = f"{name}.weight{stack}"
    return Layout(ended, neighbours)


HUGGING_FACE = _layout(0, neighbours=False)
HUGGING_FACE_FUSED = Layout(  # as transformers 5 names its parameters in memory; gate stands above up
    HUGGING_FACE.names
    | {
        "layers.L.router.score.weight": "model.layers.L.mlp.gate.weight",
        "layers.L.experts.ffn.E.gate.weight": "model.layers.L.mlp.experts.gate_up_proj[E] first half",
        "layers.L.experts.ffn.E.up.weight": "model.layers.L.mlp.experts.gate_up_proj[E] second half",
        "layers.L.experts.ffn.E.down.weight": "model.layers.L.mlp.experts.down_proj[E]",
    },
    neighbours=False,
)
MISTRAL = _layout(1, neighbours=True)
GGUF = _layout(2, neighbours=True)
GGUF_PER_EXPERT = Layout(  # the first Mixtral files, of the winter of 2023
    GGUF.names | {f"layers.L.experts.ffn.E.{it}.weight": f"blk.L.ffn_{it}.E.weight" for it in ("gate", "up", "down")},
    neighbours=True,
)


class Stored(NamedTuple):
    """One tensor as it lies in a file: `shape` outermost first, `dtype` as the file says (BF16, Q4_1)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    ours: tuple[str, ...] = ()  # our parameters in it: one, or every expert of a stack, or none that we know


# --- Configs --------------------------------------------------------------------------------------


def read_config(path: str | Path) -> Config:
    """The shape of the model in a Hugging Face folder, a folder in Mistral's layout, or a GGUF file.

    Reads no weights; a folder need not even hold them. GGUF files of Mistral 7B do not tell its window.
    Raises `CheckpointError` if there is no config or it cannot be read, `UnknownArchitecture` if it asks for
    a feature that our model does not have, and `ConfigError` if its numbers contradict each other.
    """
    path = Path(path)
    for name in ("config.json", "params.json"):
        if (path / name).is_file():
            return _json_config(path / name)
    return open_checkpoint(path).config


def _json_config(file: Path) -> Config:
    raw = _read_json(file)
    try:
        return hugging_face_config(file, raw) if file.name == "config.json" else _mistral_config(file, raw)
    except (TypeError, AttributeError):
        raise CorruptFile(f"{file} holds a value of a kind that makes no sense where it stands.") from None


def hugging_face_config(file: Path | str, raw: dict[str, Any]) -> Config:
    """Our config from the values of a config.json; `file` says where they stand. Raises what `read_config` raises."""
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        also = " that reads images or sounds as well" if {"vision_config", "audio_config"} & raw.keys() else ""
        raise UnknownArchitecture(
            f"{file} describes a model of type {kind!r}{also}; this package knows {', '.join(MODEL_TYPES)}, all text alone."
        )
    architecture, silent = MODEL_TYPES[kind]
    if (named := raw.get("architectures") or [architecture]) != [architecture]:
        raise UnknownArchitecture(f"{file} says {named} of type {kind!r}; we know {architecture} alone.")
    if kind != "mixtral" and raw.get("num_local_experts"):
        raise ConfigError(f"{file} says both model_type {kind!r}, which is dense, and num_local_experts.")
    # transformers 5 gathers in rope_parameters what used to stand in rope_theta and rope_scaling
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
    if raw.get("rope_theta") not in (None, rope.get("rope_theta", raw.get("rope_theta"))):
        raise ConfigError(f"{file} says rope_theta twice: {raw['rope_theta']} and {rope['rope_theta']}.")
    defaults = {"head_dim": None, "tied": False, **silent}
    if kind != "mixtral":
        defaults |= {"n_experts": None, "n_choices": None}
    if kind == "llama":
        defaults["n_kv_heads"] = raw.get("num_attention_heads")
        raw.pop("sliding_window", None)
    if "sliding_window" in raw:
        defaults["window"] = None  # null means no window; silence means transformers' default
    return _config(file, 0, raw | rope, defaults)


def _mistral_config(file: Path, raw: dict[str, Any]) -> Config:
    defaults = {"context": raw.get("max_position_embeddings", 32768), "window": None, "tied": False}
    # Silent files turn at the speed that mistral-inference gave them: 7B v0.1, with its window, at 10,000
    defaults["rope_theta"] = 1e4 if raw.get("sliding_window") else 1e6
    moe = raw.get("moe") or {}
    if not moe:
        defaults |= {"n_experts": None, "n_choices": None}
    return _config(file, 1, raw | moe, defaults)


def _gguf_config(file: Path, reader: Any) -> Config:
    known = {name: it.contents() for name, it in reader.fields.items() if not name.startswith("tokenizer.")}
    if (kind := known.get("general.architecture")) != "llama":
        raise UnknownArchitecture(f"{file} holds a model of architecture {kind!r}; we know llama alone.")
    raw = {name.removeprefix("llama."): value for name, value in known.items() if value}
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    defaults = {
        "n_kv_heads": raw.get("attention.head_count"),
        "head_dim": None,
        "vocab": shapes.get("token_embd.weight", [0])[-1],
        "n_experts": None,
        "n_choices": None,
        "window": None,
        "rope_theta": 1e4,
        "tied": "output.weight" not in shapes,
    }
    config = _config(file, 2, raw, defaults)
    if raw.get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise UnknownArchitecture(
            f"{file} rotates {raw['rope.dimension_count']} numbers of each head; we, all {config.head_dim}."
        )
    return config


def _config(file: Path | str, column: int, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """Build the config from a file's own names, which stand in one column of `FIELDS`."""
    for name, plain in PLAIN[column].items():
        if raw.get(name) not in (None, plain):
            raise UnknownArchitecture(f"{file} says {name} = {raw[name]!r}; our model knows {plain!r} alone.")
    numbers: dict[str, Any] = {}
    for ours, row in FIELDS.items():
        value = raw.get(row[column])
        if value is None and ours not in defaults:
            raise CheckpointError(f"{file} has no {row[column]!r}, without which the model cannot be built.")
        if not isinstance(value, int | float | None):
            raise ConfigError(f"{file} says {row[column]} = {value!r}, but that should be one number.")
        numbers[ours] = defaults[ours] if value is None else value
    try:
        if numbers["head_dim"] is None:
            numbers["head_dim"], rest = divmod(numbers["dim"], numbers["n_heads"] or 1)
            if rest:
                raise ConfigError(f"{numbers['dim']} numbers do not divide into {numbers['n_heads']} heads.")
        return Config(**numbers)
    except ConfigError as error:
        raise ConfigError(f"{file} makes no sense: {error}") from None


def hugging_face_json(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    kind = "mistral" if config.n_experts is None else "mixtral"
    numbers = {row[0]: getattr(config, ours) for ours, row in FIELDS.items()}
    if config.n_experts is None:
        del numbers["num_local_experts"], numbers["num_experts_per_tok"]
    return {
        "architectures": [MODEL_TYPES[kind][0]],
        "model_type": kind,
        "hidden_act": "silu",
        **numbers,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # for transformers 5
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def mistral_json(config: Config) -> dict[str, Any]:
    numbers = {row[1]: getattr(config, ours) for ours, row in FIELDS.items()}
    moe = {name: numbers.pop(name) for name in ("num_experts", "num_experts_per_tok")}
    return numbers if config.n_experts is None else numbers | {"moe": moe}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFile(f"{file} is damaged, cut short, or not JSON at all: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise CorruptFile(f"{file} holds a {type(found).__name__}, but it should hold names and values.")
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- Opening: headers only ------------------------------------------------------------------------


class Source(NamedTuple):
    """An open checkpoint. `read` gives a stored tensor, or one expert of a stack, as a view if it can."""

    path: Path
    config: Config
    layouts: tuple[Layout, ...]
    tensors: dict[str, Stored]
    read: Callable[[str, int | None], Tensor]


def open_checkpoint(path: Path) -> Source:
    """Find out what is at `path`, and read its config and headers."""
    if not path.exists():
        raise CheckpointError(f"There is no file or folder {path}.")
    if path.suffix in PICKLES:
        raise _pickle(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is only the weights: give the folder that holds it and its config.")
    if not path.is_dir():
        return _open_gguf(path)
    for stem, name, layouts in (
        ("model", "config.json", (HUGGING_FACE, HUGGING_FACE_FUSED)),
        ("consolidated", "params.json", (MISTRAL,)),
    ):
        if (path / name).is_file() and (shards := _shards(path, stem)):
            return _open_safetensors(path, shards, _json_config(path / name), layouts)
    files = sorted(path.iterdir())
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if not ggufs and (pickles := [file for file in files if file.suffix in PICKLES]):
        raise _pickle(pickles[0])
    raise CheckpointError(
        f"{path} holds no checkpoint: there should be config.json with model*.safetensors, params.json with "
        f"consolidated*.safetensors, or exactly one .gguf file; found {some([file.name for file in files])}."
    )


def _pickle(file: Path) -> PickleRefused:
    return PickleRefused(
        f"{file} is a pickle, and opening a pickle can run any program that its author hid in it, so it "
        "stays closed; if you trust the author, convert the folder once with transformers, "
        f"AutoModelForCausalLM.from_pretrained({str(file.parent)!r}).save_pretrained('new-folder'), "
        f"or the one file with safetensors.torch.save_file(torch.load({str(file)!r}, weights_only=True), "
        "'consolidated.safetensors'), and load the result."
    )


def _shards(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a checkpoint, all of which are there; none if it has none of that stem."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
            raise CorruptFile(f"{index} has no weight_map that says which tensor is in which file beside it.")
        names = sorted(set(shards.values()))
    else:
        found = sorted(file.name for file in folder.glob(f"{stem}-*-of-*.safetensors"))
        total = re.search(r"-of-(\d+)\.", found[0]) if found else None
        if total is None:
            return []
        wide = len(total[1])
        names = [f"{stem}-{i:0{wide}}-of-{total[1]}.safetensors" for i in range(1, int(total[1]) + 1)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise MissingShards(f"{folder} lacks {len(missing)} of {len(names)} weight files: {some(missing)}.")
    return [folder / name for name in names]


def _open_safetensors(path: Path, files: list[Path], config: Config, layouts: tuple[Layout, ...]) -> Source:
    tensors: dict[str, Stored] = {}
    holder: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from None
        for name in handle.keys():  # noqa: SIM118  (it is no dict)
            if name in tensors:
                raise CorruptFile(f"{file} holds {name}, and so does another file of {path}.")
            part = handle.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if dtype not in STORED_DTYPES:
                raise DtypeError(f"{file} stores {name} as {dtype}; we read {', '.join(STORED_DTYPES)} alone.")
            tensors[name] = Stored(name, shape, dtype, prod(shape) * STORED_DTYPES[dtype].itemsize)
            holder[name] = file, handle

    maps: dict[Path, Callable[[str], Tensor | None]] = {}

    def read(name: str, expert: int | None) -> Tensor:
        file, handle = holder[name]
        if file not in maps:
            maps[file] = _mapped(file, tensors)
        tensor = maps[file](name)
        if tensor is None:
            tensor = handle.get_tensor(name)
        return tensor if expert is None else tensor[expert]

    return Source(path, config, layouts, tensors, read)


def _mapped(file: Path, tensors: Mapping[str, Stored]) -> Callable[[str], Tensor | None]:
    """A reader of tensors as views of one map of the file, so that experts which lie side by side there still do.

    It gives None for a tensor that does not lie at a multiple of its numbers' size. `safe_open` has checked the header.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    whole = torch.tensor([], dtype=torch.uint8)
    storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)  # private: a write stays here
    whole.set_(storage)

    def view(name: str) -> Tensor | None:
        start, end = (8 + length + at for at in header[name]["data_offsets"])
        stored = tensors[name]
        numbers = STORED_DTYPES[stored.dtype]
        return None if start % numbers.itemsize else whole[start:end].view(numbers).view(stored.shape)

    return view


def _open_gguf(file: Path) -> Source:
    import gguf  # here, because it takes as long to import as PyTorch

    class Reader(gguf.GGUFReader):
        """The package's reader, on a plain view of its map: slicing numpy's map takes four times as long."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    try:
        reader = Reader(file, "c")  # "c": mapped, and pages that are written to stay private
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise _unreadable(file, error) from None
    if reader.byte_order == "S":
        raise CorruptFile(f"{file} is written in the byte order of other machines than this one.")
    found = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str, expert: int | None) -> Tensor:
        data, kind = found[name].data, found[name].tensor_type
        data = data if expert is None else data[expert]
        if kind.name in ("F32", "F16"):
            return torch.from_numpy(data)
        try:
            return torch.from_numpy(gguf.dequantize(data, kind))
        except NotImplementedError:
            why = f"{file} stores {name} as {kind.name}, which the gguf package cannot unpack."
            raise DtypeError(why) from None

    tensors = {
        name: Stored(name, tuple(it.shape.tolist()[::-1]), it.tensor_type.name, int(it.n_bytes))
        for name, it in found.items()
    }
    return Source(file, _gguf_config(file, reader), (GGUF, GGUF_PER_EXPERT), tensors, read)


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError):
        return CheckpointError(f"{file} cannot be read: {error}.")
    why = str(error).rstrip(".")
    with file.open("rb") as start:
        if start.read(40).startswith(b"version https://git-lfs"):
            why = "it is only git-lfs's pointer to the real file; run git lfs pull"
    return CorruptFile(f"{file} is damaged, cut short, or not such a file at all: {why}.")


# --- Finding each of our parameters in the files --------------------------------------------------


class Place(NamedTuple):
    """A stored tensor, and the part of it that is one of our parameters."""

    tensor: str
    expert: int | None
    half: int | None

    def whole(self, part: tuple[int, ...], n_experts: int | None) -> tuple[int, ...]:
        """The shape of the stored tensor, from that of the part."""
        if self.half is not None:
            part = (2 * part[0], *part[1:])
        return part if self.expert is None else (n_experts or 0, *part)


def place_of(ours: str, layout: Layout) -> Place:
    """Where a layout keeps a parameter, `layers.3.experts.ffn.5.up.weight` for instance."""
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    filled, blanks = dict(zip("LE", number.findall(ours), strict=False)), iter("LE")
    theirs = layout.names[number.sub(lambda _: next(blanks), ours)].translate(str.maketrans(filled))
    tensor, _, part = theirs.partition("[")
    expert, _, half = part.partition("]")
    halves = {"": None, " first half": 0, " second half": 1}
    return Place(tensor, int(expert) if expert else None, halves[half])


class Match(NamedTuple):
    """The model without its numbers, the layout that fits the files best, and where each parameter lies."""

    model: Transformer
    layout: Layout
    places: dict[str, Place]


def match(source: Source) -> Match:
    """Find every parameter of the model that the config describes. What is not there is found out later.

    Raises `MissingTensors` for a config so absurd that not even the names should be listed.
    """
    numbers = sum(prod(tensor.shape) for tensor in source.tensors.values())
    if source.config.parameters > 100 * numbers:
        raise MissingTensors(
            f"The config of {source.path} describes {source.config.parameters:.1e} numbers, but its files "
            f"hold {numbers:.1e}: they do not belong together."
        )

    def lacking(found: Match) -> int:
        return sum(place.tensor not in source.tensors for place in found.places.values())

    model = blank(source.config)
    names = model.state_dict()
    return min((Match(model, it, {ours: place_of(ours, it) for ours in names}) for it in source.layouts), key=lacking)


class _Unset(TorchFunctionMode):
    """Leave new parameters unset: on the meta device, drawing them would import 800 modules to no end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def blank(config: Config) -> Transformer:
    """The model without its numbers: names and shapes alone."""
    with torch.device("meta"), _Unset():
        return Transformer(config)


def check_tensors(source: Source, found: Match) -> None:
    """Compare names and shapes in the files with what the config promises.

    Raises `MissingTensors`, `ExtraTensors` or `WrongShape`.
    """
    stored, parameters = source.tensors, found.model.state_dict()
    promised = {
        place.tensor: place.whole(tuple(parameters[ours].shape), source.config.n_experts)
        for ours, place in found.places.items()
    }
    missing = [name for name in promised if name not in stored]
    extra = [name for name in stored if name not in promised]
    unplaced = f"holds {_count(extra)} that its config has no place for: {some(extra)}"
    if missing:
        also = f"; it {unplaced}" if extra else ""
        raise MissingTensors(f"{source.path} lacks {_count(missing)}: {some(missing)}{also}.")
    if extra:
        raise ExtraTensors(f"{source.path} {unplaced}.")
    for name, shape in promised.items():
        if stored[name].shape != shape:
            raise WrongShape(
                f"{source.path} stores {name} with shape {stored[name].shape}; its config promises {shape}."
            )


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype of most bytes; quantised numbers count as bfloat16, which is as fine as they are."""
    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.bytes
    return STORED_DTYPES.get(sizes.most_common(1)[0][0], torch.bfloat16)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(sorted(names)[:most]) or "nothing") + more
