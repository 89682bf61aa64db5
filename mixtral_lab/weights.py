"""Checkpoint files become model parameters, and back.

`checkpoint.py` knows what the files call things, and checks names and shapes from their headers before any
weight is read, so a bad checkpoint costs one sentence and leaves nothing behind.

On the CPU, in the dtype of the file, parameters are views of the mapped file: nothing is copied, and the
operating system reads a page when it is first used. The mapping is private: writing to a parameter never
reaches the file.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixtral_lab.checkpoint import (
    HUGGING_FACE,
    MISTRAL,
    CheckpointError,
    CorruptFile,
    DeviceError,
    DtypeError,
    ExtraTensors,
    Layout,
    MissingShards,
    MissingTensors,
    NotEnoughMemory,
    PickleRefused,
    Place,
    Stored,
    UnknownArchitecture,
    WrongShape,
    blank,
    check_tensors,
    hugging_face_json,
    match,
    mistral_json,
    open_checkpoint,
    place_of,
    read_config,
    some,
    stored_dtype,
    write_json,
)
from mixtral_lab.config import Config
from mixtral_lab.model import Transformer

__all__ = [
    "CheckpointError", "CorruptFile", "DeviceError", "DtypeError", "ExtraTensors", "MissingShards",
    "MissingTensors", "NotEnoughMemory", "PickleRefused", "Stored", "UnknownArchitecture", "WrongShape",
    "describe", "free_memory", "load_model", "memory_needed", "read_config", "resolve_device",
    "resolve_dtype", "save_model",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 1_500_000_000  # parameters; below it, "auto" takes float32 on a CPU
EXPERT = re.compile(r"layers\.(\d+)\.experts\.ffn\.(\d+)\.(\w+)\.weight")
# What `save_model` may have written, and may replace.
OURS = re.compile(
    r"(model|consolidated)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(generation_)?config\.json|params\.json"
)


def describe(path: str | Path) -> list[Stored]:
    """Every tensor of a checkpoint as it is stored, with our name for it. Reads headers only.

    Tensors that do not belong, and gaps, are not errors here. Raises what `read_config` raises, and
    `CorruptFile`, `MissingShards` or `PickleRefused` where the headers cannot be read.
    """
    source = open_checkpoint(Path(path))
    ours: dict[str, list[str]] = {}
    for name, place in match(source).places.items():
        ours.setdefault(place.tensor, []).append(name)
    return [stored._replace(ours=tuple(ours.get(stored.name, ()))) for stored in source.tensors.values()]


def load_model(path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Transformer:
    """The model in a Hugging Face folder, a folder in Mistral's layout, or a GGUF file; frozen, ready to run.

    `resolve_device` and `resolve_dtype` say what "auto" means. On the CPU and in the stored dtype, parameters
    are views of the mapped file, except quantised ones and those that a layout orders otherwise (query and
    key in Mistral's and in GGUF). Writing to them does not change the file; the file must not be changed
    beneath them. In any other case tensors are converted one by one, the experts of a layer side by side: at no time
    are there two copies of the model.

    Raises what `read_config` raises; `MissingTensors`, `ExtraTensors`, `WrongShape`, `MissingShards`,
    `CorruptFile` or `PickleRefused` for files that cannot be the model; `NotEnoughMemory`, `DeviceError`,
    `DtypeError`.
    """
    where = resolve_device(device)
    source = open_checkpoint(Path(path))
    config, found = source.config, match(source)
    check_tensors(source, found)
    numbers = resolve_dtype(dtype, stored_dtype(source), where, config)
    _check_memory(config, numbers, where)

    banks: dict[tuple[str, str], Tensor] = {}

    def read(ours: str, place: Place) -> Tensor:
        tensor = source.read(place.tensor, place.expert)
        if place.half is not None:
            tensor = tensor.chunk(2)[place.half]
        expert = EXPERT.fullmatch(ours)
        if expert is not None and (tensor.dtype != numbers or where.type != "cpu"):
            layer, number, role = expert.groups()
            together = banks.get((layer, role))
            if together is None:
                together = torch.empty(config.n_experts or 0, *tensor.shape, dtype=numbers, device=where)
                banks[layer, role] = together
            return together[int(number)].copy_(tensor)
        tensor = tensor.to(where, numbers)
        heads = _rotated_heads(ours, config) if found.layout.neighbours else None
        return tensor if heads is None else halves_from_neighbours(tensor, heads)

    state = {ours: read(ours, place) for ours, place in found.places.items()}
    found.model.load_state_dict(state, assign=True)
    return found.model.eval().requires_grad_(False)


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    layout: str = "huggingface",
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint for `transformers` ("huggingface"), or for mistral-inference and vLLM ("mistral").

    `dtype=None` keeps the model's. Weights go into files of at most `max_shard_bytes`; a tensor larger than
    that gets a file of its own. `bos`, `eos` and `pad` are token ids for config.json.

    Everything is written beside `folder` first and renamed at the end, so a failure leaves neither a folder
    nor changes in it. Raises `CheckpointError` if the folder already holds a checkpoint (`overwrite=True`
    replaces it, and touches no other file there), if the model is not what its config says, or if the disk
    refuses.
    """
    folder = Path(folder).absolute()
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    known_ids = {name: token for name, token in ids.items() if token is not None}
    if layout not in ("huggingface", "mistral"):
        raise CheckpointError(f"There is no layout {layout!r} to write: say 'huggingface' or 'mistral'.")
    if layout == "mistral" and known_ids:
        raise CheckpointError(f"Mistral's layout has no place for {', '.join(known_ids)}: leave them out.")
    old = _old_checkpoint(folder)
    if old and not overwrite:
        raise CheckpointError(f"{folder} already holds {some(old)}; take another, or say overwrite=True.")
    _check_model(model)
    own = model.embed.weight.dtype
    numbers = resolve_dtype(own if dtype is None else dtype, stored=own)
    home = next(parent for parent in folder.parents if parent.is_dir())
    partial = home / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir()
        if layout == "huggingface":
            _write_weights(model, HUGGING_FACE, numbers, partial, "model", max_shard_bytes)
            write_json(partial / "config.json", hugging_face_json(model.config, numbers) | ids)
            write_json(partial / "generation_config.json", {"_from_model_config": True} | known_ids)
        else:
            _write_weights(model, MISTRAL, numbers, partial, "consolidated", max_shard_bytes)
            write_json(partial / "params.json", mistral_json(model.config))
        _move(partial, folder, old)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


# --- Devices, dtypes, memory ----------------------------------------------------------------------


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" is the first CUDA device if there is one, else the CPU.

    Raises `DeviceError` if this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        found = torch.device("meta")
    if found.type == "meta":
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise DeviceError(f"There is no device {str(device)!r} here; there is {here} (or say 'auto').")
    return found


def resolve_dtype(
    dtype: str | torch.dtype = "auto",
    stored: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: Config | None = None,
) -> torch.dtype:
    """The dtype of that name: float32, bfloat16 or float16; "auto" chooses one.

    "auto" is bfloat16 on CUDA. Elsewhere it is float32 for a model under 1.5 billion parameters if that fits
    into the free memory (there a CPU is quickest and most exact), and the `stored` dtype for larger ones or
    where no `config` tells the size. Raises `DtypeError` for any other name.
    """
    if dtype == "auto":
        where = resolve_device(device)
        if where.type == "cuda":
            return torch.bfloat16
        if config is None or config.parameters >= SMALL:
            return stored
        free = free_memory(where)
        return torch.float32 if free is None or memory_needed(config, torch.float32) <= free else stored
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise DtypeError(f"There is no dtype {str(dtype)!r} here; there is {', '.join(DTYPES)} (or say 'auto').")
    return found


def memory_needed(config: Config, dtype: str | torch.dtype) -> int:
    """Bytes of a model's weights in that dtype, without caches or activations.

    Mixtral 8x7B: 46.7 billion parameters, 93.4 GB in bfloat16.
    """
    return config.parameters * resolve_dtype(dtype).itemsize


def free_memory(device: str | torch.device = "cpu") -> int | None:
    """Bytes that can still be taken on a device, or None where the system does not say."""
    where = resolve_device(device)
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0]
    if where.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all memory, the free part is not told
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _check_memory(config: Config, dtype: torch.dtype, device: torch.device) -> None:
    needed, free = memory_needed(config, dtype), free_memory(device)
    if free is not None and needed > free:
        halve = "dtype='bfloat16' (half of it), " if dtype == torch.float32 else ""
        raise NotEnoughMemory(
            f"The weights need {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, but "
            f"{free / 1e9:.1f} GB are free on {device}; take {halve}a smaller model or a machine with more."
        )


