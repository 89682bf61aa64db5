"""The benchmark on a very small shape: what it reports hangs together. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException
from tqdm import tqdm
from typer.testing import CliRunner

from mixtral_lab import bench, cli
from mixtral_lab.bench import (
    OURS,
    OURS_COMPILED,
    PORTABLE,
    ROOFLINE,
    THEIRS,
    BenchError,
    Lengths,
    Report,
    Shape,
    fresh,
    sides,
    timing,
)
from mixtral_lab.bench.report import CACHE, COMPILED, DECODE, PEAK, PREFILL, RECORDING, Measurement
from mixtral_lab.bench.sections import FEW, RECORDED, Sections
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.machine import Rooflines

TINY = Shape(
    "tiny",
    Config(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=61, context=128,
        n_experts=4, n_choices=2,
    ),
)  # fmt: skip
WINDOWED = Shape("tiny with a window", replace(TINY.config, window=8))
SHORT = Lengths(prompts=(12, 20), written=3, long=64, curve=(8, 32, 96), chunk=8)


@pytest.fixture(scope="module")
def here() -> pytest.MonkeyPatch:
    """Jobs run in this process, as a new one takes seconds to import everything, and nothing is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "in_new_process", fresh.in_this_process)
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(sides, "compile_decode", lambda _: sides.decode)
        yield patch


@pytest.fixture(scope="module")
def report(here) -> Report:
    return bench.run([TINY], dtypes=["float32"], device="cpu", repeats=2, lengths=SHORT, long_shape=WINDOWED)


def rows(report: Report, shape: Shape, what: str, at: int) -> dict[str, Measurement]:
    return {
        one.contender: one for one in report.measurements if (one.shape, one.what, one.at) == (shape.name, what, at)
    }


def timing_of(shape: Shape, folder: Path, repeats: int = 1) -> Sections:
    found = timing.Found()
    return Sections(
        shape, folder, torch.device("cpu"), torch.float32, repeats, Rooflines(torch.device("cpu")), found,
        tqdm(disable=True), lengths=SHORT,
    )  # fmt: skip


def test_every_quantity_is_there(report):
    assert report.subjects() == [
        *(("tiny", "float32", what, at) for what, at in (
            (PREFILL, 12), (PREFILL, 20), (DECODE, 12), (COMPILED, 12), (f"{DECODE}, int8", 12),
            (RECORDING, 12), (f"{PEAK}, {RECORDING}", 12),
            ("load", 0), ("load to first logits", 0), ("private memory", 0), ("peak memory", 0),
        )),
        *((WINDOWED.name, "float32", what, at) for what, at in (
            (PREFILL, 64), (DECODE, 8), (DECODE, 32), (DECODE, 96),
            (CACHE, 8), (CACHE, 32), (CACHE, 96), (PEAK, 8), (PEAK, 32), (PEAK, 96),
        )),
    ]  # fmt: skip
    assert len({(*one.subject, one.contender) for one in report.measurements}) == len(report.measurements)
    for one in report.measurements:
        once = one.what in (CACHE, PEAK, f"{PEAK}, {RECORDING}")
        often = one.shape == WINDOWED.name and one.what == DECODE  # each cache is written on a few times
        assert len(one.values) == (1 if once else 2 * FEW if often else 2)
        assert all(value >= 0 for value in one.values)
        assert one.unit == ("B" if "memory" in one.what or one.what == CACHE else "s")


def test_both_columns_of_ours_run_beside_the_variants_of_theirs(report):
    for at in SHORT.prompts:
        names = set(rows(report, TINY, PREFILL, at))
        assert {OURS, PORTABLE} <= names
        assert any(name.startswith(THEIRS) for name in names)
        assert sum(name.startswith(ROOFLINE) for name in names) == 1
    left_out = " ".join(report.notes)
    for variant in (*(f"sdpa, {experts}" for experts in sides.EXPERTS), "sdpa, grouped_mm, generate"):
        name = f"{THEIRS}: {variant}"
        assert name in rows(report, TINY, DECODE, 12) or f"{name}, " in left_out
    assert OURS_COMPILED in rows(report, TINY, COMPILED, 12)
    assert f"{THEIRS}: sdpa, batched_mm, compiled, static cache" in rows(report, TINY, COMPILED, 12)


