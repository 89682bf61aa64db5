"""Matrix times vector, by the fastest road this machine has. Everything learned in the model is one of these."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SMALL = 2**19  # numbers; oneDNN takes about 13 microseconds to start, longer than a vector times so small a matrix
TINY = 2**14  # numbers; up to here PyTorch's own product is over before two operations have started
ROWS = 32  # oneDNN compiles a kernel for every number of rows it meets; rounding rows up keeps them few
_tuned = True


class Linear(nn.Linear):
    """`out = x @ weight.T`, without a bias, as everywhere in Mistral's models."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out, bias=False)

    def forward(self, x: Float[Tensor, "*rows features_in"]) -> Float[Tensor, "*rows features_out"]:
        return linear(x, self.weight)


def linear(
    x: Float[Tensor, "*rows features_in"], weight: Float[Tensor, "features_out features_in"]
) -> Float[Tensor, "*rows features_out"]:
    """Multiply by a weight matrix. Float32 inference on a CPU takes one of two shorter roads where they pay.

    PyTorch's float32 product on some processors (AMD among them) runs at half the speed of oneDNN's. That operator is
    private to PyTorch, so `onednn_works` tries it once and `F.linear` stays the way back. And for a single row, a matrix
    that fits into a core's cache is read twice as fast by multiplying and summing in two sweeps.
    """
    rows = x.numel() // x.shape[-1]
    if rows == 1 and torch.compiler.is_compiling():  # one loop, which reads the matrix once
        return (weight.float() * x.view(-1).float()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    if not (_tuned and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32) or torch.is_grad_enabled():
        return F.linear(x, weight)
    if rows == 1 and TINY < weight.numel() < SMALL:
        return (weight * x.view(-1)).sum(-1).view(*x.shape[:-1], -1)
    if (rows < ROWS and weight.numel() < SMALL) or torch.is_autocast_enabled("cpu") or not onednn_works():
        return F.linear(x, weight)
    missing = -rows % ROWS
    if rows < ROWS or not missing:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    flat = x.reshape(rows, -1)
    padded = torch.cat((flat, flat[:missing]))
    out = torch.ops.mkldnn._linear_pointwise(padded, weight, None, "none", [], "")
    return out[:rows].reshape(*x.shape[:-1], -1)


@contextmanager
def portable() -> Iterator[None]:
    """While open, nothing but plain PyTorch: what the model does where the shorter roads do not exist."""
    global _tuned
    before, _tuned = _tuned, False
    try:
        yield
    finally:
        _tuned = before


@functools.cache
def onednn_works() -> bool:
    """Whether oneDNN's linear operator is present here and agrees with PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out, F.linear(x, weight), atol=1e-5)
