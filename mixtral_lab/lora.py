"""Low-rank adapters: a small change beside each frozen matrix, in the files that `peft` reads and writes.

Fine-tuning with LoRA leaves a matrix `weight` as it is and learns two thin ones, `A` (`rank features_in`) and `B`
(`features_out rank`). What the model then computes with is `weight + scale * B @ A`, where `scale = alpha / rank`. `B` begins
as zeros, so the first step starts from the model as it was. A 256 x 256 matrix holds 65,536 numbers; its change of rank
8 holds 4,096. Source: Hu et al. 2021 (arXiv 2106.09685, section 4.1).

Two ways to use one. `attached` puts it beside the weights while it learns: `A` comes first, so that no matrix of full size
is made. `merge` adds it into the weights, after which the model is an ordinary one: `mixtral_lab.load` does this, so every
way to run, record, edit or compile a model sees the fine-tuned one without knowing of adapters.

An expert's `gate` and `up` share one `A`. In transformers 5 they are one matrix, and so its adapter has one `A` for both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixtral_lab.checkpoint import HUGGING_FACE_FUSED, CheckpointError, place_of, some, write_json
from mixtral_lab.config import Config
from mixtral_lab.model import Transformer
from mixtral_lab.offload import Offloaded

PARTS = ("attention", "experts", "router")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of peft that change what an adapter computes: any value but the one here is refused.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
    "lora_bias": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None,
}  # fmt: skip


class AdapterError(CheckpointError):
    """An adapter cannot be read or written, or does not fit the model; the message says why."""


@dataclass(frozen=True)
class LoRA:
    """Which matrices get a change, and how large it may be. Raises `AdapterError` for numbers or parts that cannot be."""

    rank: int = 8
    alpha: int = 16  # the change is scaled by alpha / rank: another rank then needs no other learning rate
    parts: tuple[str, ...] = ("attention", "experts")  # some of PARTS; of a dense model, "experts" is its feed-forward

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise AdapterError(
                f"An adapter can change {', '.join(PARTS)}, some or all of them, but it was asked for {some(unknown)}."
            )
        if self.rank < 1 or self.alpha < 1:
            raise AdapterError(f"rank is {self.rank} and alpha is {self.alpha}: both must be whole numbers above 0.")


class Factors(NamedTuple):
    """The change of one matrix: `scale * B @ A`."""

    A: Float[Tensor, "rank features_in"]
    B: Float[Tensor, "features_out rank"]


@dataclass(frozen=True)
class Adapter:
    """The change of every adapted matrix, under our name for it: `layers.3.attention.query`."""

    rank: int
    alpha: int
    factors: dict[str, Factors]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parts(self) -> tuple[str, ...]:
        """Which of PARTS it changes."""
        found = {part_of(name) for name in self.factors}
        return tuple(part for part in PARTS if part in found)

    @property
    def numbers(self) -> int:
        """How many numbers it holds: what is trained, and written."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every `A` and `B` by name. The `A` that an expert's gate and up share stands there once, as `gate_up.A`."""
        found: dict[str, Tensor] = {}
        for name, (a, b) in self.factors.items():
            found.setdefault(f"{_fused(name)}.A", a)
            found[f"{name}.B"] = b
        return found

    def change(self, name: str) -> Float[Tensor, "features_out features_in"]:
        """What is added to a matrix, in float32."""
        a, b = self.factors[name]
        return self.scale * (b.float() @ a.float())


def part_of(name: str) -> str:
    """The part of the model that a matrix belongs to: one of PARTS."""
    inner = name.split(".")[2]
    return "experts" if inner == "feed_forward" else inner


def targets(config: Config, parts: tuple[str, ...] = PARTS) -> dict[str, tuple[int, int]]:
    """The matrices of those parts, by our names, with their shapes `(features_out, features_in)`.

    Raises `AdapterError` if a dense model is asked for a router.
    """
    if "router" in parts and config.n_experts is None:
        raise AdapterError("The model is dense: it has no router to adapt. Leave the router out.")
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    found: dict[str, tuple[int, int]] = {}
    for layer in range(config.n_layers):
        at = f"layers.{layer}"
        if "attention" in parts:
            found |= {
                f"{at}.attention.query": (queries, config.dim),
                f"{at}.attention.key": (keys, config.dim),
                f"{at}.attention.value": (keys, config.dim),
                f"{at}.attention.output": (config.dim, queries),
            }
        if "router" in parts:
            found[f"{at}.router.score"] = (config.n_experts or 0, config.dim)
        if "experts" in parts:
            places = [f"{at}.feed_forward"]
            if config.n_experts is not None:
                places = [f"{at}.experts.ffn.{expert}" for expert in range(config.n_experts)]
            for place in places:
                found[f"{place}.gate"] = found[f"{place}.up"] = (config.hidden, config.dim)
                found[f"{place}.down"] = (config.dim, config.hidden)
    return found


