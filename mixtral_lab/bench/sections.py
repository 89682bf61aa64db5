"""What is timed: each section of the benchmark is a method."""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mixtral_lab.bench.profiling import profile
from mixtral_lab.bench.report import (
    CACHE,
    COMPILED,
    DECODE,
    OURS,
    PEAK,
    PREFILL,
    RECORDING,
    ROOFLINE,
    THEIRS,
    Moment,
)
from mixtral_lab.bench.shapes import LONGEST, WINDOW
from mixtral_lab.bench.sides import (
    EXPERTS,
    QUICK,
    Ids,
    Ours,
    OursCompiled,
    Reader,
    Side,
    Theirs,
    TheirsCompiled,
    TheirsGenerate,
    Work,
)
from mixtral_lab.bench.timing import ATTENTION, CHECKED, CHECKED_DECODE, Roof, Timing
from mixtral_lab.machine import EXPERTS as EXPERTS_IN
from mixtral_lab.machine import synchronize
from mixtral_lab.model import Transformer
from mixtral_lab.model.quantized import KINDS
from mixtral_lab.offload import OffloadError
from mixtral_lab.sites import kept_for, recording, resolve
from mixtral_lab.weights import free_memory, load_model

SECTIONS = ("prefill", "decode", "rounded", "long", "recording", "load", "profile")
FEW = 3  # repeats, at most, of what takes long
RECORDED = {  # what is kept while a text is read; scores and patterns are computed from queries and keys when asked for
    "routing": ("layers.*.router.*",),
    "q, k, v": ("layers.*.attention.heads.query", "layers.*.attention.heads.key", "layers.*.attention.heads.value"),
    "everything": ("*",),
}


@dataclass(frozen=True)
class Lengths:
    """How much is read and written, in tokens."""

    prompts: tuple[int, ...] = (512, 2048)  # prefill; decoding, recording and profiles follow the first
    written: int = 64
    long: int = 16384  # read whole by the shape with a window
    curve: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, LONGEST)  # where its decoding is timed
    chunk: int = WINDOW  # in which transformers is fed by hand


