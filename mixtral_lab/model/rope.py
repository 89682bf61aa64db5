"""Positions become rotations: how attention knows where a token stands."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

Heads = Float[Tensor, "*heads head_dim"]
# Cosines and sines, with an axis of 1 where queries have `kv` and `group`.
Rotation = tuple[Float[Tensor, "#batch 1 1 seq head_dim"], Float[Tensor, "#batch 1 1 seq head_dim"]]


def rotation(positions: Int[Tensor, "#batch seq"], head_dim: int, theta: float) -> Rotation:
    """Cosines and sines of the angles that each position turns each pair of numbers by.

    Pair `i` of `head_dim / 2` turns by `position / theta ** (2 i / head_dim)` radians: the first pair quickly,
    the last one slowly. With `theta=10000` and `head_dim=4`, position 3 turns its pairs by 3 and 0.03.
    Both halves of a pair are given, the first with minus the sine, as `rotate` needs them. Computed in
    float32 whatever the model's dtype. Source: RoFormer (arXiv 2104.09864, section 3.2.2).
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None, None, :, None] * theta ** (-pair / head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Heads, turn: tuple[Tensor, Tensor]) -> Heads:
    """Turn every pair of numbers in each head by its angle; the dot product of two then sees only distance.

    A pair is (number `i`, number `i + head_dim / 2`), the layout of Hugging Face checkpoints. Mistral's own
    files pair neighbours; `weights.py` reorders them on the way in.
    """
    cos, sin = turn
    if cos.dtype != x.dtype:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin)


AHEAD = 16  # positions whose matrices are made together while a text is written


def turn_at(position: int, head_dim: int, theta: float) -> Float[Tensor, "head_dim head_dim"]:
    """`rotate` by a single position as a matrix, `heads @ turn`: one product instead of three operations. On the CPU.

    Its rows are those of the identity, turned. Made with those of its neighbours, which the next tokens will ask for.
    """
    return _turns(position // AHEAD, head_dim, theta)[position % AHEAD]


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may be asked for outside of it
def _turns(block: int, head_dim: int, theta: float) -> tuple[Tensor, ...]:
    positions = torch.arange(block * AHEAD, (block + 1) * AHEAD, device="cpu")[None]
    cos, sin = (part.view(AHEAD, 1, head_dim) for part in rotation(positions, head_dim, theta))
    return rotate(torch.eye(head_dim, dtype=torch.float32, device="cpu").expand(AHEAD, -1, -1), (cos, sin)).unbind()