def test_the_ratios_follow_from_the_values(report):
    comparisons = report.comparisons()
    assert {(one.what, one.at) for one in comparisons} >= {(PREFILL, 12), (DECODE, 12), (COMPILED, 12), ("load", 0)}
    for one in comparisons:
        subject = (one.shape, one.dtype, one.what, one.at)
        found = {row.contender: row for row in report.measurements if row.subject == subject}
        theirs = [row for name, row in found.items() if name.startswith(THEIRS)]
        assert found[one.best].median == min(row.median for row in theirs)
        if found[one.ours].unit == "s":
            expected = [b / a for a, b in zip(found[one.ours].values, found[one.best].values, strict=True)]
            assert one.ratios == pytest.approx(expected)
        assert one.median == statistics.median(one.ratios)


def made_up(what: str, at: int, contender: str, *values: float, unit: str = "s") -> Measurement:
    return Measurement("a", "float32", what, at, contender, unit, values)


def test_what_a_report_concludes_by_hand():
    report = Report(
        {}, (), (),
        (
            made_up(DECODE, 8, OURS, 2.0, 4.0, 2.0),
            made_up(DECODE, 8, PORTABLE, 4.0, 4.0, 4.0),
            made_up(DECODE, 8, "transformers: x", 9.0, 9.0, 9.0),
            made_up(DECODE, 8, "transformers: y", 6.0, 4.0, 8.0),
            made_up(DECODE, 8, "roofline: reading 1 MB", 1.0, 1.0, 1.0),
            made_up(DECODE, 64, OURS, 3.0, 4.0, 1.0),
        ),
    )  # fmt: skip
    ours, portable = report.comparisons()
    assert (ours.ours, ours.best, ours.ratios, ours.median) == (OURS, "transformers: y", (3.0, 1.0, 4.0), 3.0)
    assert (portable.ours, portable.best, portable.ratios) == (PORTABLE, "transformers: y", (1.5, 1.0, 2.0))
    shares = {row.contender: share for row, share in report.shares()}
    assert shares == {OURS: 0.5, PORTABLE: 0.25, "transformers: x": 1 / 9, "transformers: y": 1 / 6}
    (growth,) = report.growth()
    assert (growth.contender, growth.shortest, growth.longest) == (OURS, 8, 64)
    assert growth.ratios == (1.5, 1.0, 0.5)
    assert growth.median == 1.0


def test_parity_is_checked_for_everyone_who_runs(report):
    checked = {one.contender for one in report.parity if one.shape == "tiny"}
    variants = {f"{THEIRS}: {attention}, {experts}" for attention in timing.ATTENTION for experts in sides.EXPERTS}
    compiled = {OURS_COMPILED, f"{THEIRS}: sdpa, batched_mm, compiled, static cache"}
    assert checked == {PORTABLE} | variants | compiled
    for one in report.parity:
        assert 0 <= one.largest <= timing.LARGEST
        assert 0 <= one.typical < 1e-5


def test_the_cache_is_exactly_the_window(report):
    for at in SHORT.curve:
        found = rows(report, WINDOWED, CACHE, at)
        bytes_of_the_window = 2 * 2 * 2 * 8 * 8 * 4  # keys and values, layers, kv heads, window, head_dim, float32
        assert found[OURS].median == bytes_of_the_window
        assert found[f"{ROOFLINE}: keys and values in sight"].median == bytes_of_the_window
    at_once = rows(report, WINDOWED, CACHE, 32)[f"{THEIRS}: sdpa, grouped_mm"]
    assert at_once.median == bytes_of_the_window * 32 // 8  # transformers holds the whole prompt until its first step
    assert f"{THEIRS}: sdpa, grouped_mm" not in rows(report, WINDOWED, CACHE, 96)  # longer than `long`: too slow


