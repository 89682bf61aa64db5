"""This package beside transformers: the same weights, files and prompts, in one process, in random order.

For each shape a checkpoint is written once, and both sides load it. Before anything is timed their logits must
agree. Then every repeat draws a new prompt and runs all contenders on it in turn, so that whatever the machine
does in that minute befalls them all; what counts is the ratio within a repeat. Loading is timed in a fresh process each
time, with the files in the page cache.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from mixtral_lab import bundled
from mixtral_lab.config import PRESETS, Config, LabError
from mixtral_lab.generate import generate_ids, prefill
from mixtral_lab.model import Transformer
from mixtral_lab.weights import free_memory, load_model, resolve_device, resolve_dtype, save_model

PROMPT, WRITTEN = 512, 64  # tokens read (prefill), and tokens then written (decode)
OURS, THEIRS = "mixtral_lab", "transformers"
ATTENTION = ("sdpa", "eager")  # variants of transformers: the first is timed, the second only has its logits compared
EXPERTS = ("eager", "batched_mm", "grouped_mm")
LARGEST = 1e-4  # how far float32 logits may differ
TYPICAL = 0.1  # in half precision near ties may be routed otherwise: there the median position is held to this
CHECKED, CHECKED_DECODE = 24, 8  # tokens that the check reads at once, and then one by one
FIRST = 32  # tokens read for the first logits after loading


class BenchError(LabError):
    """Nothing can be compared: transformers is missing, or the two sides do not compute the same."""


@dataclass(frozen=True)
class Shape:
    """What is compared: a config, with the weights of a checkpoint or (None) random ones."""

    name: str
    config: Config
    checkpoint: Path | None = None

    @property
    def weights(self) -> str:
        return "random weights" if self.checkpoint is None else f"weights of {self.checkpoint}"


RANDOM_075B = Shape(  # 748 million parameters, 264 million of them active
    "random-0.75b",
    Config(
        dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, head_dim=64, hidden=2208, vocab=32000, context=4096,
        n_experts=8, n_choices=2, rope_theta=1e6,
    ),
)  # fmt: skip


def usual_shapes() -> list[Shape]:
    """mini-mixtral (its trained weights if they are in the box) and a random Mixtral of 0.75 billion parameters."""
    try:
        checkpoint = bundled.folder("mini-mixtral")
    except LabError:
        checkpoint = None
    return [Shape("mini-mixtral", PRESETS["mini-mixtral"].config, checkpoint), RANDOM_075B]


# --- What was found ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """How far the logits of a transformers variant are from ours, before anything was timed."""

    shape: str
    contender: str
    largest: float  # over all positions
    typical: float  # the median position's largest difference


@dataclass(frozen=True)
class Measurement:
    """One quantity of one contender, in seconds or bytes; one value per repeat."""

    shape: str
    what: str
    contender: str
    unit: str  # "s" or "B"
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Comparison:
    """Ours beside the transformers variant with the lowest median: theirs / ours in each repeat. Above 1, we win."""

    shape: str
    what: str
    best: str
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Report:
    """Everything one run found. `machine` says where and with what; `notes` what a reader should know besides."""

    machine: dict[str, str]
    notes: tuple[str, ...]
    parity: tuple[Parity, ...]
    measurements: tuple[Measurement, ...]

    def comparisons(self) -> list[Comparison]:
        """For each shape and quantity, ours beside the best of theirs."""
        found = []
        for shape, what in dict.fromkeys((one.shape, one.what) for one in self.measurements):
            ours, *theirs = self._rows(shape, what)
            if theirs and ours.contender == OURS:
                found.append(Comparison(shape, what, theirs[0].contender, _ratios(theirs[0], ours)))
        return found

    def _rows(self, shape: str, what: str) -> list[Measurement]:
        """Ours first, then theirs, best first."""
        rows = [one for one in self.measurements if (one.shape, one.what) == (shape, what)]
        return sorted(rows, key=lambda one: (one.contender != OURS, one.median))

    def to_json(self) -> str:
        """All raw values, and the comparisons that follow from them."""
        comparisons = [asdict(one) | {"median": one.median} for one in self.comparisons()]
        return json.dumps(asdict(self) | {"comparisons": comparisons}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        return cls(
            machine=raw["machine"],
            notes=tuple(raw["notes"]),
            parity=tuple(Parity(**one) for one in raw["parity"]),
            measurements=tuple(Measurement(**one | {"values": tuple(one["values"])}) for one in raw["measurements"]),
        )

    def table(self) -> Group:
        """The same for people: rich tables of the machine and of each shape, to print on a rich console."""
        head = Table(box=None, show_header=False, pad_edge=False)
        for name, value in self.machine.items():
            head.add_row(name, value, style="dim")
        return Group(
            head,
            *(self._shape_table(shape) for shape in dict.fromkeys(p.shape for p in self.parity)),
            *self.notes,
        )

    def _shape_table(self, shape: str) -> Table:
        largest = max(parity.largest for parity in self.parity if parity.shape == shape)
        table = Table(
            title=f"{shape}: median of the repeats (lowest to highest)",
            caption=f"Logits agree before timing: the largest difference is {largest:.1e}.",
            box=box.SIMPLE_HEAD,
        )
        for name in ("", "contender", "median", "spread", "ours is better by"):
            table.add_column(name, justify="left" if name in ("", "contender") else "right")
        for what in dict.fromkeys(one.what for one in self.measurements if one.shape == shape):
            ours, *theirs = self._rows(shape, what)
            for row in (ours, *theirs):
                ratios = _ratios(row, ours)
                better = (
                    "" if row is ours else f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
                )
                table.add_row(
                    what if row is ours else "",
                    row.contender,
                    _written(row.median, row.unit),
                    f"{_written(min(row.values), row.unit)} to {_written(max(row.values), row.unit)}",
                    better,
                    style="bold" if row is ours or row is theirs[0] else "dim",
                    end_section=row is (ours, *theirs)[-1],
                )
        return table


def _ratios(theirs: Measurement, ours: Measurement) -> tuple[float, ...]:
    return tuple(b / max(a, 1e-9) for a, b in zip(ours.values, theirs.values, strict=True))


def _written(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"


# --- Who runs ------------------------------------------------------------------------------------------------

Work = Callable[[], object]  # what is timed


@runtime_checkable
class Contender(Protocol):
    """One side. `prefill` and `decode` prepare, untimed, and return what is to be timed."""

    name: str

    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        """The logits of every position: the first `at_once` tokens are read together, the others one by one."""

    def prefill(self, ids: Int[Tensor, "1 seq"]) -> Work:
        """Read a prompt; the work ends with the logits of its last token."""

    def decode(self, ids: Int[Tensor, "1 seq"], n: int) -> Work:
        """Read a prompt, untimed, and take its next token; the work feeds `n` tokens, each chosen from the last logits."""


class Ours:
    """This package, by the functions that everything else here generates with."""

    name = OURS

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        cache = self.model.new_cache(*ids.shape)
        parts = [ids[:, :at_once], *ids[:, at_once:].split(1, dim=1)]
        return torch.cat([self.model(part, cache) for part in parts], dim=1)

    def prefill(self, ids: Int[Tensor, "1 seq"]) -> Work:
        return lambda: prefill(self.model, ids, self.model.new_cache(*ids.shape))

    def decode(self, ids: Int[Tensor, "1 seq"], n: int) -> Work:
        steps = generate_ids(self.model, ids.tolist(), n + 1)
        next(steps)
        return lambda: list(steps)


class Theirs:
    """transformers in one of its variants. All variants share one model: its implementations are switched.

    `by_generate` decodes by `model.generate`, else by its `forward` in a plain greedy loop.
    """

    def __init__(self, model: nn.Module, attention: str, experts: str, by_generate: bool = False) -> None:
        self.model: Any = model
        self.attention, self.experts, self.by_generate = attention, experts, by_generate
        self.name = f"{THEIRS}: {attention} attention, {experts} experts" + (", generate" if by_generate else "")

    def copied(self, tokens: int) -> int:
        """Bytes of weights that this variant copies to read so many tokens at once."""
        config = self.model.config
        each = 3 * config.hidden_size * config.intermediate_size * self.model.dtype.itemsize
        return tokens * config.num_experts_per_tok * each if self.experts == "batched_mm" else 0

    @torch.inference_mode()
    def logits(self, ids: Int[Tensor, "batch seq"], at_once: int) -> Float[Tensor, "batch seq vocab"]:
        self._switch(self.attention, self.experts)
        cache = self._new_cache()
        parts = [ids[:, :at_once], *ids[:, at_once:].split(1, dim=1)]
        return torch.cat([self.model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)

    def prefill(self, ids: Int[Tensor, "1 seq"]) -> Work:
        self._switch(self.attention, self.experts)
        return lambda: self._next(ids, self._new_cache())

    def decode(self, ids: Int[Tensor, "1 seq"], n: int) -> Work:
        self._switch("sdpa", "grouped_mm")
        cache = self._new_cache()
        token = self._next(ids, cache)
        self._switch(self.attention, self.experts)
        if self.by_generate:
            so_far = torch.cat((ids, token), dim=1)
            return lambda: self._generate(so_far, cache, n)
        return lambda: self._loop(token, cache, n)

    @torch.inference_mode()
    def _next(self, ids: Tensor, cache: Any) -> Tensor:
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def _loop(self, token: Tensor, cache: Any, n: int) -> None:
        for _ in range(n):
            token = self._next(token, cache)

    @torch.inference_mode()
    def _generate(self, ids: Tensor, cache: Any, n: int) -> None:
        # eos_token_id=-1: no token ends the text
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=n, do_sample=False,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        if out.shape[1] != ids.shape[1] + n:
            raise BenchError(f"transformers wrote {out.shape[1] - ids.shape[1]} tokens instead of {n}.")

    def _switch(self, attention: str, experts: str) -> None:
        self.model.set_attn_implementation(attention)
        self.model.set_experts_implementation(experts)

    def _new_cache(self) -> Any:
        return _transformers().DynamicCache(config=self.model.config)


def _transformers() -> ModuleType:
    """transformers, quiet."""
    try:
        import transformers
    except ImportError:
        raise BenchError("The comparison needs transformers: pip install 'mixtral-lab[bench]'.") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _load_theirs(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = _transformers().MixtralForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


# --- The run -------------------------------------------------------------------------------------------------


def run(
    shapes: Sequence[Shape] | None = None,
    dtype: str = "float32",
    device: str = "auto",
    repeats: int = 5,
    prompt: int = PROMPT,
    written: int = WRITTEN,
) -> Report:
    """Compare on every shape (`usual_shapes` if none are given): prefill, decode, loading and memory.

    Shows its progress on stderr. Raises `BenchError` if the two sides' logits do not agree: then nothing is timed.
    """
    where, numbers = resolve_device(device), resolve_dtype(dtype)
    notes: list[str] = []
    parity: list[Parity] = []
    measurements: list[Measurement] = []
    chosen = usual_shapes() if shapes is None else shapes
    timed = (1 + len(EXPERTS)) + (1 + 2 * len(EXPERTS))  # prefill, decode
    rounds = len(ATTENTION) * len(EXPERTS) + timed * (repeats + 1) + 2 * repeats
    with tqdm(total=len(chosen) * rounds, disable=None, leave=False) as bar:
        for number, shape in enumerate(chosen, start=1):
            with tempfile.TemporaryDirectory(prefix="mixtral-lab-bench-") as home:
                bar.set_description(f"{shape.name}: writing the checkpoint")
                folder = _write_checkpoint(shape, numbers, Path(home) / "checkpoint")
                size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                millions = shape.config.parameters / 1e6
                notes.append(
                    f"{shape.name}: {shape.weights}, {millions:,.0f} M parameters, {size / 1e6:,.0f} MB on disk."
                )

                bench = _Bench(shape, where, numbers, repeats, bar)
                ours = Ours(load_model(folder, where, numbers))
                model = _load_theirs(folder, where, numbers)
                parity += bench.check(ours, [Theirs(model, *variant) for variant in product(ATTENTION, EXPERTS)])
                theirs = [Theirs(model, ATTENTION[0], experts) for experts in EXPERTS]
                writers = [*theirs, *(Theirs(model, ATTENTION[0], experts, by_generate=True) for experts in EXPERTS)]
                possible = [one for one in theirs if one.copied(prompt) < (free_memory(where) or sys.maxsize) / 4]
                notes += [
                    f"{shape.name}: left out of prefill: {one.name}, which would copy {one.copied(prompt) / 1e9:.1f} GB "
                    "of weights."
                    for one in theirs
                    if one not in possible
                ]
                measurements += bench.time(
                    f"prefill {prompt} tokens", [ours, *possible], prompt, lambda side, ids: side.prefill(ids)
                )
                measurements += bench.time(
                    f"decode {written} tokens",
                    [ours, *writers],
                    prompt,
                    lambda side, ids: side.decode(ids, written),
                )
                del ours, model, theirs, writers, possible
                gc.collect()
                measurements += bench.load(folder)
                bar.update(number * rounds - bar.n)
    return Report(_machine(where, numbers, repeats), tuple(notes), tuple(parity), tuple(measurements))


class _Bench:
    """One shape's measurements."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int, bar: tqdm) -> None:
        self.shape, self.device, self.dtype, self.repeats, self.bar = shape, device, dtype, repeats, bar

    def check(self, ours: Contender, theirs: Sequence[Contender]) -> list[Parity]:
        """Compare the logits of all with ours. Raises `BenchError` where they differ."""
        self.bar.set_description(f"{self.shape.name}: comparing logits")
        ids = self._prompt(CHECKED + CHECKED_DECODE)
        expected = ours.logits(ids, CHECKED).float()
        found = []
        for contender in theirs:
            apart = (contender.logits(ids, CHECKED).float() - expected).abs().amax(-1)
            parity = Parity(self.shape.name, contender.name, apart.max().item(), apart.median().item())
            exact = self.dtype == torch.float32
            far, limit = (parity.largest, LARGEST) if exact else (parity.typical, TYPICAL)
            if not far <= limit:
                raise BenchError(
                    f"{self.shape.name}: our logits and those of {contender.name} are {far:.2g} apart, more than {limit:g}. "
                    "Two models that compute different things cannot be compared, so nothing was timed."
                )
            found.append(parity)
            self.bar.update()
        return found

    def time(
        self, what: str, sides: Sequence[Contender], prompt: int, prepare: Callable[[Contender, Tensor], Work]
    ) -> list[Measurement]:
        """Seconds of each side's work, on a new prompt and in a new order each repeat, after one round to warm up."""
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for repeat in range(self.repeats + 1):
            ids = self._prompt(prompt)
            for side in random.sample(sides, len(sides)):
                self.bar.set_description(f"{self.shape.name}: {what}")
                work = prepare(side, ids)
                self._synchronize()
                start = time.perf_counter()
                work()
                self._synchronize()
                if repeat:
                    seconds[side.name].append(time.perf_counter() - start)
                self.bar.update()
        return [Measurement(self.shape.name, what, name, "s", tuple(values)) for name, values in seconds.items()]

    def load(self, folder: Path) -> list[Measurement]:
        """Loading, each time in a fresh process: seconds, and memory beyond what the process had before."""
        values: dict[tuple[str, str], list[float]] = {}
        for _ in range(self.repeats):
            for who in random.sample((OURS, THEIRS), 2):
                self.bar.set_description(f"{self.shape.name}: loading")
                for what, value in _load_in_new_process(who, folder, self.device, self.dtype).items():
                    values.setdefault((what, who), []).append(value)
                self.bar.update()
        return [
            Measurement(self.shape.name, what, who, "B" if "memory" in what else "s", tuple(found))
            for (what, who), found in values.items()
        ]

    def _prompt(self, seq: int) -> Int[Tensor, "1 seq"]:
        return torch.randint(self.shape.config.vocab, (1, seq), device=self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _write_checkpoint(shape: Shape, dtype: torch.dtype, folder: Path) -> Path:
    if shape.checkpoint is not None:
        return save_model(load_model(shape.checkpoint, "cpu", dtype), folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(shape.config).requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return save_model(model, folder, dtype=dtype)


def _machine(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, str]:
    import psutil

    on_gpu = device.type == "cuda"
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, of which PyTorch uses {torch.get_num_threads()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if on_gpu else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": str(repeats),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _transformers().__version__,
        "mixtral-lab": version("mixtral-lab"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- One load, in a process of its own -----------------------------------------------------------------------


def _load_in_new_process(who: str, folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    command = [sys.executable, "-m", "mixtral_lab.bench", who, str(folder), str(device)]
    numbers = str(dtype).removeprefix("torch.")
    answer = subprocess.run([*command, numbers], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise BenchError(f"{who} could not load {folder}: {answer.stderr.strip()[-500:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def load_one(who: str, folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Load once and read a few tokens. Imports, and on CUDA its start-up, are over before the clock starts.

    Private memory is what this process holds at the end and no file backs: copies. Peak memory also counts the pages of
    mapped files that were touched, which the system takes back when it needs them. Both are beyond what the process
    held before. On CUDA both are what PyTorch allocated there. (Systems other than Linux do not tell pages
    apart so finely: there private memory includes mapped pages, and the peak is that at the end.)
    """
    if who == THEIRS:
        _transformers().MixtralForCausalLM  # noqa: B018 (transformers imports a model when it is first named)
    torch.ones(1, device=device)
    ids = torch.arange(1, FIRST + 1, device=device)[None]
    memory = _Memory(device)
    start = time.perf_counter()
    if who == OURS:
        side: Contender = Ours(load_model(folder, device, dtype))
    else:
        side = Theirs(_load_theirs(folder, device, dtype), "sdpa", "grouped_mm")
    loaded = time.perf_counter()
    logits = side.prefill(ids)()
    if isinstance(logits, Tensor):
        logits.flatten()[0].item()  # waits for the device
    ready = time.perf_counter()
    return {"load": loaded - start, "load to first logits": ready - start} | memory.grown()


class _Memory:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self._now()

    def grown(self) -> dict[str, float]:
        return {what: float(max(0, now - self.before[what])) for what, now in self._now(peak=True).items()}

    def _now(self, peak: bool = False) -> dict[str, int]:
        import psutil

        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
            return {
                "private memory": torch.cuda.memory_allocated(self.device),
                "peak memory": held(self.device),
            }
        memory = psutil.Process().memory_full_info()
        if sys.platform != "linux":
            return {"private memory": memory.uss, "peak memory": memory.rss}
        return {
            "private memory": _kilobytes("smaps_rollup", "Anonymous") * 1024,
            "peak memory": _kilobytes("status", "VmHWM") * 1024 if peak else memory.rss,
        }


def _kilobytes(file: str, field: str) -> int:
    """One line of what Linux tells about this process, such as `VmHWM:  104 kB`, the most memory it ever held."""
    lines = Path("/proc/self", file).read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    _who, _folder, _device, _dtype = sys.argv[1:]
    print(json.dumps(load_one(_who, Path(_folder), torch.device(_device), resolve_dtype(_dtype))))
