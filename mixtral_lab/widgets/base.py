"""What every widget shares: how its script is put together, how arrays travel, what stands there without a kernel."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import display

from mixtral_lab.config import LabError
from mixtral_lab.figures import expert_colour, text_colour
from mixtral_lab.widgets.page import write_page

MOST_STATE = 1_000_000  # bytes that a widget may keep in the notebook's file
MINUS_INFINITY, UNKNOWN, LARGEST = -32768, 32767, 32766  # 16-bit numbers that base.js reads as words


class WidgetError(LabError, traitlets.TraitError):
    """A widget was asked for something that it cannot show."""


class LabWidget(anywidget.AnyWidget):
    """A widget of this package: one class here, one plain script beside it, and `base.js` and `base.css` for all.

    A subclass names its script (`class RouterExplorer(LabWidget, script="router_explorer.js")`); a style sheet of the
    same name is added where there is one. The script sees the functions of base.js as its own and ends with
    `export default { render }`. Traits tagged `sync=True` are what the script sees, what Python can read and set, and
    what `save_html` writes into a page of its own.
    """

    colours: traitlets.List = traitlets.List(help="of every expert: its colour, and black or white for text on it").tag(
        sync=True
    )
    notice = traitlets.Unicode(help="what is missing or went wrong, in words; shown inside the widget").tag(sync=True)
    name = traitlets.Unicode(help="by which its fallback knows it").tag(sync=True)
    arrays = traitlets.Dict(help="where each array stands in `data`").tag(sync=True)
    data = traitlets.Bytes(help="numbers as bytes").tag(sync=True)

    def __init_subclass__(cls, script: str = "", **kwargs: Any) -> None:
        if script:
            here = files("mixtral_lab.widgets")
            cls._esm = here.joinpath("base.js").read_text("utf-8") + here.joinpath(script).read_text("utf-8")
            sheet = here.joinpath(script.removesuffix(".js") + ".css")
            cls._css = here.joinpath("base.css").read_text("utf-8") + (
                sheet.read_text("utf-8") if sheet.is_file() else ""
            )
        super().__init_subclass__(**kwargs)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = self.model_id or ""

    @property
    def title(self) -> str:
        """The heading of the page that `save_html` writes."""
        return type(self).__name__

    def fallback(self) -> str:
        """Plain HTML (styles inline, no script) that stands where the script cannot run."""
        raise NotImplementedError

    def colour(self, n_experts: int | None) -> None:
        """Let the script know the colours of so many experts."""
        colours = [expert_colour(expert) for expert in range(n_experts or 0)]
        self.colours = [(colour, text_colour(colour)) for colour in colours]

    def keep(self, **arrays: np.ndarray) -> None:
        """Hand the script these arrays, in place of those before; it reads them with `unpack(model)`."""
        about, data = packed(arrays)
        with self.hold_sync():
            self.arrays, self.data = about, data

    def drive(self, steps: Iterator[Any]) -> None:
        """Take the steps one by one: in turn with other messages where a kernel runs, else all at once.

        So a long answer can be watched, and stopped: `self.halt()`, or another `drive`, ends it at its next step. What
        goes wrong is said in `notice`.
        """
        self._steps: Iterator[Any] | None = steps
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            while self._one_more(steps):
                pass
        else:
            self._task = loop.create_task(self._in_turns(steps))

    def halt(self) -> None:
        self._steps = None

    async def _in_turns(self, steps: Iterator[Any]) -> None:
        while self._one_more(steps):
            await asyncio.sleep(0.001)  # the kernel reads its other messages: a click on Stop is one

    def _one_more(self, steps: Iterator[Any]) -> bool:
        if self._steps is not steps:
            close = getattr(steps, "close", None)
            if close is not None:
                close()
            return False
        try:
            next(steps)
        except StopIteration:
            return False
        except LabError as error:
            self.notice = str(error)
            return False
        return True

    def save_html(self, path: str | Path, title: str | None = None) -> Path:
        """Write the widget to one page that opens in any browser without Jupyter, Python or a network.

        What needs a model is shown as it stands now; everything else still answers. Replaces such a page but never
        another kind of file: raises `PageError`.
        """
        return write_page(
            path, self.title if title is None else title, self._esm, self._css, self.state(), self.fallback()
        )

    def state(self) -> dict[str, Any]:
        """The traits that the script sees, by name."""
        own = set(self.keys) - set(anywidget.AnyWidget().keys) - {"_esm", "_css", "_anywidget_id"}
        return {name: value for name, value in self.get_state(own).items() if not name.startswith("_")}

    def _ipython_display_(self) -> None:
        """The fallback first, and then the widget, whose script takes the fallback away.

        JupyterLab shows only one form of an output, and for a widget whose kernel is gone that would be an error message.
        """
        fallback = f'<div data-mixtral-lab-fallback="{self.model_id}">{self.fallback()}</div>'
        display({"text/html": fallback, "text/plain": self.title}, raw=True)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        name = type(self).__name__
        plain = f"{name}: run this cell to use it."
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": plain}, raw=True)


def packed(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Arrays as bytes, and for each where it starts, its shape, its kind, and what one step of it stands for.

    Whole numbers take as few bytes as they need. Others become 16-bit steps of a 32,766th of the largest: about five
    digits; not-a-number and minus infinity keep their meaning.
    """
    about: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []
    start = 0
    for name, array in arrays.items():
        step = None
        array = np.asarray(array)
        if array.dtype.kind in "bui":
            whole = array
            low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
            kind = next(k for k in ("u1", "u2", "i2", "i4") if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
        else:
            finite = np.isfinite(array)
            step = float(np.abs(array[finite]).max(initial=0)) / LARGEST or 1.0
            whole = np.round(np.where(finite, array, 0) / step)
            whole = np.where(np.isneginf(array), MINUS_INFINITY, np.where(finite, whole, UNKNOWN))
            kind = "i2"
        raw = whole.astype("<" + kind).tobytes()
        about[name] = {"kind": kind, "shape": list(array.shape), "start": start, "step": step}
        parts.append(raw)
        start += len(raw)
    return about, b"".join(parts)


def coloured_tokens(tokens: Sequence[str], experts: Sequence[int | None]) -> str:
    """A text as HTML, every token on the colour of its expert (None: no colour); safe whatever the text says."""
    spans = []
    for token, expert in zip(tokens, experts, strict=True):
        style = "padding:2px 0;border-left:1px solid #fff;"
        if expert is not None:
            colour = expert_colour(expert)
            style += f"background:{colour};color:{text_colour(colour)}"
        shown = html.escape(token.replace("␣", " "), quote=False)
        spans.append(f'<span style="{style}">{shown}</span>' + ("<br>" if "⏎" in token else ""))
    box = "font:14px/1.9 monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext"
    return f'<div style="{box}">{"".join(spans)}</div>'
