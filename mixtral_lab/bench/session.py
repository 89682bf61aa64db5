"""One run: every shape and dtype in every section, and where and with what it ran."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from mixtral_lab.bench.report import BenchError, Report
from mixtral_lab.bench.sections import SECTIONS, Lengths, Sections
from mixtral_lab.bench.shapes import Shape, usual_shapes, windowed
from mixtral_lab.bench.sides import transformers
from mixtral_lab.bench.timing import Found
from mixtral_lab.machine import FAR, Rooflines
from mixtral_lab.weights import resolve_device, resolve_dtype

LONG = "long"


def run(
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str = "auto",
    repeats: int = 5,
    only: Sequence[str] = SECTIONS,
    lengths: Lengths | None = None,
    long_shape: Shape | None = None,
) -> Report:
    """Compare on every shape (`usual_shapes` if none are given) and in every dtype; long texts on `windowed`.

    `only` names the sections to run. Shows its progress on stderr. Raises `BenchError` for an unknown section, and if
    the two sides' logits do not agree: then nothing of that shape is timed.
    """
    if unknown := [section for section in only if section not in SECTIONS]:
        raise BenchError(f"There is no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}.")
    where, numbers = resolve_device(device), [resolve_dtype(dtype) for dtype in dtypes]
    machine = _machine(where, repeats)
    short = [section for section in SECTIONS if section in only and section != LONG]
    tables = [(shape, dtype, short) for shape in shapes or usual_shapes() for dtype in numbers if short]
    if LONG in only:
        tables += [(long_shape or windowed(), dtype, [LONG]) for dtype in numbers]
    found, rooflines = Found(), Rooflines(where)
    with tqdm(total=sum(len(sections) for _, _, sections in tables), disable=None, leave=False) as bar:
        for shape, dtype, sections in tables:
            with tempfile.TemporaryDirectory(prefix="mixtral-lab-bench-") as home:
                bar.set_description(f"{shape.name}: writing the checkpoint")
                folder = shape.write(dtype, Path(home) / "checkpoint")
                timing = Sections(
                    shape, folder, where, dtype, repeats, rooflines, found, bar, lengths=lengths or Lengths()
                )
                timing.describe()
                for section in sections:
                    getattr(timing, section)()
                    bar.update()
                timing.close()
    machine["memory bandwidth"] = f"{rooflines.bandwidth() / 1e9:,.1f} GB/s (reading {FAR / 2**20:,.0f} MiB)"
    for dtype in numbers:
        name = str(dtype).removeprefix("torch.")
        machine[f"matrix products, {name}"] = f"{rooflines.rate(dtype) / 1e9:,.0f} GFLOP/s"
    return Report(machine, tuple(found.notes), tuple(found.parity), tuple(found.measurements), tuple(found.profiles))


def _machine(device: torch.device, repeats: int) -> dict[str, str]:
    import psutil

    on_gpu = device.type == "cuda"
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, of which PyTorch uses {torch.get_num_threads()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if on_gpu else str(device),
        "repeats": str(repeats),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers().__version__,
        "mixtral-lab": version("mixtral-lab"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
