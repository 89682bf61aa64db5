"""Every router's decision on every token, to look into: one text, or two side by side."""

from __future__ import annotations

import html
import json
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import traitlets

from mixtral_lab.analysis.certainty import NEAR_TIE
from mixtral_lab.figures import FAINTEST, expert_colour, text_colour
from mixtral_lab.trace import Trace
from mixtral_lab.widgets.base import LabWidget, WidgetError, coloured_tokens, packed
from mixtral_lab.widgets.page import write_page
from mixtral_lab.widgets.recorded import Recorded, comparison, differing, recorded

MOST_SENT = 930_000  # bytes of a trace in a notebook's file; the rest of its state is small
MOST_IN_PAGE = 30_000_000  # the same in a page of its own
MOST_TOKENS = 8192  # shown at a time
SHADES = 8  # of an expert's colour in the fallback's map, by weight
STILL, STILL_IN_PAGE = (200, 32_000), (4_096, 1_000_000)  # most tokens, and most bytes of the map, of the fallback


class Chosen(traitlets.TraitType[Any, Any]):
    """A whole number within the widget's limit of such; also None where `nothing` is true."""

    def __init__(self, what: str, nothing: bool = False, **kwargs: Any) -> None:
        super().__init__(None if nothing else 0, allow_none=nothing, **kwargs)
        self.what, self.nothing = what, nothing

    def validate(self, obj: Any, value: Any) -> int:
        limit = obj._limits[self.what]
        try:
            found = operator.index(value)
        except TypeError:
            found = -1
        if not 0 <= found < limit or isinstance(value, bool):
            allowed = f"0 to {limit - 1}" if limit else "none, as there are no experts"
            nothing = ", or None for no expert" if self.nothing else ""
            raise WidgetError(f"There is no {self.what} {value!r}: {self.what}s are numbered {allowed}{nothing}.")
        return found


