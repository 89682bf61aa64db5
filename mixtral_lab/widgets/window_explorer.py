"""Sliding-window attention under the hand: who sees whom, a head's real pattern, reach, the rolling cache, chunked prefill."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import numpy as np
import traitlets

from mixtral_lab.config import PRESETS, Config, Preset
from mixtral_lab.lab import Lab
from mixtral_lab.trace import Trace
from mixtral_lab.widgets.base import LabWidget, WidgetError

VIEWS = ("mask", "pattern", "reach", "ring", "prefill")
SITES = ("layers.*.attention.heads.query", "layers.*.attention.heads.key")
WHOLE = 256  # tokens up to which every row of a head is sent; of longer texts, as many blocks a side are
HEADS_AT_MOST, ROWS_AT_MOST = 600_000, 400_000  # bytes: heads of a short text; exact rows of a head of a long one
TILE = 512  # rows of a pattern that are computed at once
SHOWN = 60  # tokens of the text in the fallback


def reach(layers: int, window: int | None) -> int | None:
    """How many tokens back information can travel through so many layers: `layers x (window - 1)`; None: any number.

    A token sees itself and `window - 1` before it, so each layer adds that many. The paper's estimate, `layers x window`
    (Mistral 7B, arXiv 2310.06825, section 2, Figure 1), counts one more a layer. `reach(32, 4096)` is 131040.
    """
    return layers * (window - 1) if window is not None else None if layers else 0


def layers_to_first(position: int, window: int | None) -> int | None:
    """After how many layers a position can hold something of the first token; None if no number of layers will do."""
    if window is None or window > position:
        return min(position, 1)
    return None if window == 1 else -(-position // (window - 1))


def prefill_pairs(length: int, chunk: int, window: int | None) -> int:
    """Scores computed when a text is read in chunks: each chunk's queries times the keys of the cache and its own.

    In one piece and without a window these are `length x length`. Source: Mistral 7B (section 2, Figure 3).
    """
    starts = np.arange(0, length, chunk, dtype=np.int64)
    sizes = np.minimum(chunk, length - starts)
    return int((sizes * (np.minimum(starts, length if window is None else window) + sizes)).sum())


class WindowExplorer(LabWidget, script="window_explorer.js"):
    """Sliding-window attention: the mask, a head's real pattern, reach through layers, the rolling cache, chunked prefill.

    `source` is a `Trace` (with `layers.*.attention.heads.query` and `.key`, or patterns: `lab.trace(text,
    sites=["layers.*.attention.pattern"])` records what is needed), a `Config` or `Preset`, or a `Lab` with a `text`, which
    is then traced. Every trait can be read and set; what is impossible raises `WidgetError`. `window` and `chunk` are for
    trying things out: what was recorded stays what it was. Query head `head` shares keys and values with the other heads
    of kv head `head // group`. Source: Mistral 7B (arXiv 2310.06825, section 2, Figures 1 to 3).
    """

    view = traitlets.Enum(VIEWS, "mask", help="which panel is open").tag(sync=True)
    window = traitlets.Int(None, allow_none=True, help="keys a token sees, itself included; None: all").tag(sync=True)
    chunk = traitlets.Int(1, help="tokens that chunked prefill reads at once").tag(sync=True)
    position = traitlets.Int(0, help="the selected token: the query, counted from 0").tag(sync=True)
    layer = traitlets.Int(0, help="whose pattern is shown, counted from 0").tag(sync=True)
    head = traitlets.Int(0, help="which query head's, counted from 0; kv outermost").tag(sync=True)
    length = traitlets.Int(1, help="tokens of the text; only a config's can be set").tag(sync=True)
    facts = traitlets.Dict(help="what is known of text and model").tag(sync=True)
    held = traitlets.Dict(help="of which layer and heads `data` has the pattern").tag(sync=True)
    missing = traitlets.Unicode(help="why there is no pattern to show; shown in its panel").tag(sync=True)

    def __init__(self, source: Any, text: str | None = None) -> None:
        super().__init__()
        trace, config, model = _read(source, text)
        self._trace, self._ready = trace, False
        self._overview: tuple[int, int, np.ndarray] | None = None
        self._recorded = [] if trace is None else [n for n in range(trace.n_layers) if _has_pattern(trace, n)]
        self._kv, self._group = _heads(trace, config, self._recorded)
        window = trace.window if trace is not None else config.window if config else None
        length = len(trace) if trace is not None else min(config.context, 3 * (window or 22)) if config else 1
        if not length:
            raise WidgetError("The trace has no tokens: there is nothing to show.")
        number = 4 if trace is not None and trace.dtype == "float32" else 2
        context = max(config.context if config else length, length)
        self._layers = trace.n_layers if trace is not None else config.n_layers if config else 1
        self._most = max(context if trace is None else length, window or 1)
        self.facts = {
            "tokens": [] if trace is None else list(trace.tokens),
            "n_prompt": length if trace is None else trace.n_prompt,
            "model": model,
            "dtype": "" if trace is None else trace.dtype,
            "window": window,
            "layers": self._layers,
            "recorded": self._recorded,
            "kv": self._kv,
            "group": self._group,
            "context": context,
            "most": self._most,
            "token_bytes": _token_bytes(config, trace, self._recorded, number),
            "number_bytes": number,
        }
        self.length, self.window = length, window
        self.chunk = window if window and window < length else -(-length // 3)
        self.position = length - 1
        self.layer = self._recorded[len(self._recorded) // 2] if self._recorded else 0
        if window is None:
            self.notice = (
                f"{model} has no window on record: every token sees all before it, and that is what is shown. "
                "Move the window slider to see what a window would do."
            )
        self._ready = True
        self._load()

    @property
    def title(self) -> str:
        return f"Sliding-window attention: {self.facts['model']}"

    @traitlets.validate("window", "chunk", "position", "layer", "head", "length")
    def _possible(self, proposal: Any) -> int | None:
        name, value = proposal["trait"].name, proposal["value"]
        if not self.facts or (name == "window" and value is None):
            return value
        low, high, why = {
            "window": (1, self._most, "a token sees at least itself, and None is no window"),
            "chunk": (1, self._most, "it is a number of tokens"),
            "position": (0, self.length - 1, f"the text has {_many(self.length, 'token')}"),
            "layer": (0, self._layers - 1, f"there are {_many(self._layers, 'layer')}"),
            "head": (
                0,
                max(self._kv * self._group, 1) - 1,
                f"query heads are {self._kv} x {self._group}, kv outermost",
            ),
            "length": (1, self._most, "up to the model's context")
            if self._trace is None
            else (len(self._trace), len(self._trace), "only a config's can be set"),
        }[name]
        if isinstance(value, bool) or not low <= value <= high:
            allowed = f"{low} to {high}" if low < high else f"only {low}"
            raise WidgetError(f"{name} is {value}, but it can be {allowed}: {why}.")
        return value

    @traitlets.observe("length")
    def _shorter(self, change: Any) -> None:
        if self.facts and self.position >= self.length:
            self.position = self.length - 1

    @traitlets.observe("layer", "head", "position")
    def _selected(self, change: Any) -> None:
        """Another layer or head, or a position whose row is not at hand: its pattern is sent."""
        if self._ready and self._trace is not None and not self._at_hand():
            self._load()

    def _at_hand(self) -> bool:
        held = self.held
        if held.get("layer") != self.layer or self.head not in held.get("heads", ()):
            return False
        return held["whole"] or held["first"] <= self.position <= held["last"]

    def _load(self) -> None:
        trace = self._trace
        if trace is not None and self.layer in self._recorded:
            self.missing = ""
            self._load_pattern(trace)
            return
        self.missing = (
            "A config has no text and no weights, so there is no pattern to show. "
            'Trace a text: WindowExplorer(mixtral_lab.load("mini-mistral"), text="...").'
            if trace is None
            else f"Of layer {self.layer} no pattern is on record, only of {_listed(self._recorded)}."
            if self._recorded
            else "This trace has no attention pattern, nor queries and keys of all tokens from which to compute it. Record "
            'them with lab.trace(text, sites=["layers.*.attention.pattern"]).'
        )
        with self.hold_sync():
            self.keep()
            self.held = {}

    def _load_pattern(self, trace: Trace) -> None:
        """Send the pattern of the layer's heads, as exact rows, or of a long text its blocks and the rows near `position`."""
        layer, head, seq = self.layer, self.head, len(trace)
        window = trace.window or seq
        queries = np.arange(seq) if trace.positions is None else trace.positions.numpy()
        sizes = np.minimum(queries + 1, window)
        rows, heads = range(len(queries)), [head]
        arrays: dict[str, np.ndarray] = {}
        block = 1
        if seq <= WHOLE:
            if 2 * int(sizes.sum()) * self._kv * self._group <= HEADS_AT_MOST:
                heads = list(range(self._kv * self._group))
        else:
            block = -(-seq // WHOLE)
            if self._overview is None or self._overview[:2] != (layer, head):
                self._overview = (layer, head, _blocks(trace, layer, head, queries, block))
            arrays["overview"] = self._overview[2]
            if 2 * int(sizes.sum()) > ROWS_AT_MOST:
                near, many = int(np.abs(queries - self.position).argmin()), ROWS_AT_MOST // (2 * min(seq, window))
                start = max(0, min(near - many // 2, len(queries) - many))
                rows = range(start, min(start + many, len(queries)))
        at = queries[rows.start : rows.stop]
        parts = []
        for one in heads:
            lines = zip(at, _rows(trace, layer, one, rows), strict=True)
            parts.append(np.concatenate([line[max(0, query - window + 1) : query + 1] for query, line in lines]))
        with self.hold_sync():
            self.keep(exact=np.stack(parts), queries=at, **arrays)
            self.held = {
                "layer": layer, "heads": heads, "block": block, "whole": len(rows) == len(queries),
                "first": int(at[0]), "last": int(at[-1]),
            }  # fmt: skip

    def fallback(self) -> str:
        """The text with what the selected token sees, the mask, and reach, cache and chunks in words."""
        position, window, chunk, tokens = self.position, self.window, self.chunk, self.facts["tokens"]
        first = 0 if window is None else max(0, position - window + 1)
        layers = layers_to_first(position, window)
        wide = f"a window of {window:,}" if window else "no window"
        far = reach(self._layers, window)
        seen = f"tokens {first:,} to {position:,}" if first < position else f"token {position:,}"
        lines = [
            f"<b>{html.escape(self.facts['model'])}</b>, {wide}: token {position:,}"
            + (f" “{html.escape(_short(tokens[position]))}”" if tokens else "")
            + f" sees {seen}, {_many(position - first + 1, 'key')}, itself included.",
            f"Through {_many(self._layers, 'layer')} information travels "
            + (f"up to {far:,} tokens back" if far is not None else "from any token before")
            + (
                f"; the first token is within reach after {_many(layers, 'layer')}."
                if layers is not None
                else "; the first token is never within reach."
            ),
            f"The rolling cache keeps token {position:,} in slot {position % window:,} ({position:,} mod {window:,})"
            + (f", where token {position - window:,} was." if position >= window else ".")
            if window
            else "Without a window the cache keeps every token.",
            f"Read in chunks of {chunk:,}, the text of {_many(self.length, 'token')} needs "
            f"{prefill_pairs(self.length, chunk, window):,} scores a head instead of {self.length**2:,}.",
        ]
        if self.facts["token_bytes"]:
            kept = min(position + 1, window or position + 1)
            lines.append(
                f"Keys and values take {kept * self.facts['token_bytes']:,} bytes then, without a window "
                f"{(position + 1) * self.facts['token_bytes']:,}."
            )
        return (
            '<div style="font:14px/1.5 sans-serif">'
            + _text(tokens, position, first)
            + '<div style="display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start">'
            + _mask(self.length, position, window)
            + '<div style="flex:1;min-width:280px">'
            + "".join(f'<p style="margin:0 0 6px">{line}</p>' for line in lines)
            + self._weights()
            + "</div></div></div>"
        )

    def _weights(self) -> str:
        """The keys that the selected token looks at most, as a table."""
        trace = self._trace
        if trace is None or self.layer not in self._recorded:
            return f'<p style="margin:0"><i>{html.escape(self.missing)}</i></p>'
        queries = np.arange(len(trace)) if trace.positions is None else trace.positions.numpy()
        if self.position not in queries:
            return ""
        row = int(np.flatnonzero(queries == self.position)[0])
        weights = _rows(trace, self.layer, self.head, range(row, row + 1))[0]
        best = [int(key) for key in np.argsort(-weights, kind="stable")[:8] if weights[key] > 0]
        cells = "".join(
            f'<tr><td style="text-align:right">{key:,}</td><td>{html.escape(_short(trace.tokens[key]))}</td>'
            f'<td style="text-align:right">{weights[key]:.1%}</td></tr>'
            for key in best
        )
        return (
            '<table style="border-spacing:8px 0"><caption style="text-align:left;white-space:nowrap">'
            f"Layer {self.layer}, head {self.head}, as recorded: what token {self.position:,} looks at most</caption>"
            f"<tr><th>key</th><th>token</th><th>weight</th></tr>{cells}</table>"
        )


def _read(source: Any, text: str | None) -> tuple[Trace | None, Config | None, str]:
    """The trace and the config that a source holds, and the model's name."""
    if isinstance(source, Lab):
        if text is None:
            raise WidgetError('A lab was given without a text to read: WindowExplorer(lab, text="Once upon a time").')
        return source.trace(text, sites=SITES), source.config, source.name
    if text is not None:
        raise WidgetError(f"text goes with a lab, but {type(source).__name__} was given: it has its own text, or none.")
    if isinstance(source, Trace):
        known = PRESETS.get(source.model)
        return source, known.config if known and known.config.n_layers == source.n_layers else None, source.model
    if isinstance(source, Preset):
        return None, source.config, source.title
    if isinstance(source, Config):
        return None, source, next((one.title for one in PRESETS.values() if one.config == source), "This config")
    raise WidgetError(f"A Trace, a Config, or a Lab with a text can be shown, but {type(source).__name__} was given.")


def _has_pattern(trace: Trace, layer: int) -> bool:
    stem = f"layers.{layer}.attention"
    query, key = trace.recorded.get(f"{stem}.heads.query"), trace.recorded.get(f"{stem}.heads.key")
    both = query is not None and key is not None and key.shape[1] == len(trace)
    return f"{stem}.pattern" in trace.recorded or both


def _heads(trace: Trace | None, config: Config | None, recorded: list[int]) -> tuple[int, int]:
    """How many kv heads there are, and how many query heads share each; 0 and 0 if nobody knows."""
    if trace is not None and recorded:
        stem = f"layers.{recorded[0]}.attention"
        value = trace.recorded.get(f"{stem}.pattern", trace.recorded.get(f"{stem}.heads.query"))
        if value is not None:
            return value.shape[0], value.shape[1]
    return (config.n_kv_heads, config.group) if config else (0, 0)


def _token_bytes(config: Config | None, trace: Trace | None, recorded: list[int], number: int) -> int:
    """Bytes of one token's keys and values in all layers, by `Config.cache_bytes`; 0 if the shape is not known."""
    if config is None and trace is not None and recorded:
        key = trace.recorded.get(f"layers.{recorded[0]}.attention.heads.key")
        if key is not None:
            kv, head_dim = key.shape[0], key.shape[2]
            config = Config(kv * head_dim, trace.n_layers, kv, kv, head_dim, hidden=1, vocab=1, context=len(trace))
    return config.cache_bytes(1, number) if config else 0


def _rows(trace: Trace, layer: int, head: int, rows: range) -> np.ndarray:
    """These of the recorded rows of one head's pattern: `query key`, computed from queries and keys if it must be."""
    stem = f"layers.{layer}.attention"
    if f"{stem}.pattern" in trace.recorded:
        pattern = trace.recorded[f"{stem}.pattern"]
        kv, group = divmod(head, pattern.shape[1])
        return pattern[kv, group, rows.start : rows.stop].float().numpy()
    query, key = trace.recorded[f"{stem}.heads.query"], trace.recorded[f"{stem}.heads.key"]
    kv, group = divmod(head, query.shape[1])
    positions = trace.positions
    if positions is None:
        positions = trace.ids.new_tensor(range(len(trace)))
    alone = {
        f"{stem}.heads.query": query[kv : kv + 1, group : group + 1, rows.start : rows.stop].float(),
        f"{stem}.heads.key": key[kv : kv + 1].float(),
    }
    part = replace(trace, positions=positions[rows.start : rows.stop], recorded=alone)
    return part[f"{stem}.pattern"][0, 0].numpy()


def _blocks(trace: Trace, layer: int, head: int, queries: np.ndarray, block: int) -> np.ndarray:
    """The largest weight in each block of `block x block` tokens, not-a-number where nothing was recorded."""
    seq = len(trace)
    count = -(-seq // block)
    overview = np.full((count, count), np.nan, np.float32)
    for start in range(0, len(queries), TILE):
        rows = range(start, min(start + TILE, len(queries)))
        best = np.maximum.reduceat(_rows(trace, layer, head, rows), np.arange(0, seq, block), axis=1)
        np.fmax.at(overview, queries[rows.start : rows.stop] // block, best)
    return overview


def _text(tokens: list[str], position: int, first: int) -> str:
    """The tokens around the selected one, with what it sees coloured."""
    if not tokens:
        return ""
    start = max(0, min(position - SHOWN + 10, len(tokens) - SHOWN))
    spans = []
    for at in range(start, min(start + SHOWN, len(tokens))):
        colour = "#542788;color:#fff" if at == position else "#d8caee;color:#000" if first <= at < position else "none"
        shown = html.escape(_short(tokens[at], 40).replace("␣", " "), quote=False)
        spans.append(f'<span style="background:{colour};border-left:1px solid #fff;padding:1px 0">{shown}</span>')
    box = "font:14px/1.8 monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;margin:0 0 8px"
    cut = (
        f" <i>(tokens {start:,} to {start + len(spans) - 1:,} of {len(tokens):,})</i>"
        if start or len(tokens) > SHOWN
        else ""
    )
    return f'<div style="{box}">{"".join(spans)}{cut}</div>'


def _mask(length: int, position: int, window: int | None) -> str:
    """The mask as a picture: queries downwards, keys to the right, what is seen in colour, the selected row dark."""
    side = 220
    step, wide = side / length, min(window or length, length)
    if length > 400:  # too fine for stairs
        shape = [(0.0, 0.0), (side, side), (side - wide * step, side), (0.0, wide * step)]
    else:
        right = [(step * (q + 1), step * at) for q in range(length) for at in (q, q + 1)]
        left = [(step * max(0, q - wide + 1), step * at) for q in reversed(range(length)) for at in (q + 1, q)]
        shape = right + left
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape)
    first = max(0, position - wide + 1)
    row = (
        f'<rect x="{first * step:.1f}" y="{position * step:.1f}" width="{max((position - first + 1) * step, 1):.1f}" '
        f'height="{max(step, 1.5):.1f}" fill="#542788"/>'
    )
    return (
        f'<svg viewBox="0 0 {side} {side + 18}" width="{side}" height="{side + 18}" role="img" aria-label="the mask">'
        f'<rect width="{side}" height="{side}" fill="#f1f3f5"/><polygon points="{points}" fill="#c3b1e1"/>{row}'
        f'<text x="0" y="{side + 14}" font-size="12" fill="#777777">queries downwards, keys to the right</text></svg>'
    )


def _short(token: str, most: int = 24) -> str:
    return token if len(token) <= most else token[: most - 1] + "…"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _listed(layers: list[int]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))
