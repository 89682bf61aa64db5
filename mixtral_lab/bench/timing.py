"""How two sides are timed: their logits first, then in turn, on new prompts, in a new order every time."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from mixtral_lab.bench.fresh import in_new_process
from mixtral_lab.bench.report import ROOFLINE, THEIRS, BenchError, Measurement, Moment, Parity
from mixtral_lab.bench.shapes import Shape
from mixtral_lab.bench.sides import EXPERTS, Named, Ours, Side, Theirs, Work, load_theirs
from mixtral_lab.machine import Rooflines, synchronize
from mixtral_lab.model import Transformer
from mixtral_lab.model.linear import pack
from mixtral_lab.weights import load_model

ATTENTION = ("sdpa", "eager")  # of transformers: the first is timed, the second only has its logits compared
LARGEST = 1e-4  # how far float32 logits may differ
# In half precision a near tie may be routed otherwise, which moves the logits by a tenth of their length there and, through
# attention, a little everywhere after. Weights that do not sum to 1, for one, move them by a half.
TYPICAL = 0.2
CHECKED, CHECKED_DECODE = 24, 8  # tokens that the check reads at once, and then one by one
HOPELESS = 3  # a variant of transformers that takes so many times its best in the round to warm up is left out
WARM_UP = 8  # tokens written to warm up

Prepare = Callable[[Any, Tensor, int], Work]  # side, prompt, tokens to write: what is to be timed
Roof = tuple[str, Callable[[], float]]  # its name, and the least seconds by what the machine does now


@dataclass
class Found:
    """What a run has found so far."""

    notes: list[str] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    profiles: list[Moment] = field(default_factory=list)


@dataclass
class Timing:
    """One shape in one dtype, and the means to time both sides on it."""

    shape: Shape
    folder: Path  # the checkpoint that both sides load
    device: torch.device
    dtype: torch.dtype
    repeats: int
    rooflines: Rooflines
    found: Found
    bar: tqdm
    _models: tuple[Transformer, nn.Module] | None = None

    def models(self) -> tuple[Transformer, nn.Module]:
        """Ours and theirs, loaded when first needed. Raises `BenchError` if their logits are not the same."""
        if self._models is None:
            self.say("loading")
            ours = load_model(self.folder, self.device, self.dtype)
            theirs = load_theirs(self.folder, self.device, self.dtype)
            others: list[Side] = [Ours(ours, plain_products=True)]
            others += [Theirs(theirs, *variant) for variant in product(ATTENTION, EXPERTS)]
            if packed := pack(ours):
                self.note(f"the tuned column has packed copies of the weights: {packed / 1e6:,.0f} MB more.")
            self.check(Ours(ours), others)
            self._models = ours, theirs
        return self._models

    def close(self) -> None:
        """Let the models go."""
        self._models = None
        gc.collect()

    def check(self, ours: Side, others: Sequence[Side]) -> None:
        """Compare the logits of all with ours. Raises `BenchError` where they differ."""
        ids = self.prompt(CHECKED + CHECKED_DECODE)
        expected = ours.logits(ids, CHECKED).float()
        exact = self.dtype == torch.float32
        for side in others:
            self.say(f"comparing logits, {side.name}")
            apart = side.logits(ids, CHECKED).float() - expected
            typical = (apart.norm(dim=-1) / expected.norm(dim=-1)).median().item()
            parity = Parity(*self.here, side.name, apart.abs().max().item(), typical)
            far, limit = (parity.largest, LARGEST) if exact else (parity.typical, TYPICAL)
            if not far <= limit:
                unit = "" if exact else " of their length"
                raise BenchError(
                    f"{', '.join(self.here)}: our logits and those of {side.name} are {far:.2g}{unit} apart, more than {limit:g}. "
                    "Two models that compute different things cannot be compared, so nothing was timed."
                )
            self.found.parity.append(parity)

    def race(
        self,
        what: str,
        at: int,
        sides: Sequence[Named],
        prepare: Prepare,
        *,
        per: int = 1,
        roof: Roof | None = None,
        repeats: int | None = None,
        warm_up: int | None = None,
    ) -> list[Measurement]:
        """Seconds of each side's work, after a round to warm up that decides who is worth timing.

        Decoding is given `per` tokens and counted per token. `roof` is measured in every repeat besides. `warm_up` is
        the length of the first round's prompts if they are to be shorter; then nobody is left out.
        """
        label = f"{what}, {at:,}"
        brief = min(per, WARM_UP)
        warm = {}
        for side in sides:
            self.say(f"{label}: warming up, {side.name}")
            warm[side.name] = self.timed(prepare(side, self.prompt(warm_up or at), brief))
        if warm_up is None:
            sides = self._worth_it(label, sides, warm)
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for repeat in range(repeats or self.repeats):
            ids = self.prompt(at)
            for side in random.sample(list(sides), len(sides)):
                self.say(f"{label}: repeat {repeat + 1}, {side.name}")
                seconds[side.name].append(self.timed(prepare(side, ids, per)) / per)
            if roof is not None:
                seconds.setdefault(f"{ROOFLINE}: {roof[0]}", []).append(roof[1]())
        return [self.keep(what, at, name, "s", values) for name, values in seconds.items()]

    def timed(self, work: Work) -> float:
        """Seconds until a work's result is there, a GPU's included; letting go of the result is not counted."""
        synchronize(self.device)
        start = time.perf_counter()
        result = work()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        del result
        return seconds

    def in_new_process(self, job: str, **what: Any) -> dict[str, Any]:
        """One of the jobs of `fresh.py` on this checkpoint."""
        return in_new_process(job, folder=str(self.folder), device=str(self.device), dtype=self.here[1], **what)

    def keep(self, what: str, at: int, contender: str, unit: str, values: Sequence[float]) -> Measurement:
        """Put a measurement into the report."""
        measurement = Measurement(*self.here, what, at, contender, unit, tuple(values))
        self.found.measurements.append(measurement)
        return measurement

    def note(self, text: str) -> None:
        """Put a sentence into the report."""
        self.found.notes.append(f"{', '.join(self.here)}: {text}")

    def say(self, doing: str) -> None:
        """Tell whoever waits what is being done."""
        self.bar.set_description(f"{', '.join(self.here)}: {doing}")

    def prompt(self, seq: int) -> Int[Tensor, "1 seq"]:
        """A new one every time: kernels compiled for an old one must not help."""
        return torch.randint(self.shape.config.vocab, (1, seq), device=self.device)

    @property
    def here(self) -> tuple[str, str]:
        """The names of the shape and the dtype."""
        return self.shape.name, str(self.dtype).removeprefix("torch.")

    def _worth_it(self, label: str, sides: Sequence[Named], warm: dict[str, float]) -> list[Named]:
        """All but the variants of transformers that took far longer than its best in the round to warm up."""
        theirs = [side for side in sides if side.name.startswith(THEIRS)]
        best = min((warm[side.name] for side in theirs), default=0.0)
        left_out = [side for side in theirs if warm[side.name] > HOPELESS * best]
        for side in left_out:
            self.note(f"left out of {label}: {side.name}, {warm[side.name] / best:.1f} times the best when warming up.")
        return [side for side in sides if side not in left_out]
