"""A trace as one web page: a single file that needs no network and no Jupyter, to look at or to send to someone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from mixtral_lab.config import LabError
from mixtral_lab.figures import FAINTEST, Decisions, decisions, expert_colour, text_colour
from mixtral_lab.trace import Trace

MARKER = "mixtral_lab.page.1"  # in a comment of the head: how a page is known again
SHADES = 8  # of an expert's colour in the map, by weight

# 16-bit numbers that the page's script reads as words.
MINUS_INFINITY, UNKNOWN, LARGEST = -32768, 32767, 32766


class PageError(LabError):
    """A page cannot be written where it was asked for."""


def trace_page(trace: Trace, title: str | None = None) -> str:
    """One HTML page with the text, every token coloured by its first-choice expert, and all decisions of all layers.

    Pointing at a token or at a cell of the map says in words what the router decided; buttons and arrow keys choose
    the layer. Without JavaScript the text and the map are still there. The page asks no server for anything.
    Raises `TraceError` for a dense model's trace.
    """
    decided = decisions(trace)
    layers, seq, choices = decided.experts.shape
    layer = (layers - 1) // 2
    template = files("mixtral_lab").joinpath("page.html").read_text("utf-8")
    about = (
        f"{trace.model}, {trace.dtype} · {_count(layers, 'layer')} of {_count(decided.n_experts, 'expert')}, "
        f"{choices} for each token · {_count(seq, 'token')}, {max(seq - trace.n_prompt, 0)} written by the model"
    )
    parts = (
        "Upper part of a cell: first choice; lower part: second."
        if choices > 1
        else "A cell has the colour of the expert chosen."
    )
    width = seq * 28
    return Template(template).substitute(
        marker=MARKER,
        script_hash=_hash(template),
        title=html.escape(_title(trace) if title is None else title),
        about=html.escape(about),
        colours="\n".join(_colours(decided.n_experts)),
        legend="".join(f"<li class=e{e}>expert {e}</li>" for e in range(decided.n_experts)),
        layers="".join(
            f'<label><input type="radio" name="layer" value="{n}"><span>{n}</span></label>' for n in range(layers)
        ),
        layer=layer,
        text=_text(trace, decided.experts[layer, :, 0]),
        rows="".join(f"<li>{_axis_label(n, layers)}</li>" for n in range(layers)),
        seq=seq,
        n_layers=layers,
        n_experts=decided.n_experts,
        height=round(layers * min(max(220 / layers, 11), 34)),
        min_width=seq * 2,
        words_width=160 if choices <= 2 else 320,
        max_width=width,
        map_label=html.escape(f"Map of {_count(seq, 'token')} by {_count(layers, 'layer')}, layer 0 at the bottom."),
        paths="\n".join(_paths(decided)),
        start=_start(trace),
        ticks=_ticks(seq),
        caption=f"A column per token, a row per layer. {parts} The fainter, the less weight."
        + (" The line marks where the model starts to write." if _start(trace) else ""),
        data=_data(trace, decided, layer),
    )


def save_page(trace: Trace, path: str | Path, title: str | None = None) -> Path:
    """Write `trace_page(trace)` to a file, replacing such a page but never another kind of file.

    Raises `PageError` if something else stands there or the folder does not exist, `TraceError` for a dense model.
    """
    path = Path(path)
    page = trace_page(trace, title)
    if path.exists() and not _is_page(path):
        raise PageError(f"{path} exists and is not a page of this package; it was left alone. Choose another name.")
    if not path.parent.is_dir():
        raise PageError(f"There is no folder {path.parent} to write {path.name} into: make it first.")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, "utf-8")
    partial.replace(path)
    return path


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f"<!-- {MARKER} -->".encode() in file.read(1000)


def _hash(template: str) -> str:
    """What the page's security policy allows to run: the template's own script, and nothing that a text brings along."""
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    digest = hashlib.sha256(script.replace("$$", "$").encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _title(trace: Trace) -> str:
    text = "".join(trace.tokens).removeprefix("<s>").translate({ord("␣"): " ", ord("⏎"): " ", ord("⇥"): " "})
    text = " ".join(text.split())
    if not text:
        return "Who reads this text?"
    return f"Who reads “{text if len(text) <= 60 else text[:59] + '…'}”?"


def _colours(n_experts: int) -> Iterator[str]:
    for expert in range(n_experts):
        colour = expert_colour(expert)
        yield f".e{expert}{{background:{colour};color:{text_colour(colour)}}}.s{expert}{{stroke:{colour}}}"
    for shade in range(SHADES):
        share = FAINTEST + (1 - FAINTEST) * (shade + 0.5) / SHADES
        yield f".o{shade}{{stroke-opacity:{share:.2f}}}"


def _text(trace: Trace, first: np.ndarray) -> str:
    """Prompt and continuation, each token in a span of its expert's class; `first` is `seq`."""
    spans = []
    for token, expert in zip(trace.tokens, first.tolist(), strict=True):
        shown = html.escape(token.replace("␣", " "), quote=False)
        spans.append(f"<span class=e{expert}>{shown}</span>" + ("<br>" if "⏎" in token else ""))
    given, written = spans[: trace.n_prompt], spans[trace.n_prompt :]
    boxes = []
    for name, part in (("Prompt", given), (f"Written by {trace.model}", written)):
        if part:
            label = html.escape(name)
            boxes.append(
                f'<h2>{label}</h2>\n<div class="tokens" role="group" aria-label="{label}">{"".join(part)}</div>'
            )
    return "\n".join(boxes)


