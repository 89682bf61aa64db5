"""What a run found: every raw value, and what follows from them."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mixtral_lab.config import LabError

if TYPE_CHECKING:
    import pandas as pd

OURS, PORTABLE, OURS_COMPILED = "mixtral_lab", "mixtral_lab, portable", "mixtral_lab, compiled"
THEIRS, ROOFLINE = "transformers", "roofline"
PREFILL, DECODE, COMPILED = "prefill", "decode", "decode, compiled"
RECORDING = "recording"
CACHE, PEAK = "cache", "peak memory of reading"


class BenchError(LabError):
    """Nothing can be compared: transformers is missing, or the two sides do not compute the same."""


@dataclass(frozen=True)
class Parity:
    """How far a contender's logits are from ours, before anything was timed."""

    shape: str
    dtype: str
    contender: str
    largest: float  # of all differences
    typical: float  # at the median position: length of the difference / length of our logits


@dataclass(frozen=True)
class Measurement:
    """One quantity of one contender, in seconds or bytes; one value per repeat.

    `at` is the length of the text read (prefill), or read before (decode: seconds per token); 0 where there is none.
    """

    shape: str
    dtype: str
    what: str
    at: int
    contender: str
    unit: str  # "s" or "B"
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def label(self) -> str:
        return f"{self.what}, {self.at:,} tokens" if self.at else self.what

    @property
    def subject(self) -> tuple[str, str, str, int]:
        """What it is compared within."""
        return self.shape, self.dtype, self.what, self.at


@dataclass(frozen=True)
class Comparison:
    """One of ours beside the variant of transformers with the lowest median: theirs / ours in each repeat.

    Above 1, we win.
    """

    shape: str
    dtype: str
    what: str
    at: int
    ours: str
    best: str
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Growth:
    """What length costs one contender: seconds per token after `longest` tokens / after `shortest`, in each repeat."""

    shape: str
    dtype: str
    contender: str
    shortest: int
    longest: int
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Moment:
    """How long one pass spent at one kind of place (see `profile`)."""

    shape: str
    dtype: str
    work: str
    site: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Report:
    """Everything one run found. `machine` says where and with what; `notes` what a reader should know besides."""

    machine: dict[str, str]
    notes: tuple[str, ...]
    parity: tuple[Parity, ...]
    measurements: tuple[Measurement, ...]
    profiles: tuple[Moment, ...] = ()

    def comparisons(self) -> list[Comparison]:
        """For each quantity, ours and our portable column beside the best of theirs."""
        found = []
        for subject in self.subjects():
            rows = self.rows(subject)
            theirs = [row for row in rows if row.contender.startswith(THEIRS)]
            for row in rows:
                if theirs and row.contender in (OURS, OURS_COMPILED, PORTABLE):
                    found.append(Comparison(*subject, row.contender, theirs[0].contender, ratios(theirs[0], row)))
        return found

    def shares(self) -> list[tuple[Measurement, float]]:
        """How much of the roofline measured in the same repeats each contender reached: 1 is all of it."""
        found = []
        for subject in self.subjects():
            rows = self.rows(subject)
            for roof in (row for row in rows if row.contender.startswith(ROOFLINE)):
                found += [(row, statistics.median(ratios(roof, row))) for row in rows if row is not roof]
        return found

    def growth(self) -> list[Growth]:
        """What length costs each contender that decoded after texts of several lengths."""
        found = []
        decoded = [one for one in self.measurements if one.what == DECODE and not one.contender.startswith(ROOFLINE)]
        for here in dict.fromkeys((one.shape, one.dtype, one.contender) for one in decoded):
            rows = [one for one in decoded if (one.shape, one.dtype, one.contender) == here]
            short, long = min(rows, key=lambda one: one.at), max(rows, key=lambda one: one.at)
            if short is not long:
                found.append(Growth(*here, short.at, long.at, ratios(long, short)))
        return found

    def profile(self, shape: str, dtype: str = "float32") -> pd.DataFrame:
        """The profile of one shape as `profile` gives it: columns work, site, seconds, share."""
        import pandas as pd

        here = [one for one in self.profiles if (one.shape, one.dtype) == (shape, dtype)]
        rows = [(one.work, one.site, one.seconds, one.share) for one in here]
        return pd.DataFrame(rows, columns=["work", "site", "seconds", "share"])

    def lengths(self, dtype: str = "float32") -> pd.DataFrame:
        """Decoding and memory by length of the text, tidy, for `figures.cost_by_length`.

        Columns: contender, tokens, seconds (to decode one more token), cache and peak (bytes held after reading so
        many tokens, and at most while reading them). What was not measured is NaN.
        """
        import pandas as pd

        columns = {DECODE: "seconds", CACHE: "cache", PEAK: "peak"}
        shapes = {one.shape for one in self.measurements if one.what == PEAK}
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for one in self.measurements:
            here = one.shape in shapes and one.dtype == dtype and one.what in columns
            if here and not one.contender.startswith(ROOFLINE):
                rows.setdefault((one.contender, one.at), {})[columns[one.what]] = one.median
        found = [{"contender": contender, "tokens": at, **row} for (contender, at), row in rows.items()]
        return pd.DataFrame(found, columns=["contender", "tokens", *columns.values()])

    def subjects(self) -> list[tuple[str, str, str, int]]:
        """All that was compared, in the order in which it was measured: shape, dtype, what, at."""
        return list(dict.fromkeys(one.subject for one in self.measurements))

    def rows(self, subject: tuple[str, str, str, int]) -> list[Measurement]:
        """Ours first, then theirs, best first; the roofline last."""
        rows = [one for one in self.measurements if one.subject == subject]
        order = (OURS, OURS_COMPILED, PORTABLE)

        def place(one: Measurement) -> tuple[int, float]:
            if one.contender in order:
                return order.index(one.contender), 0.0
            return (4 if one.contender.startswith(ROOFLINE) else 3), one.median

        return sorted(rows, key=place)

    def to_json(self) -> str:
        """All raw values, and what follows from them."""
        derived = {
            "comparisons": [asdict(one) | {"median": one.median} for one in self.comparisons()],
            "growth": [asdict(one) | {"median": one.median} for one in self.growth()],
            "roofline_shares": [
                dict(zip(("shape", "dtype", "what", "at"), row.subject, strict=True))
                | {"contender": row.contender, "share": share}
                for row, share in self.shares()
            ],
        }
        return json.dumps(asdict(self) | derived, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        return cls(
            machine=raw["machine"],
            notes=tuple(raw["notes"]),
            parity=tuple(Parity(**one) for one in raw["parity"]),
            measurements=tuple(Measurement(**one | {"values": tuple(one["values"])}) for one in raw["measurements"]),
            profiles=tuple(Moment(**one) for one in raw["profiles"]),
        )


def ratios(theirs: Measurement, ours: Measurement) -> tuple[float, ...]:
    """Theirs / ours, repeat by repeat; nothing is less than a nanosecond or a byte."""
    least = 1e-9 if ours.unit == "s" else 1.0
    return tuple(b / max(a, least) for a, b in zip(ours.values, theirs.values, strict=True))
