"""What this machine could do at most, measured in the same minute as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from mixtral_lab.model.linear import linear

FAR = 2**29  # bytes of the buffer that is read: far beyond any cache of a processor
SIDE = 2048  # rows and columns of the matrices that are multiplied


class Rooflines:
    """Measures memory bandwidth and the rate of matrix products on one device.

    The bandwidth is that of reading: the sum of a long buffer, with all threads. The rate is that of the faster of the public
    product and the one this package uses. Each measurement takes the best of three tries: a ceiling is what is possible.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.ones(FAR // 4, device=device)

    @torch.inference_mode()
    def bandwidth(self) -> float:
        """Bytes per second."""
        return FAR / self._best(self._buffer.sum)

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
