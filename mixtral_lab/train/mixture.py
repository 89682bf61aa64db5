"""The mixture's training step on a CPU: `take_sorted` with its gradient written out by hand.

Autograd through the model's own mixture works, and gives what the tests compare this with; it spends half of its time on
copies, casts, and on kernels that oneDNN compiles anew for every number of rows. Here the rows of each expert
are rounded up so that their number repeats, `gate` and `up` are one product, and every scatter is a gather.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixtral_lab.model.moe import Routing

ROWS = 128  # each expert's rows are rounded up to a multiple of this


def mix_for_training(x: Tensor, routing: Routing, experts: nn.ModuleList) -> Tensor:
    """Equal to `mix_dense`, in bfloat16, for training. `x` is `batch seq dim`; so is the result.

    Under `torch.autocast` the master weights stay float32 and get float32 gradients.
    """
    weights = [getattr(expert, role).weight for expert in experts for role in ("gate", "up", "down")]
    tokens = rearrange(x, "batch seq dim -> (batch seq) dim")
    choices = rearrange(routing.weights, "batch seq choice -> (batch seq) choice")
    chosen = rearrange(routing.experts, "batch seq choice -> (batch seq) choice")
    return _Mixture.apply(tokens, choices, chosen, *weights).view_as(x)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, chosen: Tensor, *stored: Tensor) -> Tensor:
        tokens = tokens.to(torch.bfloat16)
        gate_up = [torch.cat((g, u)).to(torch.bfloat16) for g, u in zip(stored[::3], stored[1::3], strict=True)]
        down = [w.to(torch.bfloat16) for w in stored[2::3]]
        n_tokens, n_choices = chosen.shape

        # Rows: every expert's tokens in turn, its last rows empty. `slot` says where a choice went.
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        sizes = flat.bincount(minlength=len(down))
        room = (sizes + ROWS - 1) // ROWS * ROWS
        shift = (room.cumsum(0) - room) - (sizes.cumsum(0) - sizes)
        slot = torch.empty_like(flat)
        slot[order] = torch.arange(len(flat)) + shift[flat[order]]
        room_list = room.tolist()
        n_rows = sum(room_list)
        token = torch.zeros(n_rows, dtype=torch.long)
        token[slot] = torch.arange(len(flat)) // n_choices
        weight = torch.zeros(n_rows, dtype=torch.float32)
        weight[slot] = weights.flatten().float()

        rows = tokens.index_select(0, token)
        hidden = rows.new_empty(n_rows, gate_up[0].shape[0])
        for part, out, w in zip(rows.split(room_list), hidden.split(room_list), gate_up, strict=True):
            if len(part):
                torch.mm(part, w.t(), out=out)
        inner = _swiglu(hidden)
        answers = torch.empty_like(rows)
        for part, out, w in zip(inner.split(room_list), answers.split(room_list), down, strict=True):
            if len(part):
                torch.mm(part, w.t(), out=out)
        ctx.save_for_backward(rows, hidden, inner, answers, token, weight, slot, weights, *gate_up, *down)
        ctx.room = room_list
        return _combine(answers.index_select(0, slot).view(n_tokens, n_choices, -1), weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, inner, answers, token, weight, slot, weights, *matrices = ctx.saved_tensors
        half = len(matrices) // 2
        gate_up, down, room = matrices[:half], matrices[half:], ctx.room
        n_tokens, n_choices = weights.shape
        grad = grads[0].to(torch.bfloat16)

        picked = answers.index_select(0, slot).view(n_tokens, n_choices, -1)
        d_weights = _dot(picked, grad)
        d_answers = _scale(grad.index_select(0, token), weight)
        d_inner = torch.empty_like(inner)
        for part, out, w in zip(d_answers.split(room), d_inner.split(room), down, strict=True):
            if len(part):
                torch.mm(part, w, out=out)
        d_hidden = _swiglu_backward(d_inner, hidden)
        d_rows = torch.empty_like(rows)
        for part, out, w in zip(d_hidden.split(room), d_rows.split(room), gate_up, strict=True):
            if len(part):
                torch.mm(part, w, out=out)
        d_tokens = d_rows.index_select(0, slot).view(n_tokens, n_choices, -1).float().sum(1)

        d_stored: list[Tensor | None] = []
        split = zip(rows.split(room), inner.split(room), d_hidden.split(room), d_answers.split(room), strict=True)
        for row, act, d_hid, d_ans in split:
            d_gate, d_up = (d_hid.t() @ row).float().chunk(2)
            d_stored += [d_gate, d_up, (d_ans.t() @ act).float()]
        return d_tokens, d_weights, None, *d_stored


@torch.compile(dynamic=True)
def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(hidden.dtype)


@torch.compile(dynamic=True)
def _swiglu_backward(d_inner: Tensor, hidden: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, dim=-1)
    d = d_inner.float()
    s = torch.sigmoid(gate)
    return torch.cat((d * up * s * (1 + gate * (1 - s)), d * gate * s), dim=-1).to(hidden.dtype)


@torch.compile(dynamic=True)
def _combine(picked: Tensor, weights: Tensor) -> Tensor:
    return (picked.float() * weights.float()[..., None]).sum(1)


@torch.compile(dynamic=True)
def _dot(picked: Tensor, grad: Tensor) -> Tensor:
    return (picked.float() * grad.float()[:, None]).sum(-1)


@torch.compile(dynamic=True)
def _scale(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows.float() * weight[:, None]).to(rows.dtype)