def test_length_is_raced_as_sides_are(report):
    assert {one.contender for one in report.growth()} == set(rows(report, WINDOWED, DECODE, 8))
    for one in report.growth():
        assert (one.shortest, one.longest, len(one.ratios)) == (8, 96, 2 * FEW)
    frame = report.lengths()
    assert list(frame.columns) == ["contender", "tokens", "seconds", "cache", "peak"]
    ours = frame[frame.contender == OURS]
    assert ours.tokens.tolist() == list(SHORT.curve)
    assert ours.notna().all().all()
    assert frame.contender.nunique() == 3
    assert not len(report.lengths("float16"))


def test_recording_is_raced_against_our_own_pass(report):
    for what in (RECORDING, f"{PEAK}, {RECORDING}"):
        assert set(rows(report, TINY, what, 12)) == {OURS, *(f"{OURS}, recording {kept}" for kept in RECORDED)}
    assert not [one for one in report.comparisons() if one.what == RECORDING]


def test_the_profile_is_part_of_it(report):
    frame = report.profile("tiny")
    assert set(frame.work) == {"prefill", "decode"}
    assert frame.groupby("work").share.sum().tolist() == pytest.approx([1, 1])
    assert sum("looking on" in note for note in report.notes) == 2


def test_it_says_where_and_with_what(report):
    machine = report.machine
    assert machine["torch"] == torch.__version__
    assert machine["device"] == "cpu"
    assert {"processor", "cores", "memory", "system", "python", "transformers", "memory bandwidth"} <= machine.keys()
    assert "GFLOP/s" in machine["matrix products, float32"]
    assert "random weights" in report.notes[0]


