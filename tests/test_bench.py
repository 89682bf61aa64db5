"""The benchmark on a very small shape: what it reports hangs together. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from rich.console import Console
from tqdm import tqdm

from mixtral_lab import bench
from mixtral_lab.bench import ATTENTION, EXPERTS, OURS, THEIRS, BenchError, Report, Shape
from mixtral_lab.config import Config

TINY = Shape(
    "tiny",
    Config(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=61, context=128,
        n_experts=4, n_choices=2,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    """One whole run, except that loading is timed in this process: a new one takes seconds to import everything."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_load_in_new_process", bench.load_one)
        return bench.run([TINY], device="cpu", repeats=2, prompt=12, written=3)


def test_every_row_is_there(report):
    rows = {}
    for one in report.measurements:
        assert one.shape == "tiny"
        assert len(one.values) == 2
        assert all(value >= 0 for value in one.values)
        rows.setdefault(one.what, []).append(one.contender)
    assert list(rows) == [
        "prefill 12 tokens", "decode 3 tokens", "load", "load to first logits", "private memory", "peak memory",
    ]  # fmt: skip
    assert len(rows["prefill 12 tokens"]) == 1 + len(EXPERTS)
    assert len(rows["decode 3 tokens"]) == 1 + 2 * len(EXPERTS)
    for contenders in rows.values():
        assert OURS in contenders
        assert len(set(contenders)) == len(contenders) > 1


def test_the_ratios_follow_from_the_values(report):
    comparisons = report.comparisons()
    assert [one.what for one in comparisons] == list(dict.fromkeys(one.what for one in report.measurements))
    for one in comparisons:
        rows = {row.contender: row for row in report.measurements if row.what == one.what}
        theirs = [row for name, row in rows.items() if name != OURS]
        assert rows[one.best].median == min(row.median for row in theirs)
        if rows[OURS].unit == "s":
            expected = [b / a for a, b in zip(rows[OURS].values, rows[one.best].values, strict=True)]
            assert one.ratios == pytest.approx(expected)
        assert one.median == statistics.median(one.ratios)


def test_parity_is_checked_for_every_variant(report):
    assert len(report.parity) == len({one.contender for one in report.parity}) == len(ATTENTION) * len(EXPERTS)
    for one in report.parity:
        assert 0 <= one.typical <= one.largest <= bench.LARGEST


def test_it_says_where_and_with_what(report):
    machine = report.machine
    assert machine["torch"] == torch.__version__
    assert machine["dtype"] == "float32"
    assert machine["device"] == "cpu"
    assert {"processor", "cores", "memory", "system", "python", "transformers"} <= machine.keys()
    assert "random weights" in report.notes[0]


def test_json_round_trip(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    written = json.loads(text)["comparisons"]
    assert [one["median"] for one in written] == [one.median for one in report.comparisons()]


def test_the_table_shows_every_contender(report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    for one in report.measurements:
        assert one.contender in text
        assert one.what in text
    assert report.machine["torch"] in text


def test_loading_is_timed_in_a_fresh_process(tmp_path):
    folder = bench._write_checkpoint(TINY, torch.float32, tmp_path / "checkpoint")
    found = bench._Bench(TINY, torch.device("cpu"), torch.float32, 1, tqdm(disable=True)).load(folder)
    rows = {(one.what, one.contender): one for one in found}
    assert len(rows) == len(found) == 8
    for who in (OURS, THEIRS):
        assert 0 < rows["load", who].median < rows["load to first logits", who].median


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(BenchError, match="There is no file or folder"):
        bench._load_in_new_process(OURS, tmp_path / "nothing", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_model_is_not_timed(monkeypatch, dtype):
    def broken(*args):
        model = load_model(*args)
        model.layers[0].attention_norm.weight.data = model.layers[0].attention_norm.weight * 40
        return model

    load_model = bench.load_model
    monkeypatch.setattr(bench, "load_model", broken)
    monkeypatch.setattr(bench._Bench, "time", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(BenchError, match="nothing was timed"):
        bench.run([TINY], dtype=dtype, device="cpu", repeats=1, prompt=4, written=1)


def test_a_variant_that_would_fill_the_memory_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda _: 10_000)
    monkeypatch.setattr(bench._Bench, "load", lambda *_: [])
    report = bench.run([TINY], device="cpu", repeats=1, prompt=12, written=1)
    prefill = [one.contender for one in report.measurements if one.what == "prefill 12 tokens"]
    assert not any("batched_mm" in name for name in prefill)
    assert any("left out" in note and "batched_mm" in note for note in report.notes)