def new_adapter(config: Config, settings: LoRA, seed: int = 0) -> Adapter:
    """An adapter that changes nothing yet: every `A` drawn from a normal distribution, every `B` zero.

    Source: Hu et al. 2021 (arXiv 2106.09685, section 4.1). The deviation is 1 / sqrt(features_in), so that `A x` is about as
    large as `x`. Raises `AdapterError` as `targets` does.
    """
    generator = torch.Generator().manual_seed(seed)
    shared: dict[str, Tensor] = {}
    factors = {}
    for name, (features_out, features_in) in targets(config, settings.parts).items():
        key = _fused(name)
        if key not in shared:
            shared[key] = torch.randn(settings.rank, features_in, generator=generator) / math.sqrt(features_in)
        factors[name] = Factors(shared[key], torch.zeros(features_out, settings.rank))
    return Adapter(settings.rank, settings.alpha, factors)


def _fused(name: str) -> str:
    """The name under which a matrix keeps its `A`: an expert's gate and up have one together."""
    return re.sub(r"(\.experts\.ffn\.\d+)\.(gate|up)$", r"\1.gate_up", name)


# --- Using one ------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen matrix with its change beside it: `base(x) + scale * (x @ A.T) @ B.T`."""

    def __init__(self, base: nn.Module, factors: Factors, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        device = next(base.parameters()).device
        self.A, self.B = (
            part if isinstance(part, nn.Parameter) else nn.Parameter(part.to(device), requires_grad=False)
            for part in factors
        )

    @property
    def weight(self) -> Float[Tensor, "features_out features_in"]:
        """Both together as one matrix, made anew each time: what code that reads weights must see."""
        weight: Any = self.base.weight
        return (weight.float() + self.scale * (self.B.float() @ self.A.float())).to(weight.dtype)

    def forward(self, x: Float[Tensor, "*rows features_in"]) -> Float[Tensor, "*rows features_out"]:
        change = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)
        return self.base(x) + (self.scale * change).to(x.dtype)


@contextmanager
def attached(model: Transformer, adapter: Adapter) -> Iterator[None]:
    """While open, the model computes with the adapter beside its weights; afterwards it is as it was, bit for bit.

    For training: gradients reach `A` and `B` where these ask for them, and the weights never change. Slower than `merge`, but
    as right: decoding, traces and edits inside see the adapted model. Raises `AdapterError` if the adapter does not fit.
    """
    _check_fit(model, adapter)
    banks = [(block.experts, block.experts.bank, block.experts._sought) for block in model.blocks if block.router]
    put: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for experts, _, _ in banks:  # a bank is a view of the bare weights
            experts.bank, experts._sought = None, True
        for name, factors in adapter.factors.items():
            owner, own = _owner(model, name)
            base = getattr(owner, own)
            setattr(owner, own, Adapted(base, factors, adapter.scale))
            put.append((owner, own, base))
        yield
    finally:
        for owner, own, base in put:
            setattr(owner, own, base)
        for experts, bank, sought in banks:
            experts.bank, experts._sought = bank, sought


@torch.no_grad()
def merge(model: Transformer, adapter: Adapter) -> None:
    """Add the adapter's change to the model's own weights, in place; each sum is rounded once, to the model's dtype.

    In float32 the merged model computes what the attached one does, to rounding. In bfloat16 a change smaller than about 0.4 % of
    a weight is rounded away, as everywhere. Raises `AdapterError` if the adapter does not fit the model, or if its
    experts are rounded to integers, offloaded, or shared by processes: then there is nothing to add to.
    """
    _check_fit(model, adapter)
    for name in adapter.factors:
        owner, own = _owner(model, name)
        weight: Any = getattr(owner, own).weight
        weight.copy_(weight.float() + adapter.change(name).to(weight.device))


def _owner(model: Transformer, name: str) -> tuple[nn.Module, str]:
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner), own


