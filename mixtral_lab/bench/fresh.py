"""What must be measured in a process of its own: loading, and memory. `python -m mixtral_lab.bench` runs one such job."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixtral_lab.bench.report import OURS, BenchError
from mixtral_lab.bench.sides import Ours, Reader, Theirs, load_theirs, transformers
from mixtral_lab.machine import synchronize
from mixtral_lab.sites import recording
from mixtral_lab.weights import load_model, resolve_dtype

FIRST = 32  # tokens read for the first logits after loading


def in_new_process(job: str, **what: Any) -> dict[str, Any]:
    """Run one of `JOBS` in a fresh process and return what it found; `what` must be plain enough for JSON.

    Raises `BenchError` with the last words of a process that fails.
    """
    command = [sys.executable, "-m", "mixtral_lab.bench", json.dumps({"job": job, **what})]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise BenchError(f"{job} failed in its own process ({what}): {answer.stderr.strip()[-500:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def in_this_process(job: str, **what: Any) -> dict[str, Any]:
    """Run one of `JOBS` here. Raises `BenchError` for a job that does not exist."""
    if job not in JOBS:
        raise BenchError(f"There is no job {job!r}: there are {', '.join(JOBS)}.")
    return JOBS[job](**what)


def load(side: dict[str, Any], folder: str, device: str, dtype: str) -> dict[str, float]:
    """Load once and read a few tokens. Imports, and on CUDA its start-up, are over before the clock starts.

    Private memory is what this process holds at the end and no file backs: copies. Peak memory also counts the pages of
    mapped files that were touched, which the system takes back when it needs them. Both are beyond what the process
    held before. On CUDA both are what PyTorch allocated there. (Systems other than Linux do not tell pages
    apart so finely: there private memory includes mapped pages, and the peak is that at the end.)
    """
    where = torch.device(device)
    if side["who"] != OURS:
        transformers().MixtralForCausalLM  # noqa: B018 (transformers imports a model when it is first named)
    torch.ones(1, device=where)
    ids = torch.arange(1, FIRST + 1, device=where)[None]
    memory = Memory(where)
    private = memory.private()
    start = time.perf_counter()
    reader = open_side(side, folder, device, dtype)
    loaded = time.perf_counter()
    reader.prefill(ids)()
    synchronize(where)
    ready = time.perf_counter()
    return {
        "load": loaded - start,
        "load to first logits": ready - start,
        "private memory": max(0.0, float(memory.private() - private)),
        "peak memory": float(memory.grown()),
    }


def lengths(
    side: dict[str, Any], folder: str, device: str, dtype: str, tokens: Sequence[int]
) -> dict[str, list[float]]:
    """For texts of rising length: bytes held at most while reading, and kept in the cache afterwards.

    Peaks are beyond what the process held with all weights in memory and a few tokens read.
    """
    reader = open_side(side, folder, device, dtype)
    where = torch.device(device)
    touch(reader.model)
    vocab = json.loads(Path(folder, "config.json").read_text("utf-8"))["vocab_size"]
    reader.prefill(torch.randint(vocab, (1, FIRST), device=where))()
    memory = Memory(where)
    found: dict[str, list[float]] = {"peak": [], "cache": []}
    for length in sorted(tokens):
        cache = reader.prefill(torch.randint(vocab, (1, length), device=where))()
        found["peak"].append(float(memory.grown()))
        found["cache"].append(float(reader.cache_bytes(cache)))
        del cache
    return found


def record(folder: str, device: str, dtype: str, tokens: int, names: Sequence[str]) -> dict[str, float]:
    """Bytes held at most while one text is read whole and the named sites are recorded (none: nothing is), beyond the
    model with all its weights in memory.
    """
    where = torch.device(device)
    model = load_model(Path(folder), where, resolve_dtype(dtype))
    touch(model)
    vocab = model.config.vocab
    with torch.inference_mode():
        model(torch.randint(vocab, (1, FIRST), device=where))
        ids = torch.randint(vocab, (1, tokens), device=where)
        memory = Memory(where)
        if names:
            with recording(model, names) as recorder:
                model(ids)
            kept = sum(len(calls) for calls in recorder.calls.values())
        else:
            model(ids)
            kept = 0
        return {"peak": float(memory.grown()), "kept": float(kept)}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"load": load, "lengths": lengths, "record": record}


def open_side(side: dict[str, Any], folder: str, device: str, dtype: str) -> Reader:
    """Load one side: `who`, and for transformers its `attention`, `experts` and `chunk`."""
    where, numbers = torch.device(device), resolve_dtype(dtype)
    if side["who"] == OURS:
        return Ours(load_model(Path(folder), where, numbers))
    model = load_theirs(Path(folder), where, numbers)
    return Theirs(model, side["attention"], side["experts"], side["chunk"])


def touch(model: nn.Module) -> None:
    """Read every weight once, so that mapped ones are in memory like copied ones."""
    for parameter in model.parameters():
        parameter.sum()


class Memory:
    """What this process, or on CUDA PyTorch's allocator, holds beyond what it held when this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            _forget_the_peak()
        self.before = self._held()

    def grown(self) -> int:
        """The most that was held since then, in bytes."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _kilobytes("status", "VmHWM") * 1024 if sys.platform == "linux" else self._held()
        return max(0, peak - self.before)

    def private(self) -> int:
        """What is held now and no file backs, in bytes."""
        import psutil

        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if sys.platform == "linux":
            return _kilobytes("smaps_rollup", "Anonymous") * 1024
        return psutil.Process().memory_full_info().uss

    def _held(self) -> int:
        import psutil

        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss


def _forget_the_peak() -> None:
    """Linux starts to count `VmHWM` anew. Where a sandbox forbids it, the peak is that since the process began."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return


def _kilobytes(file: str, field: str) -> int:
    """One line of what Linux tells about this process, such as `VmHWM:  104 kB`, the most memory it ever held."""
    lines = Path("/proc/self", file).read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
