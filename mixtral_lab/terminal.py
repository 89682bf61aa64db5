"""How a command of ours ends when something is wrong: with one sentence, not a traceback."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from mixtral_lab.config import LabError

err = Console(stderr=True, highlight=False)


def in_one_sentence(function: Callable[..., None]) -> Callable[..., None]:
    """The same command; its deliberate errors go to stderr as a sentence, and its exit status is 1."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except LabError as error:
            err.print(Text(f"mixtral-lab: {error}", style="red"))
            raise typer.Exit(1) from None
        except BrokenPipeError:  # the reader of our output went away, as `head` does
            os._exit(0)

    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run
