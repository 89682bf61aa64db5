"""A mixture that does not fit: its experts stay where they are stored, and a few of each layer are kept at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtral_lab.config import LabError
from mixtral_lab.expert_cache import LRU
from mixtral_lab.model import Transformer
from mixtral_lab.model.module import ModuleList
from mixtral_lab.model.moe import Experts, Router, Routing

if TYPE_CHECKING:
    import pandas as pd

COUNTED = ("asked", "hits", "ahead", "loads")
Weights = list[Tensor]  # of one expert, in the order of its parameters and buffers
Read = Callable[[], Weights]  # an expert's weights as they are stored: views of a mapped file, or made when asked for


class OffloadError(LabError, ValueError):
    """Experts cannot be kept as asked."""


class Shelf:
    """The experts of one layer: all at home in the files, `capacity` of them copied to where the model computes.

    An expert is an ordinary module all the time. While it is lent, its parameters are the copy; otherwise they are what they
    were before: views of the file, or nothing where reading means unpacking. Which copies stay is `LRU`'s to say. `stage`
    copies guessed experts beforehand, in a thread beside the computing.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        home: Sequence[Read],
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.experts, self.home, self.device, self.dtype = experts, home, device, dtype
        self._at_home = [[part.data for part in parts(expert)] for expert in experts]
        self.cache = LRU(capacity)
        self.counts = dict.fromkeys(COUNTED, 0)
        self.copies: dict[int, Weights] = {}
        self._coming: dict[int, Future[Weights]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def lending(self, asked: Sequence[int], others: Sequence[int] = ()) -> Iterator[None]:
        """Have the asked experts at hand while open, each once; `others` too, which a plain definition runs for nothing.

        Afterwards at most `capacity` stay. While open it may be all that are asked for, however few may stay.
        """
        found = self.cache.use(asked)
        self.counts["asked"] += sum(map(len, found))
        self.counts["hits"] += len(found.resident) + len(found.staged)
        self.counts["ahead"] += len(found.staged)
        self.counts["loads"] += len(found.missing)
        coming, self._coming = self._coming, {}
        try:
            # Also those that count as resident: a copy that was interrupted is not there.
            for expert in (*found.resident, *found.staged, *found.missing, *others):
                if expert not in self.copies:
                    self._lend(expert, coming[expert].result() if expert in coming else self._copy(expert))
            yield
        finally:
            for expert in self.copies.keys() - set(self.cache.resident):
                self._give_back(expert)

    def stage(self, guessed: Sequence[int], worker: ThreadPoolExecutor) -> None:
        """Begin to copy guessed experts, until the next `lending`; a right guess is then a hit."""
        fetched = self.cache.stage(guessed)
        self.counts["loads"] += len(fetched)
        self._coming = {expert: worker.submit(self._copy, expert) for expert in fetched}

    def _copy(self, expert: int) -> Weights:
        """The weights, where and as the model computes; small integers keep their kind. On a GPU, beside its other work."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            copies = [
                weight.to(self.device, self.dtype if weight.is_floating_point() else None, copy=True)
                for weight in self.home[expert]()
            ]
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _lend(self, expert: int, copies: Weights) -> None:
        self.copies[expert] = copies
        for own, copy in zip(parts(self.experts[expert]), copies, strict=True):
            own.data = copy
            if self._stream is not None:
                copy.record_stream(torch.cuda.current_stream(self.device))

    def _give_back(self, expert: int) -> None:
        del self.copies[expert]
        for own, weight in zip(parts(self.experts[expert]), self._at_home[expert], strict=True):
            own.data = weight


def parts(expert: nn.Module) -> Weights:
    return [*expert.parameters(), *expert.buffers()]


class Offloaded(Experts):
    """`Experts` whose weights come from a shelf. While a text is written, the next layer's are guessed and fetched meanwhile.

    The guess: what the next layer's router says of what this layer's experts read. None is made for prompts, which need
    nearly all experts anyway. Source: Fast Inference of Mixture-of-Experts Language Models with Offloading (arXiv 2312.17238,
    section 3).
    """

    def __init__(self, ffn: ModuleList, shelf: Shelf, worker: ThreadPoolExecutor) -> None:
        super().__init__(0, 0, 0)
        self.ffn, self.shelf, self._worker = ffn, shelf, worker
        self.bank, self._sought = None, True  # weights that come and go lie nowhere side by side
        self._after: tuple[Router, Shelf] | None = None

    def followed_by(self, router: Router, shelf: Shelf) -> None:
        self._after = router, shelf  # a tuple, so that the router is not taken for a part of this module

    def lay_out(self) -> None:
        raise OffloadError('A model whose experts come and go cannot be compiled: load it without experts="offload".')

    def forward(self, x: Float[Tensor, "batch seq dim"], routing: Routing) -> Float[Tensor, "batch seq dim"]:
        if self._after is not None and x.shape[0] * x.shape[1] == 1:
            router, shelf = self._after
            shelf.stage(router.score(x).topk(router.n_choices, dim=-1).indices.flatten().tolist(), self._worker)
        chosen = routing.experts
        asked = chosen.flatten().tolist() if chosen.shape[0] * chosen.shape[1] == 1 else chosen.unique().tolist()
        every = self.dispatch not in ("auto", "sorted", "grouped", "one_by_one")
        with self.shelf.lending(asked, range(len(self.ffn)) if every else ()):
            return super().forward(x, routing)


def offload(
    model: Transformer, home: Callable[[int, int], Read], resident: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Keep `resident` experts of each layer at hand and the others at home: `home(layer, expert)` reads one.

    Raises `OffloadError` for a dense model, or if `resident` is not between what a token chooses and all.
    """
    total, least = model.config.n_experts, model.config.n_choices
    if total is None or least is None:
        raise OffloadError(
            'This model is dense: it has no experts to keep elsewhere; load it without experts="offload".'
        )
    if not least <= resident <= total:
        raise OffloadError(f"resident is {resident}: it must be from {least}, which each token takes, to all {total}.")
    worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
    before: Offloaded | None = None
    for number, block in enumerate(model.blocks):
        swiglus = block.experts.swiglus
        shelf = Shelf(swiglus, [home(number, expert) for expert in range(total)], resident, device, dtype)
        block.experts = Offloaded(block.experts.ffn, shelf, worker)
        if before is not None and block.router is not None:
            before.followed_by(block.router, shelf)
        before = block.experts


def loads(model: Transformer) -> pd.DataFrame:
    """What the shelves did so far, a row for each layer; the columns are those of `analysis.offload.offload_frame`.

    Columns: layer, capacity, asked, hits, ahead, misses, loads, bytes (copied). Raises `OffloadError` if nothing is offloaded.
    """
    import pandas as pd

    rows: list[dict[str, int]] = []
    one = 0
    for layer, block in enumerate(model.blocks):
        if block.router is None or not isinstance(block.experts, Offloaded):
            raise OffloadError(
                'The experts of this model are all in memory; load it with experts="offload", resident=N.'
            )
        shelf = block.experts.shelf
        one = one or sum(weight.numel() * _itemsize(weight, shelf.dtype) for weight in shelf.home[0]())
        rows.append(
            {
                "layer": layer, "capacity": shelf.cache.capacity, **shelf.counts,
                "misses": shelf.counts["asked"] - shelf.counts["hits"], "bytes": shelf.counts["loads"] * one,
            }
        )  # fmt: skip
    return pd.DataFrame(rows).astype(np.int64)


def _itemsize(weight: Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if weight.is_floating_point() else weight.itemsize
