"""Several processes, one model: each holds a part of every layer's experts, and rows travel to the expert they chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.model import Transformer
from mixtral_lab.model.module import ModuleList
from mixtral_lab.model.moe import Chosen, Experts, Laid, Part, Routing, Rows, Take, take_sorted


class ParallelError(LabError, ValueError):
    """The processes cannot share this model."""


def owned(n_experts: int | None, rank: int, size: int) -> range:
    """The experts that a process holds: the `rank`-th of `size` equal stretches. Raises `ParallelError`."""
    if n_experts is None:
        raise ParallelError("This model is dense: there are no experts to share.")
    if n_experts % size:
        raise ParallelError(f"{n_experts} experts cannot be shared evenly by {size} processes.")
    each = n_experts // size
    return range(rank * each, (rank + 1) * each)


class Shared(Experts):
    """`Experts` of which this process holds some; the other processes hold the others and run the same program.

    All processes read the same text and compute attention alike. At the experts each sends an equal share of the rows to
    the processes that hold their experts (all-to-all), runs its own experts on what it is sent, and sends the answers
    back; in the end all answers are gathered everywhere. So each expert's weights are in one place only.
    """

    def __init__(self, ffn: ModuleList, rank: int, size: int) -> None:
        super().__init__(0, 0, 0)
        self.ffn, self.rank, self.size = ffn, rank, size
        self.bank, self._sought = None, True

    def lay_out(self) -> None:
        raise ParallelError("A model shared by processes cannot be compiled.")

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        if self.dispatch not in ("auto", "sorted", "grouped", "one_by_one"):
            raise ParallelError('The plain definitions need all experts in one place: leave dispatch at "auto".')
        return super().forward(x, routing)

    def way(self, dispatch: str) -> Take:
        return self._take  # whichever would be quickest for one process

    def _take(self, rows: Rows, chosen: Chosen, experts: Sequence[Part]) -> Laid:
        mine = owned(len(experts), self.rank, self.size)
        flat = rows.expand(*chosen.shape, -1).flatten(0, 2)
        total = len(flat)
        sent = torch.arange(total, device=rows.device)[self.rank :: self.size]
        wanted = chosen.flatten()[sent]
        order = wanted.argsort(stable=True)  # by expert, and so by process
        out = (wanted // len(mine)).bincount(minlength=self.size)
        came = torch.empty_like(out)
        dist.all_to_all_single(came, out)
        there, back = out.tolist(), came.tolist()
        received = self._exchange(flat[sent][order], back, there)
        which = self._exchange(wanted[order], back, there)
        if len(received):
            local = take_sorted(
                received[None, :, None], (which - mine.start)[None, :, None], experts[mine.start : mine.stop]
            )
            answers = local.by_choice()[0, :, 0]
        else:
            answers = experts[mine.start](received)  # no rows, but of the right width
        answers = self._exchange(answers, there, back)
        each = -(-total // self.size)
        put_back = answers.new_zeros(each, answers.shape[-1])
        put_back[order] = answers
        everywhere = put_back.new_empty(self.size * each, answers.shape[-1])
        dist.all_gather_into_tensor(everywhere, put_back)
        in_turn = rearrange(everywhere, "(rank row) features -> (row rank) features", rank=self.size)
        return Laid(in_turn[:total], None, chosen.shape)

    def _exchange(self, rows: Tensor, come: list[int], go: list[int]) -> Tensor:
        received = rows.new_empty(sum(come), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), come, go)
        return received


def collected(mine: bytes) -> Iterator[bytes]:
    """What every other process has to say, one after the other, in process 0; the others send theirs and see nothing.

    To be called by all processes. One message at a time is held.
    """
    if dist.get_rank():
        message = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        dist.send(torch.tensor([len(message)]), dst=0)
        dist.send(message, dst=0)
        return
    for rank in range(1, dist.get_world_size()):
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, src=rank)
        message = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(message, src=rank)
        yield message.numpy().tobytes()


def share_experts(model: Transformer, rank: int, size: int) -> None:
    """Let this process's model do with the experts it owns, together with `size - 1` others."""
    owned(model.config.n_experts, rank, size)
    for block in model.blocks:
        block.experts = Shared(block.experts.ffn, rank, size)