@dataclass
class Sections(Timing):
    """The sections, on one shape in one dtype."""

    lengths: Lengths = Lengths()

    def describe(self) -> None:
        """Note what is compared."""
        size = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        millions = self.shape.config.parameters / 1e6
        self.note(f"{self.shape.weights}, {millions:,.0f} M parameters, {size / 1e6:,.0f} MB on disk.")

    def prefill(self) -> None:
        """Reading a prompt, until the logits after its last token."""
        ours, theirs = self.models()
        variants = [Theirs(theirs, ATTENTION[0], experts) for experts in EXPERTS]
        for seq in self.lengths.prompts:
            sides: list[Side] = [Ours(ours), Ours(ours, plain_products=True)]
            for side in variants:
                if side.copied(seq) < (free_memory(self.device) or sys.maxsize) / 4:
                    sides.append(side)
                else:
                    gigabytes = side.copied(seq) / 1e9
                    self.note(
                        f"left out of {PREFILL}, {seq:,}: {side.name}, which copies {gigabytes:.1f} GB of weights."
                    )
            self.race(PREFILL, seq, sides, _read_it, roof=self._product_roof(seq))

    def decode(self) -> None:
        """Writing after a prompt, seconds per token: eager, then compiled."""
        from torch._dynamo.exc import TorchDynamoException  # a second and a half to import

        ours, theirs = self.models()
        seq, n = self.lengths.prompts[0], self.lengths.written
        sides: list[Side] = [Ours(ours), Ours(ours, plain_products=True)]
        sides += [Theirs(theirs, ATTENTION[0], experts) for experts in EXPERTS]
        sides.append(TheirsGenerate(theirs))
        self.race(DECODE, seq, sides, _write_on, per=n, roof=self._memory_roof())
        length = max(seq + n, CHECKED + CHECKED_DECODE)
        try:
            compiled: list[Side] = [OursCompiled(ours), TheirsCompiled(theirs, length)]
            self.check(Ours(ours), compiled)
            self.race(COMPILED, seq, compiled, _write_on, per=n, roof=self._memory_roof())
        except TorchDynamoException as error:  # no C++ compiler, for one
            self.note(f"left out: {COMPILED}: {str(error).splitlines()[0]}")
        torch.compiler.reset()

    def rounded(self) -> None:
        """Writing with experts of 8 and 4 bits: ours alone, as transformers needs other packages for it."""
        seq, n = self.lengths.prompts[0], self.lengths.written
        for kind in KINDS:
            self.say(f"rounding to {kind}")
            try:
                model = load_model(self.folder, self.device, self.dtype, quantize=kind)
            except OffloadError as error:
                self.note(f"left out: {DECODE}, {kind}: {error}")
                continue
            self.race(
                f"{DECODE}, {kind}", seq, [Ours(model)], _write_on, per=n, roof=self._memory_roof(EXPERTS_IN[kind])
            )
            del model

    def long(self) -> None:
        """A text far beyond the window: reading it, decoding after it, and the memory of both."""
        ours, theirs = self.models()
        chunk, at = self.lengths.chunk, self.lengths.long
        by_hand = [Theirs(theirs, ATTENTION[0], experts, chunk) for experts in ("eager", QUICK)]
        at_once = Theirs(theirs, ATTENTION[0], QUICK)
        sides: list[Side] = [Ours(ours), *by_hand, at_once]
        rows = self.race(PREFILL, at, sides, _read_it, repeats=min(self.repeats, FEW), warm_up=4 * chunk)
        medians = {row.contender: row.median for row in rows}
        best = min(by_hand, key=lambda side: medians[side.name])
        self._curve([Ours(ours), best])
        del ours, theirs
        self.close()
        curve = self.lengths.curve
        for name, spelled, tokens in (
            (OURS, {"who": OURS}, curve),
            (best.name, _spelled(best.experts, chunk), curve),
            (at_once.name, _spelled(at_once.experts, None), [one for one in curve if one <= at]),
        ):
            self.say(f"memory of {name}")
            found = self.in_new_process("lengths", side=spelled, tokens=list(tokens))
            for what, key in ((CACHE, "cache"), (PEAK, "peak")):
                for tokens_read, value in zip(tokens, found[key], strict=True):
                    self.keep(what, tokens_read, name, "B", [value])
        for tokens_read in curve:
            least = self.shape.config.cache_bytes(tokens_read, self.dtype.itemsize)
            self.keep(CACHE, tokens_read, f"{ROOFLINE}: keys and values in sight", "B", [float(least)])

    def recording(self) -> None:
        """What it costs to keep values while a text is read, beside reading it without."""
        ours, _ = self.models()
        seq = self.lengths.prompts[0]
        kept = {what: kept_for(resolve(self.shape.config, patterns)) for what, patterns in RECORDED.items()}
        sides = [_Recording(ours, OURS, ())]
        sides += [_Recording(ours, f"{OURS}, recording {what}", names) for what, names in kept.items()]
        self.race(RECORDING, seq, sides, _read_it)
        for side in sides:
            self.say(f"memory of {side.name}")
            peak = self.in_new_process("record", tokens=seq, names=list(side.names))["peak"]
            self.keep(f"{PEAK}, {RECORDING}", seq, side.name, "B", [peak])

    def load(self) -> None:
        """Loading, each time in a fresh process: seconds, and memory beyond what the process had before."""
        sides = {OURS: {"who": OURS}, THEIRS: _spelled(QUICK, None)}
        values: dict[tuple[str, str], list[float]] = {}
        for repeat in range(self.repeats):
            for who in random.sample(list(sides), len(sides)):
                self.say(f"loading, repeat {repeat + 1}, {who}")
                for what, value in self.in_new_process("load", side=sides[who]).items():
                    values.setdefault((what, who), []).append(value)
        for (what, who), found in values.items():
            self.keep(what, 0, who, "B" if "memory" in what else "s", found)

    def profile(self) -> None:
        """Where the time of one prefill and one decode step goes."""
        ours, _ = self.models()
        self.say("profile")
        frame = profile(ours, self.prompt(self.lengths.prompts[0]), self.repeats)
        for work, site, seconds, share in frame.itertuples(index=False):
            self.found.profiles.append(Moment(*self.here, work, site, float(seconds), float(share)))
        for work, unwatched in frame.attrs.items():
            slower = frame.loc[frame["work"] == work, "seconds"].sum() / unwatched - 1
            self.note(f"profile: looking on changes the time of {work} by {slower:+.0%}.")

    def _curve(self, sides: Sequence[Reader]) -> None:
        """Decode at rising lengths of one text, which each side has read itself.

        A new text every repeat. All lengths of all sides are decoded in one random order, each a few times (its text grows on),
        so that lengths may be compared like sides.
        """
        n = self.lengths.written
        seconds: dict[tuple[int, str], list[float]] = {}
        for repeat in range(min(self.repeats, FEW)):
            ids = self.prompt(max(self.lengths.curve))
            ready: list[tuple[Reader, int, Tensor, Any]] = []
            for side in sides:
                self.say(f"reading {ids.shape[1]:,} tokens, repeat {repeat + 1}, {side.name}")
                ready += [(side, *rest) for rest in _on_the_way(side, ids, self.lengths.curve)]
            for side, at, token, cache in random.sample(ready * FEW, FEW * len(ready)):
                self.say(f"{DECODE}, {at:,}: repeat {repeat + 1}, {side.name}")
                side.write(token, cache, 1)  # the first step lets go of what the prompt left behind
                synchronize(self.device)
                start = time.perf_counter()
                side.write(token, cache, n)
                synchronize(self.device)
                seconds.setdefault((at, side.name), []).append((time.perf_counter() - start) / n)
        for (at, name), values in sorted(seconds.items()):
            self.keep(DECODE, at, name, "s", values)

    def _memory_roof(self, bytes_of_experts: float | None = None) -> Roof:
        """Reading what a token needs; numbers of experts take so many bytes, if they are not kept like the rest."""
        experts = self.shape.read_of_experts
        each = self.dtype.itemsize if bytes_of_experts is None else bytes_of_experts
        size = (self.shape.read_per_token - experts) * self.dtype.itemsize + experts * each
        return f"reading {size / 1e6:,.0f} MB", lambda: size / self.rooflines.bandwidth()

    def _product_roof(self, seq: int) -> Roof:
        operations = self.shape.operations(seq)
        return f"{operations / 1e9:,.1f} GFLOP", lambda: operations / self.rooflines.rate(self.dtype)


