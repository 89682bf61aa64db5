"""PyTorch's module, with parts that are found at once, and changes that do not go unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def as_made(part: Any, kind: type[nn.Module]) -> bool:
    """Whether a part is of this very kind, and nobody has put another `forward` in the place of its own."""
    return type(part) is kind and "forward" not in part.__dict__


_times_set = 0  # in all models together


def _count() -> None:
    global _times_set
    _times_set += 1


def changes() -> int:
    """How often something was set on a part, of whatever model."""
    return _times_set


class Module(nn.Module):
    """Keeps its parts as ordinary attributes, too, and counts whatever is set.

    PyTorch looks for parts only after Python has found nothing, which takes as long as a small product; one token looks for
    hundreds of them. Replace and remove a part as usual (`setattr`, `add_module`, `del`), not through `_modules`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        _count()
        super().__setattr__(name, value)
        if name in self.__dict__.get("_modules", ()) and name.isidentifier():  # a list's parts have no name
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        _count()
        super().__delattr__(name)
        self.__dict__.pop(name, None)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        _count()
        super().add_module(name, module)
        if name.isidentifier():
            self.__dict__[name] = module

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        _count()
        super().register_parameter(name, param)


class ModuleList(Module, nn.ModuleList):
    """PyTorch's list of parts; changes do not go unnoticed."""


class Embedding(Module, nn.Embedding):
    """PyTorch's table of vectors; changes do not go unnoticed."""


class Likeness:
    """How a model is now and, when it is asked later, whether it still is: its parts, their attributes, where weights lie.

    All is compared only if something was set anywhere since the last time, so it may be asked for every token. Attributes in
    `but_for` may change. `also` is asked when all else is as it was. What is set on a part that is no `Module` goes unnoticed.
    """

    def __init__(self, model: nn.Module, but_for: frozenset[str], also: Callable[[], bool]) -> None:
        self._facts = [
            (where, name, where.get(name))
            for module in model.modules()
            for where in (module.__dict__, module._parameters, module._modules)
            for name in {*where, "forward"}
            if not name.startswith("_") and name not in but_for
        ]
        self._also = also
        self._weights = list(model.parameters())
        self._places = self._where()
        self._at, self._alike = -1, False

    def holds(self) -> bool:
        if self._where() != self._places:
            return False
        if self._at != _times_set:
            self._alike = all(where.get(name) is value for where, name, value in self._facts) and self._also()
            self._at = _times_set
        return self._alike

    def _where(self) -> list[int]:
        """PyTorch can move a weight without setting anything, so this is asked every time."""
        return [weight.data_ptr() for weight in self._weights]