def _check_fit(model: Transformer, adapter: Adapter) -> None:
    parts = tuple(part for part in adapter.parts if part != "router" or model.config.n_experts is not None)
    shapes = targets(model.config, parts)
    if misplaced := [name for name in adapter.factors if name not in shapes]:
        raise AdapterError(f"The adapter changes {some(misplaced)}, which the model does not have.")
    moving = any(isinstance(module, Offloaded) for module in model.modules())
    for name, (a, b) in adapter.factors.items():
        if (b.shape[0], a.shape[1]) != shapes[name]:
            raise AdapterError(
                f"The adapter changes {name} as a matrix of {(b.shape[0], a.shape[1])}, but the model's is "
                f"{shapes[name]}: they do not belong together."
            )
        owner, own = _owner(model, name)
        matrix = getattr(owner, own)
        ordinary = isinstance(matrix, nn.Linear) and tuple(matrix.weight.shape) == shapes[name]
        if not ordinary or (moving and part_of(name) == "experts"):
            raise AdapterError(
                f"{name} is not kept as an ordinary matrix here (rounded, offloaded, elsewhere, or adapted already), so an adapter "
                "cannot change it: load the model plainly, or merge the adapter first (mixtral-lab merge) and open the result."
            )


# --- Files, in peft's layout ----------------------------------------------------------------------

PREFIX = "base_model.model."


class _Stack(NamedTuple):
    """Where peft keeps the experts of a layer: one `A` of `(expert rank)` rows, one `B` of `(rank expert)` columns."""

    roles: tuple[str, ...]  # of our matrices in it; B's rows are theirs, one after the other
    place: str
    parameter: str


# peft wraps the module `experts` once for each of its two parameters, the second around the first.
STACKS = (
    _Stack(("gate", "up"), "mlp.experts.base_layer", "mlp.experts.gate_up_proj"),
    _Stack(("down",), "mlp.experts", "mlp.experts.down_proj"),
)


def _peft_name(ours: str) -> str:
    """The name that peft has for a matrix that is not an expert's: `model.layers.3.self_attn.q_proj`."""
    return place_of(f"{ours}.weight", HUGGING_FACE_FUSED).tensor.removesuffix(".weight")


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter under peft's names and in its shapes."""
    found: dict[str, Tensor] = {}
    stacked: dict[tuple[str, _Stack], dict[int, dict[str, Factors]]] = {}
    for name, factors in adapter.factors.items():
        if ".experts.ffn." not in name:
            for half, tensor in zip("AB", factors, strict=True):
                found[f"{PREFIX}{_peft_name(name)}.lora_{half}.weight"] = tensor
            continue
        layer, expert, role = re.fullmatch(r"layers\.(\d+)\.experts\.ffn\.(\d+)\.(\w+)", name).groups()  # type: ignore[union-attr]
        stack = next(stack for stack in STACKS if role in stack.roles)
        stacked.setdefault((layer, stack), {}).setdefault(int(expert), {})[role] = factors
    for (layer, stack), by_expert in stacked.items():
        experts = [by_expert[expert] for expert in sorted(by_expert)]
        at = f"{PREFIX}model.layers.{layer}.{stack.place}"
        a = torch.stack([roles[stack.roles[0]].A for roles in experts])
        b = torch.stack([torch.cat([roles[role].B for role in stack.roles]) for roles in experts])
        found[f"{at}.lora_A.weight"] = rearrange(a, "expert rank features_in -> (expert rank) features_in")
        found[f"{at}.lora_B.weight"] = rearrange(b, "expert features_out rank -> features_out (rank expert)")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def peft_config(adapter: Adapter, base: str) -> dict[str, Any]:
    """What `adapter_config.json` says of it; `base` is the model that it changes."""
    single = {_peft_name(name).rpartition(".")[2] for name in adapter.factors if ".experts.ffn." not in name}
    router = "router" in adapter.parts
    stacks = [stack.parameter for stack in STACKS if any(".experts.ffn." in name for name in adapter.factors)]
    return PLAIN | {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(single - {"gate"}),  # the router is no nn.Linear in transformers 5
        "target_parameters": stacks + (["mlp.gate.weight"] if router else []) or None,
    }


