"""Experts in a quarter of the space: weights in 8 or 4 bits, multiplied with numbers as fine as before."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = (128, 64, 32)  # int4: so many numbers of a row share a scale and a zero; the largest that divides the row
FEW = 16  # up to so many rows, PyTorch's kernels for small integers are the quickest; then it pays to widen the weights
BLOCK = 64  # int4: rows are kept by so many, column after column, row n and row n + 32 in the halves of one byte: the order that
# PyTorch's kernel has on processors with 64 bytes in a register. Elsewhere the kernel disagrees, and is not used.
KINDS = ("int8", "int4")
AT_ONCE = (
    512  # rows that are rounded at once, a multiple of BLOCK: wide copies of a whole matrix would leave every cache
)


def _int8(rows: Float[Tensor, "row column"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers `row column` and scales `row`."""
    wide = rows.float()
    largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    scales = (largest / 127).clamp(min=1e-12).to(dtype)
    return wide.div(scales.float()).round_().clamp_(-127, 127).to(torch.int8), scales.squeeze(-1)


def _int4(rows: Float[Tensor, "row column"], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of integers in the order that `BLOCK` says, half as many as there are columns, and `row group 2`."""
    grouped = rearrange(rows.float(), "row (group number) -> row group number", number=group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scales = ((high - low) / 15).clamp(min=1e-12).to(dtype)
    middles = (low + 8 * scales.float()).to(dtype)
    integers = grouped.sub(middles.float()).div_(scales.float()).add_(8).round_().clamp_(0, 15).to(torch.uint8)
    by_block = rearrange(
        integers, "(block half row) group number -> block (group number) half row", half=2, row=BLOCK // 2
    )
    pairs = by_block[..., 0, :] | by_block[..., 1, :] << 4
    return pairs.reshape(len(rows), -1), torch.cat((scales, middles), -1)


class QuantizedLinear(nn.Module):
    """`out = x @ weight.T` with a weight rounded to 8 or 4 bits. Only the weight is rounded, not `x`.

    "int8": each row has one scale, and a number is `scale * integer` with integers from -127 to 127. "int4": each group of
    128 numbers of a row (64 or 32 where 128 does not divide it) has a scale and a middle, and a number is `middle +
    scale * (integer - 8)` with integers from 0 to 15. Rounding is to nearest. Source: Dettmers et al. 2022
    (arXiv 2208.07339, section 2) for rows, Frantar et al. 2022 (arXiv 2210.17323, section 4, "grouping") for groups.
    Raises `ValueError` for another kind, or for a shape that cannot be cut into groups and blocks.
    """

    def __init__(self, weight: Float[Tensor, "features_out features_in"], kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"There is no kind {kind!r} of small integers here; there is {', '.join(KINDS)}.")
        self.kind, self.dtype, self.shape = kind, weight.dtype, weight.shape
        if kind == "int8":
            parts = [_int8(rows, self.dtype) for rows in weight.detach().split(AT_ONCE)]
            self._keep(*(torch.cat(both) for both in zip(*parts, strict=True)))
            return
        group = next((size for size in GROUPS if weight.shape[1] % size == 0), 0)
        if not group or weight.shape[0] % BLOCK:
            raise ValueError(
                f"A matrix of {tuple(weight.shape)} cannot be kept in int4: it takes rows by {BLOCK}, and columns by {GROUPS[-1]}."
            )
        parts = [_int4(rows, group, self.dtype) for rows in weight.detach().split(AT_ONCE)]
        pairs, both = (torch.cat(part) for part in zip(*parts, strict=True))
        self._keep(pairs, rearrange(both, "row group two -> group row two").contiguous())

    def _keep(self, integers: Tensor, scales: Tensor) -> None:
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)

    integers: Tensor  # int8: features_out features_in; int4: as `BLOCK` says
    scales: Tensor  # int8: features_out; int4: group features_out 2, each a scale and a middle

    @property
    def weight(self) -> Float[Tensor, "features_out features_in"]:
        """The rounded weight as ordinary numbers, made anew each time."""
        if self.kind == "int8":
            return self.integers.to(self.dtype) * self.scales[:, None]
        pairs = self.integers.view(-1, self.shape[1], BLOCK // 2)
        halves = torch.stack((pairs & 15, pairs >> 4), -2)
        integers = rearrange(halves, "block column half row -> (block half row) column").to(self.dtype)
        grouped = integers.unflatten(-1, (self.scales.shape[0], -1))
        scales, middles = rearrange(self.scales, "group row two -> two row group 1")
        return (middles + scales * (grouped - 8)).flatten(-2)

    def forward(self, x: Float[Tensor, "*rows features_in"]) -> Float[Tensor, "*rows features_out"]:
        rows = x.numel() // x.shape[-1]
        if rows > FEW or torch.is_grad_enabled() or not kernel_works(self.kind, x.device, x.dtype):
            return F.linear(x, self.weight)
        return self.product(x.reshape(rows, -1)).view(*x.shape[:-1], -1)

    def product(self, x: Float[Tensor, "row features_in"]) -> Float[Tensor, "row features_out"]:
        """PyTorch's own product with small integers; `kernel_works` says whether it may be called."""
        if self.kind == "int8":
            return torch.ops.aten._weight_int8pack_mm(x, self.integers, self.scales)
        group = self.shape[1] // self.scales.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.integers, group, self.scales)


@functools.cache
def kernel_works(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's product with small integers is present here, and agrees with the plain one."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 128, generator=generator).to(device, dtype) for rows in (2 * BLOCK, 3))
    layer = QuantizedLinear(weight, kind)
    try:
        out = layer.product(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out.float(), F.linear(x.float(), layer.weight.float()), rtol=0.02, atol=0.2)
