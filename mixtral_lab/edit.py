"""Change what a model computes, at any site, and leave it afterwards exactly as it was.

    with lab.edit({"layers.2.residual.after": lambda x: 0.9 * x}, ablate(layer=3, expert=1)):
        lab.generate("Once upon a time")

An edit is a function that a PyTorch forward hook puts on a site; no weight is touched. Where several change one site,
they do so in the order given. `ablate`, `reroute` and the others below are such edits, ready made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mixtral_lab.config import Config, LabError
from mixtral_lab.model import Transformer
from mixtral_lab.sites import Clock, Site, all_sites, resolve
from mixtral_lab.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

HOW = ("zero", "renormalise", "next_best")


class EditError(LabError, ValueError):
    """An edit cannot take effect, or did not."""


@dataclass(frozen=True)
class At:
    """Where a change takes place: the site, the positions that this call feeds, and what else is known there.

    `known` holds the logits at `router.experts`; the logits and the chosen experts at `router.weights`; the chosen
    experts at `experts.hidden`, `.out` and `.weighted`. Elsewhere it is empty.
    """

    site: str
    positions: range
    known: tuple[Tensor, ...]


@dataclass
class Edit:
    """A change at every site that `pattern` matches: `change` gets a copy of the value and returns the new one.

    `experts` are those it names (they must exist), `positions` the only ones that it touches, if not all.
    """

    pattern: str
    change: Callable[[Tensor, At], Tensor]
    experts: tuple[int, ...] = ()
    positions: frozenset[int] | None = None
    partly: bool = False  # a position that no text has is no mistake
    met: set[tuple[str, int]] = field(default_factory=set, init=False, repr=False)  # where it took effect


Edits = Mapping[str, Callable[[Tensor], Tensor]] | Edit | Sequence[Edit]


def ablate(layer: int | None, expert: int, how: str = "renormalise") -> Edit:
    """Do without an expert in one layer, or in all (`layer=None`). What becomes of the tokens that would take it:

    "zero" takes its answer away and leaves the others' weights as they are; "renormalise" also shares its weight among
    the other chosen ones (with one choice per token, nothing is left); "next_best" lets the token choose among the other
    experts, as if this one had never been there: its router logit becomes -inf.
    """
    if how not in HOW:
        raise EditError(f"how is {how!r}: it must be 'zero', 'renormalise' or 'next_best'.")

    def forget(logits: Tensor, at: At) -> Tensor:
        return logits.index_fill(-1, torch.tensor([expert], device=logits.device), float("-inf"))

    def take_away(weights: Tensor, at: At) -> Tensor:
        left = weights.masked_fill(at.known[1] == expert, 0.0)
        if how == "zero":
            return left
        rest = left.sum(-1, keepdim=True)
        share = left / torch.where(rest > 0, rest, 1.0)
        return share * weights.sum(-1, keepdim=True)

    if how == "next_best":
        return Edit(_router(layer, "logits"), forget, experts=(expert,))
    return Edit(_router(layer, "weights"), take_away, experts=(expert,))


def reroute(layer: int | None, position: int | Sequence[int] | None, experts: Sequence[int]) -> Edit:
    """Send tokens (at one position, several, or all if None) to these experts, the first as first choice.

    Their weights are the softmax of the router's own logits for them. As many experts as the model chooses.
    """
    forced = tuple(experts)
    if len(set(forced)) < len(forced):
        raise EditError(f"Experts {forced} name one twice: a token takes each expert once.")

    def send(chosen: Tensor, at: At) -> Tensor:
        if len(forced) != chosen.shape[-1]:
            raise EditError(f"Each token takes {chosen.shape[-1]} experts here, but {len(forced)} are named: {forced}.")
        chosen[:, _here(at, edit.positions)] = torch.tensor(forced, device=chosen.device)
        return chosen

    edit = Edit(_router(layer, "experts"), send, experts=forced, positions=_positions(position))
    return edit


def scale(layer: int | None, expert: int, factor: float, position: int | Sequence[int] | None = None) -> Edit:
    """Multiply the weight of an expert's answer, where it is chosen. The others' weights stay."""

    def multiply(weights: Tensor, at: At) -> Tensor:
        here = torch.zeros(weights.shape[1], dtype=torch.bool, device=weights.device)
        here[_here(at, edit.positions)] = True
        return torch.where((at.known[1] == expert) & here[:, None], weights * factor, weights)

    edit = Edit(_router(layer, "weights"), multiply, experts=(expert,), positions=_positions(position))
    return edit


def top_k(k: int, layer: int | None = None) -> Edit:
    """Let every token take its `k` best experts; their weights still sum to 1."""
    if k < 1:
        raise EditError(f"k is {k}: every token takes at least 1 expert.")

    def choose(_: Tensor, at: At) -> Tensor:
        (logits,) = at.known
        if k > logits.shape[-1]:
            raise EditError(f"k is {k}, but {at.site.removesuffix('.experts')} has only {logits.shape[-1]} experts.")
        return logits.topk(k, dim=-1).indices

    return Edit(_router(layer, "experts"), choose)


def temperature(t: float, layer: int | None = None) -> Edit:
    """Divide the router's logits by `t`: above 1 the chosen experts share more evenly. The choice itself stays."""
    if not t > 0:
        raise EditError(f"The temperature is {t}: it must be above 0.")
    return Edit(_router(layer, "logits"), lambda logits, at: logits / t)


