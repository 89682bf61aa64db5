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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

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
from mixtral_lab.model.moe import SwiGLU
from mixtral_lab.model.quantized import KINDS, QuantizedLinear
from mixtral_lab.offload import OffloadError, Read, offload, parts
from mixtral_lab.parallel import owned, share_experts

__all__ = [
    "CheckpointError", "CorruptFile", "DeviceError", "DtypeError", "ExtraTensors", "MissingShards",
    "MissingTensors", "NotEnoughMemory", "OffloadError", "PickleRefused", "Stored", "UnknownArchitecture", "WrongShape",
    "describe", "free_memory", "load_model", "memory_needed", "read_config", "resolve_device",
    "resolve_dtype", "save_model",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 1_500_000_000  # parameters; below it, "auto" takes float32 on a CPU
FEED_FORWARD = re.compile(r"\.(feed_forward|experts)\.")
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


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    experts: str = "memory",
    resident: int | None = None,
    quantize: str | None = None,
    share: tuple[int, int] | None = None,
) -> Transformer:
    """The model in a Hugging Face folder, a folder in Mistral's layout, or a GGUF file; frozen, ready to run.

    `resolve_device` and `resolve_dtype` say what "auto" means. On the CPU and in the stored dtype, parameters
    are views of the mapped file, except quantised ones and those that a layout orders otherwise (query and
    key in Mistral's and in GGUF). Writing to them does not change the file; the file must not be changed
    beneath them. In any other case tensors are converted one by one, the experts of a layer side by side: at no time
    are there two copies of the model.

    `experts="offload"` leaves the experts in the files and keeps `resident` of each layer in memory (`offload.py`; a prompt
    needs all experts of one layer at a time besides). `quantize` ("int8" or "int4") rounds the experts' matrices, or those of a
    dense model's feed-forward (`model/quantized.py`); together, the rounded experts wait in the host's memory. `share=(rank,
    size)` reads only this process's part of every layer's experts; the other processes have the others (`parallel.py`).

    Raises what `read_config` raises; `MissingTensors`, `ExtraTensors`, `WrongShape`, `MissingShards`,
    `CorruptFile` or `PickleRefused` for files that cannot be the model; `NotEnoughMemory`, `DeviceError`,
    `DtypeError`, `OffloadError` for experts that cannot be kept so.
    """
    away = _check_keeping(experts, resident, quantize, share)
    where = resolve_device(device)
    source = open_checkpoint(Path(path))
    config, found = source.config, match(source)
    check_tensors(source, found)
    numbers = resolve_dtype(dtype, stored_dtype(source), where, config)
    held = range(config.n_experts or 1) if share is None else owned(config.n_experts, *share)
    _check_memory(config, numbers, where, away or len(held), quantize)

    banks: dict[tuple[str, str], Tensor] = {}

    def stored(ours: str) -> Tensor:
        place = found.places[ours]
        tensor = source.read(place.tensor, place.expert)
        return tensor if place.half is None else tensor.chunk(2)[place.half]

    def read(ours: str) -> Tensor:
        expert = EXPERT.fullmatch(ours)
        if expert is not None and int(expert[2]) not in held:
            return found.model.state_dict()[ours]  # not to be there at all
        if (away or quantize) and FEED_FORWARD.search(ours):
            made_anew = source.path.suffix == ".gguf" and source.tensors[found.places[ours].tensor].dtype not in (
                "F32",
                "F16",
            )
            return found.model.state_dict()[ours] if made_anew else stored(ours)  # not yet there, or a view of the file
        tensor = stored(ours)
        if expert is not None and (tensor.dtype != numbers or where.type != "cpu"):
            layer, number, role = expert.groups()
            together = banks.get((layer, role))
            if together is None:
                together = torch.empty(len(held), *tensor.shape, dtype=numbers, device=where)
                banks[layer, role] = together
            return together[int(number) - held.start].copy_(tensor)
        tensor = tensor.to(where, numbers)
        heads = _rotated_heads(ours, config) if found.layout.neighbours else None
        return tensor if heads is None else halves_from_neighbours(tensor, heads)

    found.model.load_state_dict({ours: read(ours) for ours in found.places}, assign=True)
    model = found.model.eval().requires_grad_(False)
    if quantize:
        kept = torch.device("cpu") if away else where
        for name, part in list(model.named_modules()):
            if isinstance(part, SwiGLU):
                for role in ("gate", "up", "down"):
                    weight = stored(f"{name}.{role}.weight").to(kept, numbers)
                    setattr(part, role, _rounded(weight, quantize, f"{name}.{role}"))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # an expert of another process, or one that is unpacked when asked for
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(torch.empty(0), requires_grad=False))
    if away:
        offload(model, partial(_home, model, stored if not quantize else None), away, where, numbers)
    if share is not None:
        share_experts(model, *share)
    return model


def _check_keeping(experts: str, resident: int | None, quantize: str | None, share: tuple[int, int] | None) -> int:
    """How many experts of each layer stay in memory while the others are away; 0 if none is."""
    if experts not in ("memory", "offload"):
        raise OffloadError(f'Experts can be kept in "memory" or by "offload", not {experts!r}.')
    if (experts == "offload") != (resident is not None):
        raise OffloadError(
            'experts="offload" and resident=N, the experts of each layer that stay in memory, go together.'
        )
    if quantize not in (None, *KINDS):
        raise OffloadError(f"Weights can be rounded to {' or '.join(KINDS)}, not {quantize!r}.")
    if share is not None and (resident or quantize):
        raise OffloadError("Experts shared by processes are kept in memory as they are: leave out the other ways.")
    return resident or 0


def _rounded(weight: Tensor, kind: str, name: str) -> QuantizedLinear:
    try:
        return QuantizedLinear(weight, kind)
    except ValueError as error:
        raise OffloadError(f"{name} cannot be rounded: {error}") from None


def _home(model: Transformer, stored: Callable[[str], Tensor] | None, layer: int, expert: int) -> Read:
    """How to read an expert's weights where they are stored; without `stored`, they are what the module has now."""
    if stored is None:
        kept = [part.data for part in parts(model.blocks[layer].experts.ffn[expert])]
        return lambda: kept
    names = [f"layers.{layer}.experts.ffn.{expert}.{role}.weight" for role in ("gate", "up", "down")]
    return lambda: [stored(name) for name in names]


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


def _check_memory(config: Config, dtype: torch.dtype, device: torch.device, held: int, quantize: str | None) -> None:
    """`held` experts of each layer must fit, rounded if asked."""
    total, free = config.n_experts or 1, free_memory(device)
    one = config.expert_parameters * config.n_layers
    size = {None: dtype.itemsize, "int8": 1.0, "int4": 0.53}[quantize]
    needed = memory_needed(config, dtype) - total * one * dtype.itemsize + round(held * one * size)
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
    if not all(tensor.numel() for tensor in model.state_dict().values()):
        raise CheckpointError("Some of the model's experts are offloaded or elsewhere: load it whole to write it.")
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
