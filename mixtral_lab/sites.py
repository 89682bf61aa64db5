"""Every value inside the model that has a name: which there are, what shape they have, and how to record them.

A site is an ordinary submodule of the model, so `model.get_submodule(name)` finds it and PyTorch's own forward hooks
see and change what passes. Sites appear in the order in which a token meets them.
"""

from __future__ import annotations

import difflib
import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_lab.config import Config, LabError
from mixtral_lab.model import Transformer
from mixtral_lab.model.attention import visible


class SiteError(LabError, ValueError):
    """A site was asked for that the model does not have."""


@dataclass(frozen=True)
class Site:
    """A named value. `axes` are those of the model, `batch` first; a trace of one text lacks `batch`."""

    name: str
    axes: str
    what: str

    @property
    def seq(self) -> int:
        """Which axis runs over the positions of the text, `batch` not counted."""
        axes = self.axes.split()
        return axes.index("query" if "query" in axes else "seq") - 1

    def shape(self, config: Config, seq: int, n_positions: int | None = None) -> tuple[int, ...]:
        """The shape in a trace of `seq` tokens, of which `n_positions` are kept (all, if not given)."""
        kept = seq if n_positions is None else n_positions
        sizes = {
            "seq": kept, "query": kept, "key": seq, "dim": config.dim, "hidden": config.hidden, "vocab": config.vocab,
            "kv": config.n_kv_heads, "group": config.group, "head_dim": config.head_dim,
            "expert": config.n_experts or 0, "choice": config.n_choices or 0,
        }  # fmt: skip
        return tuple(sizes[axis] for axis in self.axes.split()[1:])


EVERY_LAYER = (
    Site("residual.before", "batch seq dim", "the residual stream as the layer finds it"),
    Site("attention.heads.query", "batch kv group seq head_dim", "queries, after rotation"),
    Site("attention.heads.key", "batch kv seq head_dim", "keys, after rotation, as the cache keeps them"),
    Site("attention.heads.value", "batch kv seq head_dim", "values, as the cache keeps them"),
    Site("attention.scores", "batch kv group query key", "how well queries match keys, before the mask"),
    Site("attention.pattern", "batch kv group query key", "what share of its attention a query gives each key"),
    Site("attention.heads.out", "batch kv group seq head_dim", "what each head gathered, before the output matrix"),
    Site("attention.output", "batch seq dim", "what attention adds to the residual stream"),
    Site("residual.between", "batch seq dim", "the residual stream after attention"),
)
SPARSE_LAYER = (
    Site("router.logits", "batch seq expert", "how much each expert wants the token"),
    Site("router.experts", "batch seq choice", "the chosen experts, best first"),
    Site("router.weights", "batch seq choice", "the chosen experts' weights, which sum to 1"),
    Site("experts.hidden", "batch seq choice hidden", "inside each chosen expert: silu(gate) times up"),
    Site("experts.out", "batch seq choice dim", "each chosen expert's answer"),
    Site("experts.weighted", "batch seq choice dim", "the same times its weight: the expert's contribution"),
    Site("experts", "batch seq dim", "what the mixture adds to the residual stream"),
)
DENSE_LAYER = (
    Site("feed_forward.hidden", "batch seq hidden", "inside the feed-forward: silu(gate) times up"),
    Site("feed_forward", "batch seq dim", "what the feed-forward adds to the residual stream"),
)
LAST_IN_LAYER = (Site("residual.after", "batch seq dim", "the residual stream as the layer leaves it"),)
FIRST = (Site("embed", "batch seq dim", "each token's vector"),)
LAST = (
    Site("final_norm", "batch seq dim", "the residual stream after the last norm, as the unembedding reads it"),
    Site("logits", "batch seq vocab", "the score of every possible next token"),
)
ROUTING = ("router.logits", "router.experts", "router.weights")
QUERIES_AND_KEYS = ("attention.heads.query", "attention.heads.key")
COMPUTED = {  # by a trace, when they are asked for, and from what
    "attention.scores": QUERIES_AND_KEYS,
    "attention.pattern": QUERIES_AND_KEYS,
    "experts.weighted": ("experts.out", "router.weights"),
}


def all_sites(config: Config) -> dict[str, Site]:
    """Every site of a model, by name, in the order in which a token meets them."""
    layer = (*EVERY_LAYER, *(DENSE_LAYER if config.n_experts is None else SPARSE_LAYER), *LAST_IN_LAYER)
    layers = [
        Site(f"layers.{number}.{one.name}", one.axes, one.what) for number in range(config.n_layers) for one in layer
    ]
    return {one.name: one for one in (*FIRST, *layers, *LAST)}