def save_adapter(adapter: Adapter, folder: str | Path, base: str) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `peft.PeftModel.from_pretrained(model, folder)` reads them.

    An adapter that lies there is replaced, each file in one step. Raises `AdapterError` if the disk refuses.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(peft_tensors(adapter), folder / f"{WEIGHTS}.partial", metadata={"format": "pt"})
        write_json(folder / f"{CONFIG}.partial", peft_config(adapter, base))
        for name in (WEIGHTS, CONFIG):
            (folder / f"{name}.partial").replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"The adapter could not be written to {folder}: {error}.") from error
    return folder


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").exists()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """`adapter_config.json`, checked. Raises `AdapterError` if it is not of an adapter that this package can apply."""
    file = Path(folder) / CONFIG
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError:
        raise AdapterError(f"{folder} holds no adapter: looked for {CONFIG}.") from None
    except ValueError as error:
        raise AdapterError(f"{file} is damaged, cut short, or not JSON at all: {error}.") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{file} holds a {type(found).__name__}, but it should hold names and values.")
    for name, plain in PLAIN.items():
        value = found.get(name, plain)
        if value != plain and not (not value and not plain):  # null, false and {} all say: not used
            raise AdapterError(f"{file} says {name} = {value!r}; this package applies plain LoRA, with {plain!r}.")
    for name in ("r", "lora_alpha"):
        if isinstance(found.get(name), bool) or not isinstance(found.get(name), int) or found[name] < 1:
            raise AdapterError(f"{file} says {name} = {found.get(name)!r}, but it must be a whole number above 0.")
    return found


def base_of(folder: str | Path) -> str:
    """The model that an adapter changes, as its config names it. Raises `AdapterError` if it names none."""
    base = read_settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterError(
            f"{Path(folder) / CONFIG} does not name the model that it changes: open it with load(MODEL, adapter={str(folder)!r})."
        )
    return base


def load_adapter(folder: str | Path, config: Config) -> Adapter:
    """The adapter in a folder of peft's layout, for a model of that shape; made here or by peft itself.

    Raises `AdapterError` if the files are missing, damaged, of another kind of adapter, or for a model of another shape.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    rank, alpha = settings["r"], settings["lora_alpha"]
    stored = _read(folder / WEIGHTS)
    parts = PARTS if config.n_experts is not None else ("attention", "experts")
    factors: dict[str, Factors] = {}
    for name, shape in targets(config, parts).items():
        if ".experts.ffn." not in name:
            at = f"{PREFIX}{_peft_name(name)}"
            if pair := _pair(stored, at, (rank, shape[1]), (shape[0], rank)):
                factors[name] = pair
    for layer in range(config.n_layers if config.n_experts is not None else 0):
        for stack in STACKS:
            factors |= _unstack(stored, config, layer, stack, rank)
    if stored:
        raise AdapterError(
            f"{folder / WEIGHTS} holds {some(list(stored))}, for which a model of this shape has no place: "
            "they do not belong together."
        )
    if not factors:
        raise AdapterError(f"{folder / WEIGHTS} holds no matrix of an adapter.")
    in_order = {name: factors[name] for name in targets(config, parts) if name in factors}
    return Adapter(rank, alpha, in_order)


def _unstack(stored: dict[str, Tensor], config: Config, layer: int, stack: _Stack, rank: int) -> dict[str, Factors]:
    n_experts = config.n_experts or 0
    shapes = [targets(config, ("experts",))[f"layers.{layer}.experts.ffn.0.{role}"] for role in stack.roles]
    features_out, features_in = sum(shape[0] for shape in shapes), shapes[0][1]
    at = f"{PREFIX}model.layers.{layer}.{stack.place}"
    pair = _pair(stored, at, (n_experts * rank, features_in), (features_out, rank * n_experts))
    if pair is None:
        return {}
    a = rearrange(pair.A, "(expert rank) features_in -> expert rank features_in", rank=rank)
    b = rearrange(pair.B, "features_out (rank expert) -> expert features_out rank", rank=rank)
    found = {}
    for expert in range(n_experts):
        rows = b[expert].split([shape[0] for shape in shapes])
        for role, own in zip(stack.roles, rows, strict=True):
            found[f"layers.{layer}.experts.ffn.{expert}.{role}"] = Factors(a[expert], own.contiguous())
    return found


def _pair(stored: dict[str, Tensor], at: str, a: tuple[int, int], b: tuple[int, int]) -> Factors | None:
    """Take one matrix's two halves out of what was stored; None if neither is there."""
    names = {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
    there = [name for name in names if name in stored]
    if not there:
        return None
    if len(there) == 1:
        raise AdapterError(f"The adapter holds {there[0]} without its other half.")
    for name, shape in names.items():
        if tuple(stored[name].shape) != shape:
            raise AdapterError(
                f"{name} has shape {tuple(stored[name].shape)}, but this model and the adapter's rank ask for {shape}: "
                "they do not belong together."
            )
    return Factors(*(stored.pop(name) for name in names))


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise AdapterError(f"{file.parent} holds no {file.name}: an adapter is that file and {CONFIG}.")
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} is damaged, cut short, or not a safetensors file: {error}.") from None


def with_tensors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Adapter:
    """The same adapter with other numbers, by the names of `Adapter.tensors`."""
    factors = {name: Factors(tensors[f"{_fused(name)}.A"], tensors[f"{name}.B"]) for name in adapter.factors}
    return Adapter(adapter.rank, adapter.alpha, factors)
