"""What every checker answers."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """`solved` is None while nothing was tried. In a notebook only the message is shown."""

    solved: bool | None
    message: str

    def __repr__(self) -> str:
        return {True: "Right. ", False: "Not yet. ", None: "Your turn. "}[self.solved] + self.message