def patch(site: str, trace: Trace, position: int | Sequence[int]) -> Edit:
    """Put in what was recorded at a site of another run, at the same positions. `site` may be a pattern.

    Scores and patterns cannot be patched, for their keys belong to their own text: patch queries, keys or values.
    Raises `TraceError` if the trace lacks the site.
    """
    _check_patchable(site)
    positions = _positions(position) or frozenset()
    rows = range(len(trace)) if trace.positions is None else trace.positions.tolist()
    row = {at: number for number, at in enumerate(rows)}
    missing = positions - row.keys()
    if missing:
        raise EditError(f"Position {min(missing)} is not in the trace, which has {len(row)} of {len(trace)} tokens.")
    if "*" not in site:
        trace[site]  # says now, not in the middle of a run, what is missing

    def put(value: Tensor, at: At) -> Tensor:
        _check_patchable(at.site)
        recorded = trace[at.site]
        axis = PATCHED_AXIS.get(at.site.rpartition(".")[2], 0) if ".heads." in at.site else 0
        here = [p for p in at.positions if p in positions]
        if not here:
            return value
        source = recorded.index_select(axis, torch.tensor([row[p] for p in here]))
        wanted = (*value.shape[1 : 1 + axis], len(here), *value.shape[2 + axis :])
        if source.shape != wanted:
            raise EditError(f"{at.site} was recorded as {tuple(source.shape)}, but here it is {wanted}: another model?")
        index = torch.tensor([p - at.positions.start for p in here], device=value.device)
        return value.index_copy(axis + 1, index, source.to(value).expand(len(value), *source.shape))

    return Edit(site, put, positions=positions)


def _check_patchable(site: str) -> None:
    if site.endswith((".scores", ".pattern")):
        raise EditError(f"{site} cannot be patched: its keys belong to its own text. Patch attention.heads.* instead.")


PATCHED_AXIS = {"query": 2, "out": 2, "key": 1, "value": 1}  # `seq` stands behind the heads


