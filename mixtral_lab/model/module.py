"""PyTorch's module, with parts that are found at once, and changes that do not go unnoticed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def as_made(part: Any, kind: type[nn.Module]) -> bool:
    """Whether a part is of this very kind, and nobody has put another `forward` in the place of its own."""
    return type(part) is kind and "forward" not in part.__dict__


_last_change = object()  # in all models together


def _changed() -> None:
    global _last_change
    _last_change = object()


def last_change() -> object:
    """The mark of the last time that something was set on a part, of whatever model. Another one each time."""
    return _last_change


def until_changed(ask: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A question to a part that is asked at every step: the answer is kept until something is set on a part of whatever model."""
    kept = f"_{ask.__name__}_until_changed"

    @functools.wraps(ask)
    def asked(part: Any) -> bool:
        at, answer = part.__dict__.get(kept, (None, False))
        if at is not _last_change:
            at = _last_change
            answer = ask(part)
            part.__dict__[kept] = at, answer  # set aside: it is no change
        return answer

    return asked


class Module(nn.Module):
    """Keeps its parts as ordinary attributes, too, and marks whenever something is set (`last_change`).

    PyTorch looks for parts only after Python has found nothing, which takes as long as a small product; one token looks for
    hundreds of them. Replace and remove a part as usual (`setattr`, `add_module`, `del`), not through `_modules`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_modules", ()) and name.isidentifier():  # a list's parts have no name
            self.__dict__[name] = value
        _changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.pop(name, None)
        _changed()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        if name.isidentifier():
            self.__dict__[name] = module
        _changed()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        _changed()


class ModuleList(Module, nn.ModuleList):
    """PyTorch's list of parts; changes do not go unnoticed."""

    def insert(self, index: int, module: nn.Module) -> None:
        super().insert(index, module)
        _changed()


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
        self._at: object = None
        self._alike = False

    def holds(self) -> bool:
        if self._where() != self._places:
            return False
        if self._at is not _last_change:
            at = _last_change
            self._alike = all(where.get(name) is value for where, name, value in self._facts) and self._also()
            self._at = at
        return self._alike

    def _where(self) -> list[int]:
        """PyTorch can move a weight without setting anything, so this is asked every time."""
        return [weight.data_ptr() for weight in self._weights]
