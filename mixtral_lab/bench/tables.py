"""A report as rich tables, for a terminal."""

from __future__ import annotations

import statistics

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mixtral_lab.bench.report import OURS, OURS_COMPILED, PORTABLE, THEIRS, Measurement, Report, ratios


def table(report: Report) -> Group:
    """The machine, a table for each shape and dtype, what length costs, the profiles, and the notes."""
    head = Table(box=None, show_header=False, pad_edge=False)
    for name, value in report.machine.items():
        head.add_row(name, value, style="dim")
    groups = dict.fromkeys((one.shape, one.dtype) for one in report.measurements)
    profiled = dict.fromkeys((one.shape, one.dtype) for one in report.profiles)
    return Group(
        head,
        *(_measured(report, *group) for group in groups),
        *(Text(line) for line in _lengths(report)),
        *(_profiled(report, *group) for group in profiled),
        *(Text(note, style="dim") for note in report.notes),
    )


def _measured(report: Report, shape: str, dtype: str) -> Table:
    apart = [one for one in report.parity if (one.shape, one.dtype) == (shape, dtype)]
    largest, typical = (max((getattr(one, kind) for one in apart), default=0.0) for kind in ("largest", "typical"))
    compared = f"Logits differ by at most {largest:.1e}, typically by {typical:.1e} of their length. " if apart else ""
    explained = "Decode: per token, after so many. Ratios are paired within a repeat: above 1, ours needs less."
    found = Table(
        title=f"{shape}, {dtype}: median of the repeats (lowest to highest)",
        caption=compared + explained,
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "contender", "median", "spread", f"times {OURS}", "times portable"):
        found.add_column(name, justify="left" if name in ("", "contender") else "right")
    for subject in report.subjects():
        if subject[:2] != (shape, dtype):
            continue
        rows = report.rows(subject)
        ours = next((row for row in rows if row.contender in (OURS, OURS_COMPILED)), None)
        portable = next((row for row in rows if row.contender == PORTABLE), None)
        best = next((row for row in rows if row.contender.startswith(THEIRS)), None)
        for row in rows:
            found.add_row(
                row.label if row is rows[0] else "",
                row.contender,
                written(row.median, row.unit),
                f"{written(min(row.values), row.unit)} to {written(max(row.values), row.unit)}",
                _times(row, ours),
                _times(row, portable),
                style="bold" if row is ours or row is best else "dim",
                end_section=row is rows[-1],
            )
    return found


def _lengths(report: Report) -> list[str]:
    return [
        f"{one.shape}, {one.dtype}, {one.contender}: a token after {one.longest:,} takes {_spread(one.ratios)} times the time "
        f"of one after {one.shortest:,}."
        for one in report.growth()
    ]


def _profiled(report: Report, shape: str, dtype: str) -> Table:
    found = Table(title=f"{shape}, {dtype}: where the time goes", box=box.SIMPLE_HEAD)
    moments = [one for one in report.profiles if (one.shape, one.dtype) == (shape, dtype)]
    works = list(dict.fromkeys(one.work for one in moments))
    found.add_column("site")
    for work in works:
        found.add_column(work, justify="right")
    for site in dict.fromkeys(one.site for one in moments):
        here = {one.work: f"{written(one.seconds, 's')}  {one.share:6.1%}" for one in moments if one.site == site}
        found.add_row(site, *(here.get(work, "") for work in works))
    return found


def _times(row: Measurement, ours: Measurement | None) -> str:
    """How many times as much as ours, paired."""
    return "" if ours is None or row is ours else _spread(ratios(row, ours))


def _spread(found: tuple[float, ...]) -> str:
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f}{spread}"


def written(value: float, unit: str) -> str:
    """A number of seconds or bytes with three or four digits."""
    if unit == "B":
        return f"{value / 1e6:,.0f} MB" if value >= 1e8 else f"{value / 1e6:,.2f} MB"
    if value < 1e-3:
        return f"{value * 1e6:,.1f} µs"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.2f} ms"