class Replay(list[Edit]):
    """The choices of a recorded trace, forced on a model; made by `replay`. Afterwards it knows what was overruled."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._own: dict[int, list[Tensor]] = {}
        forced = trace.experts
        rows = torch.arange(forced.shape[1]) if trace.positions is None else trace.positions
        positions = frozenset(rows.tolist())
        row = torch.full((int(rows.max()) + 1,), -1)
        row[rows] = torch.arange(len(rows))

        def force(layer: int) -> Callable[[Tensor, At], Tensor]:
            def choose(chosen: Tensor, at: At) -> Tensor:
                if forced.shape[-1] != chosen.shape[-1]:
                    raise EditError(
                        f"The trace has {forced.shape[-1]} choices per token, but this model takes {chosen.shape[-1]}."
                    )
                self._own.setdefault(layer, []).append(chosen[0].cpu())
                here = _here(at, positions)
                new = forced[layer, row[torch.tensor([at.positions[i] for i in here], dtype=torch.long)]]
                return chosen.index_copy(
                    1,
                    torch.tensor(here, dtype=torch.long, device=chosen.device),
                    new.to(chosen).expand(len(chosen), -1, -1),
                )

            return choose

        experts = tuple(range(int(forced.max()) + 1))[-1:]
        super().__init__(
            Edit(_router(layer, "experts"), force(layer), experts=experts, positions=positions, partly=True)
            for layer in range(trace.n_layers)
        )

    def begin(self) -> None:
        """Forget what an earlier run chose."""
        self._own.clear()

    @property
    def own(self) -> Int[Tensor, "layer seq choice"]:
        """What the model itself would have chosen, given the forced choices before. Raises `EditError` before a run."""
        if not self._own:
            raise EditError("Nothing was read under this replay yet.")
        return torch.stack([torch.cat(self._own[layer]) for layer in sorted(self._own)])

    def frame(self) -> pd.DataFrame:
        """A row per (position, layer): token, own and forced experts, how many they share, whether the first agrees."""
        import pandas as pd

        own, forced = self.own, self.trace.experts
        rows = range(forced.shape[1]) if self.trace.positions is None else self.trace.positions.tolist()
        found = []
        for row, position in enumerate(rows):
            if position >= own.shape[1]:
                continue
            for layer in range(len(own)):
                mine, theirs = own[layer, position].tolist(), forced[layer, row].tolist()
                found.append(
                    {
                        "position": position, "token": self.trace.tokens[position], "layer": layer,
                        "own": tuple(mine), "forced": tuple(theirs), "shared": len(set(mine) & set(theirs)),
                        "same_first": mine[0] == theirs[0],
                    }
                )  # fmt: skip
        return pd.DataFrame(found)


def replay(trace: Trace) -> Replay:
    """Force a recorded routing on a model: the trace's chosen experts, weighed by the model's own logits for them.

    Positions that the trace does not have choose for themselves. Also known as routing replay (R3), from
    reinforcement-learning trainers, where an inference engine's choices are replayed in the trainer.
    Raises `TraceError` if the trace does not know the chosen experts.
    """
    return Replay(trace)


@contextmanager
def editing(model: Transformer, *edits: Edits) -> Iterator[None]:
    """While open, the edits take effect. Raises `EditError` for one that cannot, and at the end for one that did not."""
    config, table, clock = model.config, all_sites(model.config), Clock()
    for given in edits:
        if isinstance(given, Replay):
            given.begin()
    asked = [edit for given in edits for edit in _listed(given)]
    with ExitStack() as hooks:
        tick = model.register_forward_pre_hook(clock.tick, with_kwargs=True)
        hooks.callback(tick.remove)
        for edit in asked:
            edit.met.clear()
            _check(edit, config)
            for name in resolve(config, edit.pattern):
                hook = _hook(edit, table[name], config, clock)
                hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield
    for edit in asked:
        _check_met(edit)


def _listed(given: Edits) -> list[Edit]:
    if isinstance(given, Mapping):
        for pattern, fn in given.items():
            if not callable(fn):
                raise EditError(
                    f"The edit of {pattern} is {fn!r}: give a function from the site's value to what shall stand in its place, "
                    "such as lambda x: 0.5 * x."
                )
        return [Edit(pattern, lambda value, at, fn=fn: fn(value)) for pattern, fn in given.items()]  # type: ignore[misc]
    found = [given] if isinstance(given, Edit) else list(given)
    if not all(isinstance(edit, Edit) for edit in found):
        raise EditError(
            f"An edit is a dictionary {{site: function}} or made by ablate, reroute, ...; this is {given!r}."
        )
    return found


def _check(edit: Edit, config: Config) -> None:
    for expert in edit.experts:
        if config.n_experts is not None and not 0 <= expert < config.n_experts:
            raise EditError(
                f"{edit.pattern} has no expert {expert}: there are {config.n_experts}, 0 to {config.n_experts - 1}."
            )


def _check_met(edit: Edit) -> None:
    """A write is never silently without effect: nothing read, or a position that no text had."""
    missed = (edit.positions or frozenset()) - {position for _, position in edit.met}
    if edit.met and (edit.partly or not missed):
        return
    where = f" at position {', '.join(map(str, sorted(missed)))}" if missed else ""
    raise EditError(f"The edit of {edit.pattern}{where} never took effect: nothing passed there while it was open.")


def _hook(edit: Edit, site: Site, config: Config, clock: Clock) -> Callable[..., Tensor]:
    def hook(_module: Any, args: tuple[Any, ...], value: Tensor) -> Tensor:
        positions = range(clock.start, clock.end)
        if edit.positions is None:
            edit.met.add((site.name, -1))
        else:
            if clock.padded:
                raise EditError(
                    "Edits of single positions need texts of one length in a batch: give them one at a time."
                )
            here = edit.positions.intersection(positions)
            if not here:
                return value
            edit.met.update((site.name, position) for position in here)
        known = tuple(args[1:]) if ".router." in site.name or ".experts." in site.name else ()
        return _checked(edit.change(value.clone(), At(site.name, positions, known)), value, site, config)

    return hook


def _checked(new: Any, old: Tensor, site: Site, config: Config) -> Tensor:
    """The changed value, if the model can go on with it."""
    if not isinstance(new, Tensor):
        raise EditError(f"The edit of {site.name} returned {type(new).__name__}: return the new value, a tensor.")
    chooses = site.name.endswith("router.experts")
    fits = new.shape[:-1] == old.shape[:-1] and new.shape[-1] > 0 if chooses else new.shape == old.shape
    if not fits:
        raise EditError(f"{site.name} is {tuple(old.shape)} ({site.axes}), but the edit returned {tuple(new.shape)}.")
    if chooses:
        if new.is_floating_point() or new.dtype == torch.bool:
            raise EditError(f"{site.name} holds whole numbers, but the edit returned {new.dtype}.")
        low, high = int(new.min()), int(new.max())
        if low < 0 or high >= (config.n_experts or 0):
            wrong = low if low < 0 else high
            raise EditError(f"{site.name} has no expert {wrong}: they are 0 to {(config.n_experts or 0) - 1}.")
    if site.name.endswith("router.logits"):
        left = int((new > -torch.inf).sum(-1).min())
        if left < (config.n_choices or 0):
            raise EditError(
                f"{site.name}: only {left} of {new.shape[-1]} experts are left for a token, which takes {config.n_choices}. Leave "
                "more, or take answers away instead: ablate(..., how='zero')."
            )
    return new.to(old)


def _router(layer: int | None, what: str) -> str:
    return f"layers.{'*' if layer is None else layer}.router.{what}"


def _positions(position: int | Sequence[int] | None) -> frozenset[int] | None:
    if position is None:
        return None
    given: Any = position
    try:
        several = [given] if hasattr(given, "__index__") and not getattr(given, "ndim", 0) else given
        positions = frozenset(map(operator.index, several))
    except TypeError:
        positions = frozenset()
    if not positions or min(positions) < 0:
        raise EditError(f"position is {position!r}: it must be a position in the text, 0 or above, or several.")
    return positions


def _here(at: At, positions: frozenset[int] | None) -> list[int]:
    """Which of the tokens that this call feeds are meant."""
    return [i for i, position in enumerate(at.positions) if positions is None or position in positions]