def resolve(config: Config, patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that any of the patterns match, such as `layers.*.router.logits`, in the order of `all_sites`.

    None stands for every router's decisions. Raises `SiteError` for a pattern that matches nothing, with the nearest names.
    """
    if patterns is None:
        patterns = ["layers.*." + one for one in ROUTING] if config.n_experts else []
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    known = list(all_sites(config))
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise SiteError(_unknown(config, pattern, known))
    return tuple(name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _unknown(config: Config, pattern: str, known: list[str]) -> str:
    other = DENSE_LAYER if config.n_experts else SPARSE_LAYER
    _, _, inner = pattern.partition(".")[2].partition(".")
    if inner in {one.name for one in other}:
        kind = "a mixture of experts" if config.n_experts else "a dense model"
        return f"There is no site {pattern!r}: this is {kind}."
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"There is no site {pattern!r} in this model.{hint} Its layers are 0 to {config.n_layers - 1}; "
        "`lab.sites` lists all names, and * stands for any part of one, as in layers.*.router.logits."
    )


@dataclass
class Cost:
    """What recording takes, in bytes, by site."""

    by_site: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.by_site.values())

    def __repr__(self) -> str:
        largest = sorted(self.by_site.items(), key=lambda item: -item[1])[:3]
        most = "; ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in largest)
        return f"Cost({self.bytes / 1e6:,.2f} MB for {len(self.by_site)} sites; most: {most})"


def cost(config: Config, names: Sequence[str], seq: int, n_positions: int | None, bytes_per_number: int) -> Cost:
    """Bytes that recording the named sites of one text of `seq` tokens takes.

    Scores and patterns of all positions take nothing but the queries and keys they are computed from; experts'
    contributions, nothing but answers and weights.
    """
    table = all_sites(config)
    by_site: dict[str, int] = {}
    for name in kept_for(names, whole=n_positions is None):
        size = 8 if name.endswith("router.experts") else bytes_per_number
        numbers = 1
        for length in table[name].shape(config, seq, n_positions):
            numbers *= length
        by_site[name] = numbers * size
    return Cost(by_site)


def source_of(name: str) -> tuple[str, ...]:
    """The sites that a trace computes this one from; none if it must be recorded itself."""
    inner = name.split(".", 2)[-1]
    return tuple(name.removesuffix(inner) + source for source in COMPUTED.get(inner, ()))


def kept_for(names: Sequence[str], whole: bool = True, changed: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The sites to keep so that all the named ones can be given: others stand for those that are `COMPUTED`.

    Queries and keys stand for scores and patterns only where the `whole` text is kept, for they need every key. Nothing stands
    for those that an edit `changed`: they are kept themselves, also unnamed ones that the kept others would give wrongly.
    """
    kept: dict[str, None] = {}
    for name in names:
        sources = source_of(name)
        if not sources or name in changed or (name.rpartition(".")[2] in ("scores", "pattern") and not whole):
            kept[name] = None
        else:
            kept |= dict.fromkeys(sources)
    kept |= {name: None for name in sorted(changed) if kept.keys() >= set(source_of(name))}
    return tuple(kept)


@dataclass
class Recorder:
    """What `recording` collects: for each site, what passed in each call, in order."""

    config: Config
    names: tuple[str, ...]
    calls: dict[str, list[Tensor]] = field(default_factory=dict)
    seq: int = 0  # positions fed so far

    def values(self, row: int = 0) -> dict[str, Tensor]:
        """All calls end to end for one row of the batch, on the CPU, by site.

        Scores and patterns have the keys of the whole text: 0 (scores: -inf) where a query could not see.
        """
        table = all_sites(self.config)
        found = {}
        for name in self.names:
            calls = [call[row] for call in self.calls.get(name, ())]
            if table[name].axes.endswith("key"):
                calls = [F.pad(call, (0, self.seq - call.shape[-1]), value=_unseen(name)) for call in calls]
            if calls:
                found[name] = calls[0] if len(calls) == 1 else torch.cat(calls, dim=table[name].seq)
        return found


def _unseen(name: str) -> float:
    """What stands in a score or a pattern where the query does not see the key."""
    return float("-inf") if name.endswith("scores") else 0.0


@contextmanager
def recording(
    model: Transformer,
    names: Sequence[str] | None = None,
    positions: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Recorder]:
    """While open, keep what passes the named sites (by default, all router decisions), by PyTorch's own forward hooks.

    `positions` are those to keep, counted from the start of the text; `dtype` is what numbers are kept in.
    What was computed on a GPU moves to the CPU at once. On a CPU, references are kept and nothing is copied.
    Raises `SiteError` for a name that the model does not have, and at the end if several threads used the model meanwhile.
    """
    config = model.config
    recorder = Recorder(config, resolve(config, names))
    clock = Clock()
    hooks = [model.register_forward_pre_hook(clock.tick, with_kwargs=True)]
    table = all_sites(config)

    def keep(name: str, value: Tensor) -> None:
        recorder.seq = clock.end
        if table[name].axes.endswith("key"):
            value = F.pad(value, (clock.end - value.shape[-1], 0), value=_unseen(name))
            if name.endswith("scores"):
                queries, keys = torch.arange(clock.start, clock.end), torch.arange(clock.end)
                hidden = ~visible(queries[None], keys[None], model.window)
                value = value.masked_fill(hidden.to(value.device), _unseen(name))
        if positions is not None:
            here = positions[(positions >= clock.start) & (positions < clock.end)] - clock.start
            value = value.index_select(table[name].seq + 1, here.to(value.device))
        value = value.detach()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        recorder.calls.setdefault(name, []).append(value if value.device.type == "cpu" else value.cpu())

    def hook(name: str) -> Any:
        return lambda _module, _args, value: keep(name, value)

    for name in recorder.names:
        hooks.append(model.get_submodule(name).register_forward_hook(hook(name)))
    try:
        yield recorder
        if len(clock.threads) > 1:
            raise SiteError(
                "Several threads used this model while its values were recorded, so the record holds those of all of them: "
                "let one thread at a time use a lab, or load it once for each."
            )
    finally:
        for one in hooks:
            one.remove()


class Clock:
    """Which positions of the text the present call feeds: `start` to `end` - 1. Hangs on the model as a hook."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self.padded = False
        self.threads: set[int] = set()  # that fed something

    def tick(self, _model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """`forward`'s arguments, before it runs."""
        self.threads.add(threading.get_ident())
        ids = args[0] if args else kwargs["ids"]
        cache = args[1] if len(args) > 1 else kwargs.get("cache")
        self.start = cache[0].seen if cache else 0
        self.end = self.start + ids.shape[1]
        self.padded = (args[2] if len(args) > 2 else kwargs.get("padding")) is not None
