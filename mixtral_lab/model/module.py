"""PyTorch's module, with parts that are found at once."""

from __future__ import annotations

from typing import Any

from torch import nn


def as_made(part: Any, kind: type[nn.Module]) -> bool:
    """Whether a part is of this very kind, and nobody has put another `forward` in the place of its own."""
    return type(part) is kind and "forward" not in part.__dict__


class Module(nn.Module):
    """Keeps its parts as ordinary attributes, too.

    PyTorch looks for them only after Python has found nothing, which takes as long as a small product; one token looks for
    hundreds of parts. Replace and remove a part as usual (`setattr`, `add_module`, `del`), not through `_modules`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_modules", ()):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.pop(name, None)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self.__dict__[name] = module
