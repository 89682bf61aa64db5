"""Where the time of one pass goes, by the place in the model where it is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mixtral_lab.config import LabError
from mixtral_lab.generate import decode, prefill
from mixtral_lab.model import Transformer
from mixtral_lab.model.transformer import Block

if TYPE_CHECKING:
    import pandas as pd

SITES = (
    "norms", "attention projections", "rotation", "attention", "router", "gate", "up", "down", "mixing", "unembedding",
    "rest",
)  # fmt: skip


class ProfileError(LabError, ValueError):
    """A pass cannot be profiled as asked."""


def profile(model: Transformer, ids: Int[Tensor, "batch seq"], repeats: int = 5) -> pd.DataFrame:
    """Where the time goes while a model reads `ids` (prefill) and then one token more (decode), by site.

    Tidy: one row per (work, site) with `seconds` and its `share` of the pass; of `repeats` passes after one to warm up,
    the one that took the median time. The sites are `SITES`: "attention" is attention itself with its cache (and, for a token
    alone on a CPU, the rotation); "gate", "up" and "down" are the products with these matrices; "mixing" is what else a
    feed-forward layer does (sorting tokens, the activation, the weighted sum), and all that it does where the model takes the
    chosen experts in one step; "unembedding" has the last norm in it.

    The time it takes to look on (a microsecond or two per submodule, felt in the decode step of a small model) stays
    where it falls; where the model would take many tokens to all experts in one call, they are watched one after the other.
    `frame.attrs` has the seconds of the same passes unwatched, by work. Raises `ProfileError` for less than one repeat.
    """
    import pandas as pd

    if repeats < 1:
        raise ProfileError(f"repeats is {repeats}: at least one pass must be timed.")
    rows: list[tuple[str, str, float, float]] = []
    unwatched: dict[str, float] = {}
    cache = model.new_cache(ids.shape[0], ids.shape[1] + 2 * (repeats + 1))
    last = prefill(model, ids, cache).argmax(-1)
    works: dict[str, Callable[[], object]] = {
        "prefill": lambda: prefill(model, ids, model.new_cache(*ids.shape)),
        "decode": lambda: decode(model, last, cache),
    }
    for name, work in works.items():
        passes, plain = [], []
        for _ in range(repeats + 1):
            clock = _Clock(ids.device)
            work()
            plain.append(clock.stop()["rest"])
            with torch.no_grad():
                by_row = name == "decode" and model.alone(last[:, None], cache)
            with _watched(model, ids.device, by_row) as clock:
                work()
                passes.append(clock.stop())
        unwatched[name] = sorted(plain[1:])[repeats // 2]
        middle = sorted(passes[1:], key=lambda one: sum(one.values()))[repeats // 2]
        total = sum(middle.values())
        rows += [(name, site, middle[site], middle[site] / total) for site in SITES if site in middle]
    frame = pd.DataFrame(rows, columns=["work", "site", "seconds", "share"])
    frame.attrs.update(unwatched)
    return frame


class _Clock:
    """Gives the time between two moments to the site that was on top of the stack."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.stack = ["rest"]
        self.moments: list[tuple[str, Any]] = []
        self.start = self._now()

    def restart(self) -> None:
        self.moments.clear()
        self.start = self._now()

    def enter(self, site: str) -> None:
        self._mark()
        self.stack.append(site)

    def leave(self, then: str | None = None) -> None:
        """Back to what was done before, or from there on to something else."""
        self._mark()
        self.stack.pop()
        self.stack[-1] = then or self.stack[-1]

    def turn_to(self, site: str) -> None:
        """From here on, what is on top of the stack does something else."""
        self._mark()
        self.stack[-1] = site

    def stop(self) -> dict[str, float]:
        """Seconds by site."""
        self._mark()
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        before = self.start
        for site, moment in self.moments:
            passed = before.elapsed_time(moment) / 1e3 if self.on_gpu else moment - before
            seconds[site] = seconds.get(site, 0.0) + passed
            before = moment
        return seconds

    def _mark(self) -> None:
        self.moments.append((self.stack[-1], self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def _watched(model: Transformer, device: torch.device, by_row: bool = False) -> Iterator[_Clock]:
    """A clock that the model's submodules turn for as long as this is open.

    Their `forward`, or `row`, is wrapped for that time: experts with hooks would be run by another road. Only the sites inside
    attention are seen by hooks, unless a token goes by `row`, which with a hook it would not: there rotation is within attention.
    """
    method = "row" if by_row else "forward"
    clock = _Clock(device)
    restore: list[Callable[[], None]] = []
    hooks: list[Any] = []

    def inside(module: nn.Module, site: str, then: str | None = None) -> None:
        plain = getattr(module, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            clock.enter(site)
            try:
                return plain(*args, **kwargs)
            finally:
                clock.leave(then)

        own = method in vars(module)  # whoever wrapped it before us finds it as it was
        setattr(module, method, timed)
        restore.append(partial(setattr, module, method, plain) if own else partial(delattr, module, method))

    def after(site: nn.Module, what: str) -> None:
        hooks.append(site.register_forward_hook(lambda *_: clock.turn_to(what)))

    try:
        if not by_row:
            inside(model.embed, "rest", then="rest")
        for block in model.blocks:
            inside(block, "rest", then="unembedding")
            _watch(block, inside, None if by_row else after)
        clock.restart()
        yield clock
    finally:
        for hook in hooks:
            hook.remove()
        for one in restore:
            one()


def _watch(
    block: Block, inside: Callable[[nn.Module, str], None], after: Callable[[nn.Module, str], None] | None
) -> None:
    inside(block.attention_norm, "norms")
    inside(block.ffn_norm, "norms")
    attention = block.attention
    inside(attention, "rotation" if after else "attention")  # what it does between its products and the heads' sites
    for part in (attention.query, attention.key, attention.value, attention.output):
        inside(part, "attention projections")
    if after:
        after(attention.heads.value, "attention")
        after(attention.heads.out, "attention projections")
    if block.router is None:
        inside(block.feed_forward, "mixing")
        swiglus = [block.feed_forward]
    else:
        inside(block.router, "router")
        inside(block.experts, "mixing")
        swiglus = block.experts.swiglus
    for swiglu in swiglus:
        for role in ("gate", "up", "down"):
            inside(getattr(swiglu, role), role)