class RouterExplorer(LabWidget, script="router_explorer.js"):
    """A text as tokens, all decisions of all routers as a grid, and one decision in full; of one trace, or of two.

    `other` is a second prompt, or the same after an edit; `names` say which is which. Decisions whose chosen experts
    differ are marked, by position. `selected_token`, `selected_layer`, `selected_expert` (None: none) and `search` (a word)
    can be read and set. What a trace lacks is said inside. Where a trace would take more than 1 MB of a notebook,
    the logits of a decision are fetched from Python when it is chosen, and of a very long text a part is shown at a
    time: the one with `selected_token`. Raises `WidgetError` for traces of different depth, or one without tokens.
    """

    selected_token = Chosen("token", help="position in the text").tag(sync=True)
    selected_layer = Chosen("layer").tag(sync=True)
    selected_expert = Chosen("expert", nothing=True).tag(sync=True)
    search = traitlets.Unicode(help="what to mark in the text; upper or lower case").tag(sync=True)
    panes: traitlets.List = traitlets.List(help="of each trace: its text and what it is").tag(sync=True)
    part: traitlets.Dict = traitlets.Dict(help="which tokens are shown, and whether with logits").tag(sync=True)
    comparison = traitlets.Unicode(help="how two traces differ, in words").tag(sync=True)
    length = traitlets.Int(help="tokens of the longer text").tag(sync=True)
    n_layers = traitlets.Int().tag(sync=True)
    n_experts = traitlets.Int().tag(sync=True)
    near_tie = traitlets.Float(NEAR_TIE, help="a margin below this is a near-tie").tag(sync=True)

    def __init__(self, trace: Trace, other: Trace | None = None, names: Sequence[str] = ("first", "second")) -> None:
        if len(names) != 2:
            raise WidgetError(f"names are {list(names)}: give two, for the first trace and the other.")
        self._traces = (trace,) if other is None else (trace, other)
        for one in self._traces:
            if not isinstance(one, Trace):
                raise WidgetError(f"RouterExplorer shows a Trace, such as lab.trace(text) gives; this is {one!r}.")
        self._names = (str(names[0]), str(names[1]))
        if other is not None and other.n_layers != trace.n_layers:
            raise WidgetError(
                f"The traces have {trace.n_layers} and {other.n_layers} layers: compare two of the same depth."
            )
        self._recorded = tuple(recorded(one) for one in self._traces)
        n_experts = max(one.n_experts for one in self._recorded)
        self._limits = {"token": max(map(len, self._traces)), "layer": trace.n_layers, "expert": n_experts}
        token = min(1, min(map(len, self._traces)) - 1)  # what comes first is often a mark of the start
        said = "" if other is None else comparison(self._traces, self._recorded, self._names)
        super().__init__(
            length=self._limits["token"],
            n_layers=trace.n_layers,
            n_experts=n_experts,
            selected_token=token,
            selected_layer=(trace.n_layers - 1) // 2,
            comparison=said,
            notice=self._lacks(),
            **self._fitting(MOST_SENT, token),
        )
        self.colour(n_experts)
        self.observe(self._follow, "selected_token")
        self.on_msg(self._answer)

    @property
    def title(self) -> str:
        texts = [f"“{_quoted(trace)}”" for trace in self._traces]
        if not any(text.strip("“”") for text in texts):
            return "Who reads this text?"
        if len(texts) == 2 and texts[0] == texts[1]:
            return f"Who reads {texts[0]}, {self._names[0]} and {self._names[1]}?"
        return f"Who reads {' and '.join(texts)}?"

    def save_html(self, path: str | Path, title: str | None = None) -> Path:
        """Write one page that opens in any browser without Jupyter, Python or a network, and answers every click.

        It holds all numbers of all decisions, up to 30 MB. Replaces such a page but never another kind of file:
        raises `PageError`.
        """
        state = self.state() | self._fitting(MOST_IN_PAGE, self.selected_token)
        still = self._still(*STILL_IN_PAGE)
        return write_page(path, self.title if title is None else title, self._esm, self._css, state, still)

    def fallback(self) -> str:
        return self._still(*STILL)

    # What the script gets

    def _follow(self, change: Any) -> None:
        if not self.part["start"] <= change["new"] < self.part["stop"]:
            with self.hold_sync():
                for name, value in self._fitting(MOST_SENT, change["new"]).items():
                    setattr(self, name, value)

    def _fitting(self, most: int, token: int) -> dict[str, Any]:
        """As much as `most` bytes hold: everything; else without logits; else also fewer tokens, `token` among them."""
        length = self._limits["token"]
        for whole in (True, False):
            if length <= MOST_TOKENS and self._size(0, length, whole) <= most:
                return self._of_part(0, length, whole)
        n = min(length, MOST_TOKENS)
        while True:
            start = (token // n) * n
            stop = min(start + n, length)
            if n == 1 or self._size(start, stop, whole=False) <= most:
                return self._of_part(start, stop, whole=False)
            n = max(n * 9 // 10, 1)

    def _size(self, start: int, stop: int, whole: bool) -> int:
        """Bytes that such a part takes, tokens included."""
        size = 0
        for trace, found in zip(self._traces, self._recorded, strict=True):
            layers, seq, choices = found.experts.shape
            for_experts = 1 if found.n_experts <= 256 and found.known.all() else 2
            for_logits = 2 * found.n_experts if whole and found.logits is not None else 0
            for_weights = 0 if found.weights is None else 2
            each = layers * (choices * (for_experts + for_weights) + for_logits + 0.25)
            size += int(max(min(stop, seq) - start, 0) * each)
            size += len(json.dumps(self._text(trace, start, stop), ensure_ascii=False).encode())
        return size

    def _text(self, trace: Trace, start: int, stop: int) -> dict[str, list]:
        ids = trace.ids[start:stop].tolist()
        return {"tokens": list(trace.tokens[start:stop]), "ids": [] if set(ids) <= {-1} else ids}

    def _of_part(self, start: int, stop: int, whole: bool) -> dict[str, Any]:
        """The traits that hold tokens `start` to `stop`, with logits if `whole`."""
        panes, arrays = [], {}
        for at, (trace, found) in enumerate(zip(self._traces, self._recorded, strict=True)):
            part = np.s_[:, start:stop]
            arrays[f"experts{at}"] = found.experts[part]
            arrays[f"near_ties{at}"] = np.packbits(found.near_ties[part])
            if found.weights is not None:
                arrays[f"weights{at}"] = found.weights[part]
            if whole and found.logits is not None:
                arrays[f"logits{at}"] = found.logits[part]
            panes.append(
                {
                    "name": self._names[at] if len(self._traces) > 1 else "",
                    "about": _about(trace, found),
                    "model": trace.model,
                    "length": len(trace),
                    "n_prompt": trace.n_prompt,
                    "has_logits": found.logits is not None,
                    **self._text(trace, start, stop),
                }
            )
        if len(self._traces) > 1:
            _, differs = differing(*self._recorded)
            arrays["differs"] = np.packbits(differs[:, start:stop])
        about, data = packed(arrays)
        return {
            "panes": panes, "part": {"start": start, "stop": stop, "whole": whole}, "arrays": about, "data": data,
        }  # fmt: skip

    def _answer(self, _: Any, content: Any, buffers: Any) -> None:
        """Send the logits of one token, `layer expert`; not-a-number if unknown."""
        token = content.get("token") if isinstance(content, dict) else None
        if not isinstance(token, int) or not 0 <= token < self.length:
            return
        for at, found in enumerate(self._recorded):
            if token < found.experts.shape[1] and found.logits is not None:
                logits = np.ascontiguousarray(found.logits[:, token], "<f4")
                self.send({"token": token, "pane": at, "width": logits.shape[1]}, [logits.tobytes()])

    def _lacks(self) -> str:
        said = []
        for name, found in zip(self._names, self._recorded, strict=False):
            lacks = " ".join(found.lacks)
            said.append(f"“{name}”: {lacks}" if lacks and len(self._traces) > 1 else lacks)
        return " ".join(filter(None, said))

    # What stands there without a script

    def _still(self, tokens: int, most: int) -> str:
        share = len(self._traces)
        stills = zip(self._names, self._traces, self._recorded, strict=False)
        parts = [
            _still(trace, found, self.selected_layer, tokens // share, most // share, name if share > 1 else "")
            for name, trace, found in stills
        ]
        said = "".join(f"<p>{html.escape(text)}</p>" for text in (self.comparison, self.notice) if text)
        return said + "".join(parts)


def _quoted(trace: Trace) -> str:
    text = "".join(trace.tokens).removeprefix("<s>").translate({ord("␣"): " ", ord("⏎"): " ", ord("⇥"): " "})
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _about(trace: Trace, found: Recorded) -> str:
    layers, seq, choices = found.experts.shape
    experts = f" of {_count(found.n_experts, 'expert')}, {choices} for each token" if choices else ""
    written = max(seq - trace.n_prompt, 0)
    return (
        f"{trace.model}, {trace.dtype} · {_count(layers, 'layer')}{experts} · {_count(seq, 'token')}, "
        f"{written:,} written by the model"
    )


def _still(trace: Trace, found: Recorded, layer: int, tokens: int, most: int, name: str) -> str:
    """One trace as HTML: what it is, its text coloured at one layer, and the map of all layers as SVG."""
    seq, choices = found.experts.shape[1:]
    first = [None] * seq if not choices else [None if e < 0 else e for e in found.experts[layer, :, 0].tolist()]
    colours = sorted({expert for expert in first[:tokens] if expert is not None})
    legend = " ".join(map(_square, colours[:24])) + (" …" if len(colours) > 24 else "")
    parts = [
        f"<h3>{html.escape(name)}</h3>" if name else "",
        f"<p>{html.escape(_about(trace, found))}</p>",
        f"<p>Experts that are first choice in layer {layer}: {legend}</p>" if choices else "",
        coloured_tokens(trace.tokens[:tokens], first[:tokens]),
        f"<p>The first {tokens:,} of {seq:,} tokens.</p>" if seq > tokens else "",
    ]
    if choices:
        parts.append(_still_map(trace, found, most))
    return "\n".join(filter(None, parts))


def _square(expert: int) -> str:
    colour = expert_colour(expert)
    style = f"background:{colour};color:{text_colour(colour)};border-radius:4px;padding:1px 7px"
    return f'<span style="{style}">{expert}</span>'


def _still_map(trace: Trace, found: Recorded, most: int) -> str:
    """The grid as SVG: a column per token, a row per layer, layer 0 at the bottom; cells in at most so many bytes."""
    layers, seq, choices = found.experts.shape
    shown = max(min(seq, most // (6 * layers * min(choices, 2))), 1)
    while len(cells := "".join(_strokes(found, shown))) > most and shown > 1:
        shown = shown * 4 // 5
    height = round(layers * min(max(220 / layers, 11), 34))
    label = html.escape(f"Map of {_count(shown, 'token')} by {_count(layers, 'layer')}, layer 0 at the bottom.")
    start = ""
    if 0 < trace.n_prompt < shown:
        start = (
            f'<line x1="{trace.n_prompt}" x2="{trace.n_prompt}" y1="0" y2="{layers}" stroke="currentColor" '
            'stroke-width="2" vector-effect="non-scaling-stroke"/>'
        )
    parts = "Upper part of a cell: first choice; lower part: second. " if choices > 1 else ""
    caption = f"A column per token, a row per layer, layer 0 at the bottom. {parts}The fainter, the less weight."
    if shown < seq:
        caption += f" The first {shown:,} of {seq:,} tokens."
    return (
        f'<svg viewBox="0 0 {shown} {layers}" preserveAspectRatio="none" role="img" aria-label="{label}" '
        f'shape-rendering="crispEdges" style="display:block;width:100%;max-width:{shown * 28}px;height:{height}px;margin-top:8px">'
        f"{cells}{start}</svg><p>{caption}</p>"
    )


def _strokes(found: Recorded, shown: int) -> Iterator[str]:
    """The map's cells, as strokes of one length: a path for each choice, expert and shade."""
    layers, _, choices = found.experts.shape
    places = ((0.35, 0.6), (0.8, 0.28)) if choices > 1 else ((0.5, 0.9),)
    for choice, (middle, thickness) in enumerate(places):
        strokes: dict[tuple[int, int], list[str]] = defaultdict(list)
        experts = found.experts[:, :shown, choice].tolist()
        weights = np.ones((layers, shown)) if found.weights is None else found.weights[:, :shown, choice]
        shades = np.clip(np.nan_to_num(weights, nan=1.0) * SHADES, 0, SHADES - 1).astype(int).tolist()
        for layer in range(layers):
            cells = list(zip(experts[layer], shades[layer], strict=True))
            position = 0
            while position < shown:
                end = position + 1
                while end < shown and cells[end] == cells[position]:
                    end += 1
                if cells[position][0] >= 0:
                    strokes[cells[position]].append(f"M{position} {layers - 1 - layer}h{end - position}")
                position = end
        yield f'<g transform="translate(0 {middle})" stroke-width="{thickness}">'
        for (expert, shade), path in sorted(strokes.items()):
            opacity = FAINTEST + (1 - FAINTEST) * (shade + 0.5) / SHADES
            yield f'<path stroke="{expert_colour(expert)}" stroke-opacity="{opacity:.2f}" d="{"".join(path)}"/>'
        yield "</g>"