def _paths(decided: Decisions) -> Iterator[str]:
    """The map's cells, as strokes of one length: a path for each choice, expert and shade."""
    layers, seq, choices = decided.experts.shape
    places = ((0.35, 0.6), (0.8, 0.28)) if choices > 1 else ((0.5, 0.9),)
    for choice, (middle, thickness) in enumerate(places):
        strokes: dict[tuple[int, int], list[str]] = defaultdict(list)
        weights = np.nan_to_num(decided.weights[:, :, choice], nan=1.0)
        shades = np.clip(weights * SHADES, 0, SHADES - 1).astype(int).tolist()
        experts = decided.experts[:, :, choice].tolist()
        for layer in range(layers):
            position = 0
            while position < seq:
                key = (experts[layer][position], shades[layer][position])
                end = position + 1
                while end < seq and (experts[layer][end], shades[layer][end]) == key:
                    end += 1
                strokes[key].append(f"M{position} {layers - 1 - layer}h{end - position}")
                position = end
        yield f'<g transform="translate(0 {middle})" stroke-width="{thickness}">'
        for (expert, shade), path in sorted(strokes.items()):
            yield f'<path class="s{expert} o{shade}" d="{"".join(path)}"/>'
        yield "</g>"
    if 1 < seq <= 120:  # beyond that, gaps would hide the cells
        yield f'<path id="gaps" d="{"".join(f"M{at} 0v{layers}" for at in range(1, seq))}"/>'


def _start(trace: Trace) -> str:
    if not 0 < trace.n_prompt < len(trace):
        return ""
    layers = trace.experts.shape[0]
    return f'<line id="start" x1="{trace.n_prompt}" x2="{trace.n_prompt}" y1="-0.1" y2="{layers}.1"/>'


def _axis_label(layer: int, layers: int) -> str:
    return f"layer {layer}" if layers <= 12 else str(layer) if layer % 4 == 0 else ""


def _ticks(seq: int) -> str:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if seq <= 15 * s)
    return "".join(
        f'<span style="left:{100 * at / seq:.2f}%">{"token 0" if at == 0 else at}</span>' for at in range(0, seq, step)
    )


def _packed(values: np.ndarray) -> tuple[str, float]:
    """Numbers as base64 of little-endian 16-bit integers, and the step that one of them stands for."""
    finite = np.isfinite(values)
    step = float(np.abs(values[finite]).max(initial=0)) / LARGEST or 1.0
    whole = np.round(np.where(finite, values, 0) / step)
    whole = np.where(np.isneginf(values), MINUS_INFINITY, np.where(finite, whole, UNKNOWN))
    return base64.b64encode(whole.astype("<i2").tobytes()).decode(), step


def _data(trace: Trace, decided: Decisions, layer: int) -> str:
    """All decisions as JSON, safe inside a script element."""
    weights, weight_step = _packed(decided.weights)
    logits, logit_step = _packed(decided.logits)
    small = "<u1" if decided.n_experts <= 256 else "<u2"
    data = {
        "shape": decided.experts.shape,
        "n_experts": decided.n_experts,
        "n_prompt": trace.n_prompt,
        "layer": layer,
        "ids": trace.ids.tolist(),
        "tokens": trace.tokens,
        "experts": base64.b64encode(decided.experts.astype(small).tobytes()).decode(),
        "weights": weights,
        "weight_step": weight_step,
        "logits": logits,
        "logit_step": logit_step,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
