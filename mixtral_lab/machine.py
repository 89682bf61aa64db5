"""What a machine has - memory, and how fast it reads and multiplies - and what a model needs of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mixtral_lab.config import Config, LabError
from mixtral_lab.model.linear import linear
from mixtral_lab.weights import free_memory

if TYPE_CHECKING:
    import pandas as pd

FAR = 2**29  # bytes of the buffer that is read: far beyond any cache of a processor
SIDE = 2048  # rows and columns of the matrices that are multiplied
SPARE = 0.1  # of the memory, left to activations, the framework and everything else
GROUP = 128  # int4: numbers that share a scale and a middle

DTYPES = {"float32": 4.0, "bfloat16": 2.0}  # bytes for each number
EXPERTS = {
    "as the rest": None,
    "int8": 1.0,
    "int4": 0.5 + 4 / GROUP,
}  # the same; int8 has one scale for each row besides


class MachineError(LabError, ValueError):
    """A machine was described by numbers that cannot be."""


@dataclass(frozen=True)
class Machine:
    """What decides which model runs here and how fast it writes.

    `memory` is in bytes; `bandwidth` (memory to processor) and `link` (what expert weights cross that do not fit: the bus
    of a GPU, or the disk behind a CPU) in bytes per second, `link` None where nothing is behind.
    """

    memory: float
    bandwidth: float
    link: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "bandwidth", "link"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise MachineError(f"The machine's {name} is {value}: it must be above 0.")


def describe(
    device: str | None = None, memory: float | None = None, bandwidth: float | None = None, link: float | None = None
) -> Machine:
    """A machine by its numbers (bytes, bytes per second); what is not given is read off or measured on `device`.

    Raises `MachineError` if there is neither, or no such device.
    """
    if device is None:
        if memory is None or bandwidth is None:
            raise MachineError("Without a device to measure, give both the memory and its bandwidth.")
        return Machine(memory, bandwidth, link)
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=where)  # is it there?
        free = free_memory(where) if memory is None else memory  # before anything is measured with memory of its own
        measured = bandwidth is None or (link is None and where.type == "cuda")
        rooflines = Rooflines(where) if measured else None
    except (RuntimeError, AssertionError) as error:
        raise MachineError(
            f"There is no device {device} here ({str(error).splitlines()[0]}); give memory and bandwidth."
        ) from None
    if free is None:
        raise MachineError(f"How much memory {device} has free is not known here: give it.")
    if rooflines is not None:
        bandwidth = rooflines.bandwidth() if bandwidth is None else bandwidth
        link = rooflines.link() if link is None else link
    assert bandwidth is not None
    return Machine(float(free), bandwidth, link)


def what_fits(config: Config, machine: Machine, length: int) -> pd.DataFrame:
    """Which way of keeping a model's weights fits a machine, and how fast it could write at most.

    A row for each dtype of the weights and each way of keeping experts: `dtype`, `experts` ("as the rest", "int8", "int4"),
    `weights` and `cache` (bytes, for one text of `length` tokens), `resident` (experts of each layer that can stay in memory
    at once; all of them: everything fits; 0: not even what each token needs), `read` (bytes that one new token needs: active
    weights and cache), `missed` (of them, bytes expected to cross the link) and `rate` (tokens per second at most; NaN where it
    does not run). A dense model has `resident` 1 or 0.

    The rate is what bandwidth allows: `1 / (read / bandwidth + missed / link)`. A resident expert is taken to be hit as often
    as chance would have it, `resident / n_experts`; a real trace may be kinder (`analysis.offload`). A tenth of the
    memory is left free.
    Source of the argument: Williams, Waterman and Patterson 2009 (the roofline model), for one text at a time.
    """
    import pandas as pd

    if length < 1:
        raise MachineError(f"The length is {length} tokens: it must be at least 1.")
    usable = machine.memory * (1 - SPARE)
    total, chosen = config.n_experts or 1, config.n_choices or 1
    one = config.expert_parameters * config.n_layers
    rest = config.parameters - total * one
    rows = []
    for dtype, size in DTYPES.items():
        cache = config.cache_bytes(length, int(size))
        embeddings = (
            0 if config.tied else config.vocab * config.dim
        )  # one row of them is looked up, the rest is not read
        for experts in EXPERTS:  # int8 has one scale for each row besides
            expert = one * {"int8": 1.0, "int4": 0.5 + 2 * size / GROUP}.get(experts, size)
            room = usable - rest * size - cache
            resident = max(0, min(total, int(room // expert)))
            if resident < chosen or (resident < total and machine.link is None):
                resident = 0
            missed = chosen * expert * (1 - resident / total)
            read = (rest - embeddings) * size + chosen * expert + cache
            seconds = read / machine.bandwidth + (missed / machine.link if machine.link else 0.0)
            rows.append(
                {
                    "dtype": dtype, "experts": experts, "weights": rest * size + total * expert, "cache": float(cache),
                    "resident": resident, "n_experts": total, "read": read, "missed": missed if resident else float("nan"),
                    "rate": 1 / seconds if resident else float("nan"),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


class Rooflines:
    """Measures memory bandwidth and the rate of matrix products on one device.

    The bandwidth is that of reading a long buffer with all threads: summing it, or multiplying it, as a matrix, by a vector,
    whichever is quicker. The rate is that of the faster of the public product and the one this package uses. Each measurement
    takes the best of three tries: a ceiling is what is possible.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.ones(FAR // 4, device=device)

    @torch.inference_mode()
    def bandwidth(self) -> float:
        """Bytes per second."""
        matrix = self._buffer.view(-1, SIDE)
        return FAR / min(self._best(self._buffer.sum), self._best(partial(torch.mv, matrix, matrix[0])))

    @torch.inference_mode()
    def link(self) -> float | None:
        """Bytes per second from the host's memory to a GPU; None on a CPU, where the link is a disk and depends on the file."""
        if self.device.type != "cuda":
            return None
        host = torch.empty(FAR // 4, pin_memory=True)
        return FAR / self._best(partial(self._buffer.copy_, host))

    @torch.inference_mode()
    def rate(self, dtype: torch.dtype) -> float:
        """Multiplications and additions per second."""
        x, weight = (torch.ones(SIDE, SIDE, dtype=dtype, device=self.device) for _ in range(2))
        best = min(self._best(partial(product, x, weight)) for product in (F.linear, linear))
        return 2 * SIDE**3 / best

    def _best(self, work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(3):
            synchronize(self.device)
            start = time.perf_counter()
            work()
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return min(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to be done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