def test_json_round_trip(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    written = json.loads(text)
    assert [one["median"] for one in written["comparisons"]] == [one.median for one in report.comparisons()]
    assert len(written["roofline_shares"]) == len(report.shares()) > 0


def test_the_table_shows_every_contender(report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.table(report))
    text = console.export_text()
    for one in report.measurements:
        assert one.contender in text
        assert one.label in text
    assert report.machine["torch"] in text
    assert f"{OURS}: a token after 96 takes" in text
    assert "attention projections" in text


# --- What it refuses, and what it leaves out


def test_loading_is_timed_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_new_process", fresh.in_new_process)
    folder = TINY.write(torch.float32, tmp_path / "checkpoint")
    sections = timing_of(TINY, folder)
    sections.load()
    found = {(one.what, one.contender): one for one in sections.found.measurements}
    assert len(found) == len(sections.found.measurements) == 8
    for who in (OURS, THEIRS):
        assert 0 < found["load", who].median < found["load to first logits", who].median


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(BenchError, match="There is no file or folder"):
        fresh.in_new_process(
            "load", side={"who": OURS}, folder=str(tmp_path / "nothing"), device="cpu", dtype="float32"
        )


def test_a_job_that_does_not_exist():
    with pytest.raises(BenchError, match="no job 'sing': there are load, lengths, record"):
        fresh.in_this_process("sing")


def test_a_section_that_does_not_exist():
    with pytest.raises(BenchError, match="no section sing: there are prefill, "):
        bench.run([TINY], only=["prefill", "sing"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_model_is_not_timed(monkeypatch, dtype):
    def broken(*args):
        model = load_model(*args)
        model.layers[0].attention_norm.weight.data = model.layers[0].attention_norm.weight * 40
        return model

    load_model = timing.load_model
    monkeypatch.setattr(timing, "load_model", broken)
    monkeypatch.setattr(timing.Timing, "race", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(BenchError, match="nothing was timed"):
        bench.run([TINY], dtypes=[dtype], device="cpu", repeats=1, only=["prefill"], lengths=SHORT)


def test_a_variant_that_would_fill_the_memory_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr("mixtral_lab.bench.sections.free_memory", lambda _: 10_000)
    report = bench.run([TINY], dtypes=["float32"], device="cpu", repeats=1, only=["prefill"], lengths=SHORT)
    assert not any("batched_mm" in name for name in rows(report, TINY, PREFILL, 12))
    assert any("left out of prefill, 12" in note and "batched_mm" in note for note in report.notes)


class Sleeper:
    """A side whose work takes as long as it says, by a clock that the test turns."""

    def __init__(self, name: str, seconds: float, clock: list[float]) -> None:
        self.name, self.seconds, self.clock, self.prompts = name, seconds, clock, []

    def prefill(self, ids):
        self.prompts.append(ids)
        return lambda: self.clock.append(self.clock[-1] + self.seconds)


def test_a_race_with_known_times(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[-1])
    racers = [Sleeper(name, seconds, clock) for name, seconds in (
        (OURS, 70.0), ("transformers: a", 10.0), ("transformers: b", 30.0), ("transformers: c", 31.0),
    )]  # fmt: skip
    sections = timing_of(TINY, tmp_path, repeats=3)
    found = sections.race(
        PREFILL, 5, racers, lambda side, ids, _: side.prefill(ids), per=2, roof=("a roof", lambda: 1.0)
    )
    assert {one.contender: one.values for one in found} == {
        OURS: (35.0,) * 3,
        "transformers: a": (5.0,) * 3,
        "transformers: b": (15.0,) * 3,  # not more than three times the best
        "roofline: a roof": (1.0,) * 3,
    }
    assert found == sections.found.measurements
    (note,) = sections.found.notes
    assert "left out of prefill, 5: transformers: c, 3.1 times the best" in note
    assert [len(racer.prompts) for racer in racers] == [4, 4, 4, 1]  # one to warm up
    assert len({tuple(ids.flatten().tolist()) for ids in racers[0].prompts}) == 4  # never the same prompt
    for a, b in zip(racers[0].prompts[1:], racers[1].prompts[1:], strict=True):
        assert torch.equal(a, b)  # but the same for all in a repeat


def test_both_sides_compile():
    """In a process without the checks of shapes that the tests put everywhere: `torch.compile` cannot see through them."""
    script = """
from mixtral_lab import bench
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.machine import Rooflines
config = Config(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=61, context=128,
                n_experts=4, n_choices=2)
shape, lengths = bench.Shape("one layer", config), bench.Lengths(prompts=(12,), written=3)
print(bench.run([shape], ["float32"], "cpu", 1, ["decode"], lengths).to_json())
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert not answer.returncode, answer.stderr
    report = Report.from_json(answer.stdout)
    compiled = {one.contender for one in report.measurements if one.what == COMPILED}
    assert compiled >= {OURS_COMPILED, f"{THEIRS}: sdpa, batched_mm, compiled, static cache"}, report.notes
    assert compiled <= {one.contender for one in report.parity} | {one for one in compiled if one.startswith(ROOFLINE)}


def test_where_nothing_can_be_compiled_the_rest_is_still_reported(monkeypatch):
    def no_compiler(_):
        raise TorchDynamoException("No working C++ compiler\nwas found")

    monkeypatch.setattr(sides, "compile_decode", no_compiler)
    report = bench.run([TINY], dtypes=["float32"], device="cpu", repeats=1, only=["decode"], lengths=SHORT)
    assert {one.what for one in report.measurements} == {DECODE}
    assert any("left out: decode, compiled: No working C++ compiler" in note for note in report.notes)


# --- The command


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, here):
    monkeypatch.setattr(bench, "usual_shapes", lambda: [TINY, TINY])
    monkeypatch.setattr(bench.sections, "Lengths", lambda: SHORT)
    path = tmp_path / "report.json"
    words = ["bench", "--only", "profile", "--dtype", "bfloat16", "--repeats", "1", "--small", "--json", str(path)]
    result = CliRunner().invoke(cli.app, [*words, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    report = Report.from_json(path.read_text("utf-8"))
    assert {(one.shape, one.dtype) for one in report.profiles} == {("tiny", "bfloat16")}
    assert not report.measurements
    assert "tiny, bfloat16: where the time goes" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "prefil"], "There is no section prefil"),
        (["--plot", "a.gif"], "needs a name that ends in .html or .png"),
        (["--plot", "a.html", "--only", "load"], "and the part long"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_the_command_refuses_in_one_sentence(words, says):
    result = CliRunner().invoke(cli.app, ["bench", *words])
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())


def test_the_command_draws_what_length_costs(monkeypatch, tmp_path, report):
    monkeypatch.setattr(bench, "run", lambda *_, **__: report)
    path = tmp_path / "lengths.html"
    result = CliRunner().invoke(cli.app, ["bench", "--dtype", "float32", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert "What length costs" in path.read_text("utf-8")


def test_a_picture_that_no_browser_draws_becomes_a_page(monkeypatch, tmp_path, report):
    def refuse(*_, **__):
        raise RuntimeError("\nKaleido requires Google Chrome to be installed.\n\nEither download ...")

    monkeypatch.setattr(bench, "run", lambda *_, **__: report)
    monkeypatch.setattr("plotly.graph_objects.Figure.write_image", refuse)
    result = CliRunner().invoke(cli.app, ["bench", "--dtype", "float32", "--plot", str(tmp_path / "a.png")])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "was instead. Kaleido said: Kaleido requires Google Chrome" in said
    assert "What length costs" in (tmp_path / "a.png.html").read_text("utf-8")


def test_rounded_experts_are_timed_against_the_bytes_that_they_take(report):
    found = rows(report, TINY, f"{DECODE}, int8", 12)
    read = TINY.config.active_parameters - 60 * 16  # one row of the embedding
    experts = 2 * 2 * 3 * 16 * 24
    assert TINY.read_per_token == read and TINY.read_of_experts == experts
    assert set(found) == {OURS, f"{ROOFLINE}: reading {(4 * (read - experts) + experts) / 1e6:,.0f} MB"}
    assert "left out: decode, int4: " in " ".join(report.notes)  # 24 columns are not cut into groups of 32


def test_published_shapes(tmp_path):
    shape = bench.published("mixtral-8x7b", 4)
    assert shape.name == "mixtral-8x7b, 4 layers"
    assert (shape.config.dim, shape.config.hidden, shape.config.n_layers, shape.config.vocab) == (4096, 14336, 4, 32000)
    assert bench.published("mixtral-8x7b").config == PRESETS["mixtral-8x7b"].config
    for name, layers, says in (
        (
            "mistral-7b-v0.1",
            None,
            "no mixture of experts 'mistral-7b-v0.1' to take the shape of: there are mini-mixtral, mixtral",
        ),
        ("mixtral-8x7b", 33, "has 32 layers: 33 of them"),
        ("mixtral-8x7b", 0, "has 32 layers: 0 of them"),
    ):
        with pytest.raises(BenchError, match=says):
            bench.published(name, layers)


def test_the_command_times_a_published_shape(here, monkeypatch, tmp_path):
    preset = PRESETS["mixtral-8x7b"]
    small = replace(
        preset, config=replace(preset.config, dim=64, n_heads=4, n_kv_heads=2, head_dim=8, hidden=64, vocab=61)
    )
    monkeypatch.setitem(PRESETS, "mixtral-8x7b", small)
    path = tmp_path / "report.json"
    words = ["--shape", "mixtral-8x7b", "--layers", "2", "--only", "rounded", "--dtype", "bfloat16", "--repeats", "1"]
    result = CliRunner().invoke(cli.app, ["bench", *words, "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = Report.from_json(path.read_text())
    assert {(one.shape, one.dtype, one.what) for one in found.measurements} == {
        ("mixtral-8x7b, 2 layers", "bfloat16", "decode, int8"), ("mixtral-8x7b, 2 layers", "bfloat16", "decode, int4")
    }  # fmt: skip
    wrong = CliRunner().invoke(cli.app, ["bench", "--layers", "2"])
    assert wrong.exit_code == 1 and "--layers goes with --shape" in wrong.output