def _rotated_heads(ours: str, config: Config) -> int | None:
    """How many heads of the parameter are rotated; None if it is not rotated."""
    if ours.endswith("attention.query.weight"):
        return config.n_heads
    return config.n_kv_heads if ours.endswith("attention.key.weight") else None


def halves_from_neighbours(weight: Float[Tensor, "rows dim"], heads: int) -> Float[Tensor, "rows dim"]:
    """Reorder the rows of a query or key matrix from Mistral's files to our rotary pairs.

    Mistral turns neighbours together, (0, 1) and (2, 3); we turn (0, 2) and (1, 3), as Hugging Face does. So
    one head of rows 0, 1, 2, 3 becomes 0, 2, 1, 3. Attention does not notice: queries and keys move alike.
    """
    return rearrange(weight, "(head half two) dim -> (head two half) dim", head=heads, two=2)


def neighbours_from_halves(weight: Float[Tensor, "rows dim"], heads: int) -> Float[Tensor, "rows dim"]:
    """The way back of `halves_from_neighbours`."""
    return rearrange(weight, "(head two half) dim -> (head half two) dim", head=heads, two=2)


# --- Writing --------------------------------------------------------------------------------------


def _old_checkpoint(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder to write to.")
    return [file.name for file in folder.iterdir() if OURS.fullmatch(file.name)] if folder.is_dir() else []


def _check_model(model: Transformer) -> None:
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    promised = {name: tuple(tensor.shape) for name, tensor in blank(model.config).state_dict().items()}
    if odd := list(state.keys() ^ promised.keys()):
        raise CheckpointError(f"The model has not the parameters of its config: they differ in {some(odd)}.")
    for name, shape in promised.items():
        if state[name] != shape:
            raise WrongShape(f"{name} has shape {state[name]}, but the model's config promises {shape}.")


def _write_weights(
    model: Transformer, layout: Layout, dtype: torch.dtype, folder: Path, stem: str, max_shard_bytes: int
) -> None:
    """Write one file, or several and their index; only one file's worth of tensors is converted at a time."""
    state = model.state_dict()
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for ours, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(ours)
        room -= size

    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        tensors: dict[str, Tensor] = {}
        for ours in shard:
            tensor = state[ours].to("cpu", dtype)
            heads = _rotated_heads(ours, model.config) if layout.neighbours else None
            if heads is not None:
                tensor = neighbours_from_halves(tensor, heads)
            # safetensors refuses two names for one memory, as experts copied from one matrix may have
            shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())
            tensors[place_of(ours, layout).tensor] = tensor.clone() if shared else tensor.contiguous()
        save_file(tensors, folder / f"{stem}{part}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"{stem}{part}.safetensors")
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / f"{stem}.safetensors.index.json", content)


def _move(partial: Path, folder: Path, old: list[str]) -> None:
    """Put finished files in their place: in one step where the folder is new, else file by file."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
        return
    new = [file.name for file in partial.iterdir()]
    for name in new:
        (partial / name).replace(folder / name)
    for name in set(old) - set(new):
        (folder / name).unlink()
