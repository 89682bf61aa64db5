"""Which experts of a layer to keep at hand, when there is room for some of them only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from mixtral_lab.config import LabError


class ExpertCacheError(LabError, ValueError):
    """A cache cannot be made with such a capacity."""


class Found(NamedTuple):
    """Where the experts of one step were: in the cache, in the buffers for guessed ones, or not at hand."""

    resident: list[int]
    staged: list[int]
    missing: list[int]


class LRU:
    """The cache of one layer: it keeps `capacity` experts, and the least recently used one makes room.

    `touch` is one use of one expert. `use` is a step that needs several; `stage` fetches guessed ones beforehand.
    Source: Fast Inference of Mixture-of-Experts Language Models with Offloading (arXiv 2312.17238, section 3).
    Raises `ExpertCacheError` for a capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ExpertCacheError(f"A cache of {capacity} experts cannot run any: the capacity must be 1 or more.")
        self.capacity = capacity
        self._resident: dict[int, None] = {}  # in order of last use
        self._staged: tuple[int, ...] = ()

    @property
    def resident(self) -> tuple[int, ...]:
        """The experts in the cache, the least recently used first."""
        return tuple(self._resident)

    def touch(self, expert: int) -> bool:
        """Use one expert; whether it was in the cache. If not, it is now, and another may have made room.

        With a capacity of 2, touching 0, 1, 0, 2, 1 gives no, no, yes, no, no: 2 puts 1 out, not 0.
        """
        hit = expert in self._resident
        if hit:
            del self._resident[expert]
        elif len(self._resident) == self.capacity:
            del self._resident[self._next_to_go()]
        self._resident[expert] = None
        return hit

    def use(self, experts: Iterable[int]) -> Found:
        """Use all experts that one step needs, each once, and say where each was found.

        Those at hand are used first, so that none of them makes room for another of the same step. A staged expert
        that is used moves into the cache; the other staged ones are forgotten.
        """
        found = Found([], [], [])
        for expert in dict.fromkeys(experts):
            part = (
                found.resident
                if expert in self._resident
                else found.staged
                if expert in self._staged
                else found.missing
            )
            part.append(expert)
        for part in found:
            for expert in part:
                self.touch(expert)
        self._staged = ()
        return found

    def stage(self, experts: Iterable[int]) -> list[int]:
        """Fetch guessed experts into buffers beside the cache, until the next `use`; nothing leaves the cache for them.

        Returns those that had to be fetched: the others were in the cache. Source: arXiv 2312.17238, section 3
        (speculative expert loading).
        """
        self._staged = tuple(expert for expert in dict.fromkeys(experts) if expert not in self._resident)
        return list(self._staged)

    def _next_to_go(self) -> int:
        return next(iter(self._resident))


class LFU(LRU):
    """The same, but the least frequently used expert makes room, of several the least recently used one.

    Uses are counted from the beginning of the text, also those of experts that left the cache in between.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: Counter[int] = Counter()

    def touch(self, expert: int) -> bool:
        """Use one expert; whether it was in the cache.

        With a capacity of 2, touching 0, 0, 1, 2, 0 gives no, yes, no, no, yes: 2 puts 1 out, which was used once.
        """
        hit = super().touch(expert)
        self._uses[expert] += 1
        return hit

    def _next_to_go(self) -> int:
        return min(self._resident, key=self._uses.__getitem__)
