"""Matrix times vector, by the fastest road this machine has. Everything learned in the model is one of these."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SMALL = 2**19  # numbers; oneDNN takes about 13 microseconds to start, longer than a vector times so small a matrix
TINY = 2**15  # numbers; up to here one core alone is the quickest
SWEPT = {
    torch.float32: SMALL,
    torch.bfloat16: 2**17,
}  # numbers; matrices below are multiplied with one vector in two sweeps
ROWS = 32  # oneDNN compiles a kernel for every number of rows it meets; rounding rows up keeps them few
_tuned = True


class Linear(nn.Linear):
    """`out = x @ weight.T`, without a bias, as everywhere in Mistral's models."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out, bias=False)
        self.packed: Packed | None = None

    def forward(self, x: Float[Tensor, "*rows features_in"]) -> Float[Tensor, "*rows features_out"]:
        if self.packed is not None and _tuned and x.numel() < ROWS * x.shape[-1] and not torch.compiler.is_compiling():
            if self.packed.of == (self.weight.data_ptr(), self.weight._version):
                return torch.ops.mkldnn._linear_pointwise(x, self.packed.weight, None, "none", [], "")
            self.packed = None
        return linear(x, self.weight)


class Packed(NamedTuple):
    """A weight in the order in which oneDNN multiplies it fastest, and the place and version of the one it is a copy of."""

    weight: Tensor
    of: tuple[int, int]


def pack(model: nn.Module) -> int:
    """Keep a packed copy of every large bfloat16 matrix on the CPU beside it, for steps of a few tokens; the bytes it takes.

    It doubles the memory; matrices that are quicker swept (`SWEPT`) stay as they are. A decode step of a 0.75 B model took
    23 ms instead of 30 (README.md says on what). A weight that is changed afterwards loses its copy. Where PyTorch's private
    operator for it is missing, nothing happens.
    """
    taken = 0
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16:
            weight = module.weight
            if not packing_works() or weight.numel() < SWEPT[torch.bfloat16]:
                continue
            copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
            module.packed = Packed(copy, (weight.data_ptr(), weight._version))
            taken += weight.numel() * weight.itemsize
    return taken


def linear(
    x: Float[Tensor, "*rows features_in"], weight: Float[Tensor, "features_out features_in"]
) -> Float[Tensor, "*rows features_out"]:
    """Multiply by a weight matrix. Inference on a CPU takes one of two shorter roads where they pay.

    PyTorch's float32 product on some processors (AMD among them) runs at half the speed of oneDNN's. That operator is
    private to PyTorch, so `onednn_works` tries it once and `F.linear` stays the way back. And for a single row, a matrix
    that fits into a core's cache is read up to twice as fast in two sweeps (`swept`), in bfloat16 too. For more rows
    `F.linear` is oneDNN's product already in bfloat16, and only their number is rounded up (`ROWS`).
    """
    if single(x) and _tuned and weight.numel() < SWEPT.get(x.dtype, 0) and x.dtype == weight.dtype:
        tiny = weight.numel() <= TINY
        out = F.linear(x.float(), weight.float()) if tiny else swept(weight, x.unsqueeze(-2))
        return out if out.dtype == x.dtype else out.to(x.dtype)
    rows = x.numel() // x.shape[-1]
    if rows == 1 and torch.compiler.is_compiling():  # one loop, which reads the matrix once
        return (weight.float() * settled(x.view(-1).float())).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
    if not rounds_up(x) or x.dtype != weight.dtype:
        return F.linear(x, weight)
    few = rows < ROWS and weight.numel() < SMALL
    if x.dtype == torch.float32 and (few or torch.is_autocast_enabled("cpu") or not onednn_works()):
        return F.linear(x, weight)
    missing = rounded_up(rows, ROWS) - rows
    if not missing:
        return _product(x, weight)
    flat = x.reshape(rows, -1)
    return _product(torch.cat((flat, flat[:missing])), weight)[:rows].reshape(*x.shape[:-1], -1)


def rounds_up(x: Tensor) -> bool:
    """Whether products with this take the shorter roads for many rows, and wants a round number of them."""
    return _tuned and x.device.type == "cpu" and not torch.is_grad_enabled()


def rounded_up(rows: int, multiple: int) -> int:
    """The next multiple; of twice that from eight on, where it costs little more; fewer rows than one stay as they are."""
    if multiple > 1 and rows > 8 * multiple:
        multiple *= 2
    return rows + (-rows % multiple if rows >= multiple else 0)


def swept(
    weight: Float[Tensor, "... features_out features_in"], x: Float[Tensor, "... features_in"]
) -> Float[Tensor, "... features_out"]:
    """One vector times a small matrix, or several, in two sweeps over it, of which the second finds it in the core's cache.

    The sweeps are a product and a sum, which all cores share alike, so that each finds what it left there. Bfloat16 is widened
    first. The result is float32.
    """
    return (weight * x.float()).sum(-1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def single(x: Tensor) -> bool:
    """Whether this is one token alone, on a CPU, and nobody wants gradients or a compiled step.

    What is done with it takes less time than PyTorch needs to start an operation, so the fewest operations are the quickest.
    """
    return x.is_cpu and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def settled(x: Tensor) -> Tensor:
    """The same values; compiled code computes them once, here, and not again wherever they are used.

    Left to itself, the compiler would compute a vector anew for each row of the matrix that it is multiplied with.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


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


@functools.cache
def packing_works() -> bool:
    """Whether oneDNN's packed bfloat16 product is present here and agrees with PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (1, 96))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        out = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out.float(), F.linear(x, weight).float(), atol=0.1)
