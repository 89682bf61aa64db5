"""What every checker answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """`solved` is None while nothing was tried. In a notebook only the message is shown."""

    solved: bool | None
    message: str

    def __repr__(self) -> str:
        return {True: "Right. ", False: "Not yet. ", None: "Your turn. "}[self.solved] + self.message


def judged(got: Tensor, right: Tensor, mistakes: dict[str, Tensor], praise: str) -> Verdict:
    """A tensor beside the right one, and beside those of the usual mistakes, by what to say of each."""
    if torch.allclose(got, right, atol=1e-4):
        return Verdict(True, praise)
    for message, wrong in mistakes.items():
        if torch.allclose(got, wrong, atol=1e-4):
            return Verdict(False, message)
    return Verdict(False, f"The shape is right, the numbers are not: off by up to {(got - right).abs().max():.2g}.")