class _Recording:
    """Ours, reading a whole text while the named sites are recorded."""

    def __init__(self, model: Transformer, name: str, names: Sequence[str]) -> None:
        self.model, self.name, self.names = model, name, names

    def prefill(self, ids: Ids) -> Work:
        @torch.inference_mode()
        def work() -> Any:
            with recording(self.model, self.names) if self.names else nullcontext() as recorder:
                logits = self.model(ids)
            return logits, recorder

        return work


def _read_it(side: Any, ids: Int[Tensor, "1 seq"], n: int) -> Work:
    return side.prefill(ids)


def _write_on(side: Any, ids: Int[Tensor, "1 seq"], n: int) -> Work:
    return side.decode(ids, n)


def _on_the_way(side: Reader, ids: Ids, marks: Sequence[int]) -> Iterator[tuple[int, Tensor, Any]]:
    """Read a text; at each mark, give the length, the next token, and a copy of the cache."""
    cache = side.new_cache(ids.shape[1])
    read = 0
    for mark in sorted(marks):
        token = side.read(ids[:, read:mark], cache)
        read = mark
        yield mark, token, copy.deepcopy(cache)


def _spelled(experts: str, chunk: int | None) -> dict[str, Any]:
    """A variant of transformers, as `fresh.open_side` reads it."""
    return {"who": THEIRS, "attention": ATTENTION[0], "experts": experts, "chunk": chunk}
