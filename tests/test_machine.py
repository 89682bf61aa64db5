"""What fits a machine: by hand for a published shape, and in general."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab import PRESETS, figures
from mixtral_lab.figures import FigureError
from mixtral_lab.machine import Machine, MachineError, Rooflines, describe, what_fits
from mixtral_lab.weights import free_memory

BIG = PRESETS["mixtral-8x7b"].config
GB = 1e9


def row(fits, dtype, experts):
    (found,) = fits[(fits["dtype"] == dtype) & (fits["experts"] == experts)].to_dict("records")
    return found


def test_mixtral_8x7b_by_hand():
    fits = what_fits(BIG, Machine(24 * GB, 1000 * GB, 25 * GB), length=4096)
    one = 3 * 4096 * 14336 * 32  # an expert in all layers
    rest = 46_702_792_704 - 8 * one
    assert row(fits, "bfloat16", "as the rest")["resident"] == 0, "two experts of eight are 22.5 GB"
    int4 = row(fits, "bfloat16", "int4")
    size = one * (0.5 + 4 / 128)
    cache = 2 * 32 * 8 * 128 * 4096 * 2
    assert int4["weights"] == pytest.approx(rest * 2 + 8 * size)
    assert int4["cache"] == cache
    assert int4["resident"] == (24 * GB * 0.9 - rest * 2 - cache) // size == 5
    read = (rest - 32000 * 4096) * 2 + 2 * size + cache
    missed = 2 * size * 3 / 8
    assert int4["read"] == pytest.approx(read)
    assert int4["missed"] == pytest.approx(missed)
    assert int4["rate"] == pytest.approx(1 / (read / (1000 * GB) + missed / (25 * GB)))


def test_with_room_for_all_the_rate_is_bandwidth_over_active_bytes():
    fits = what_fits(BIG, Machine(1000 * GB, 2000 * GB), length=1)
    whole = row(fits, "bfloat16", "as the rest")
    assert whole["resident"] == 8
    assert whole["missed"] == 0
    active = 2 * (BIG.active_parameters - BIG.vocab * BIG.dim) + BIG.cache_bytes(1)
    assert whole["rate"] == pytest.approx(2000 * GB / active)


def test_without_a_link_all_experts_must_fit():
    fits = what_fits(BIG, Machine(60 * GB, 100 * GB), length=4096)
    assert row(fits, "bfloat16", "as the rest")["resident"] == 0
    assert math.isnan(row(fits, "bfloat16", "as the rest")["rate"])
    assert row(fits, "bfloat16", "int8")["resident"] == 8


def test_a_dense_model_fits_or_does_not():
    fits = what_fits(PRESETS["mistral-7b-v0.1"].config, Machine(17 * GB, 100 * GB, 10 * GB), length=4096)
    assert set(fits["resident"]) == {0, 1}
    assert row(fits, "bfloat16", "as the rest")["resident"] == 1


@given(
    name=st.sampled_from(list(PRESETS)),
    memory=st.floats(1e8, 1e12),
    more=st.floats(1, 10),
    length=st.integers(1, 10**5),
)
def test_more_memory_never_hurts(name, memory, more, length):
    config = PRESETS[name].config
    less = what_fits(config, Machine(memory, 1e11, 1e10), length)
    roomy = what_fits(config, Machine(memory * more, 1e11, 1e10), length)
    assert (roomy["resident"] >= less["resident"]).all()
    assert (roomy["rate"].fillna(0) >= less["rate"].fillna(0) * (1 - 1e-12)).all()


def test_a_machine_is_described_or_measured():
    assert describe(None, 1e9, 2e9) == Machine(1e9, 2e9, None)
    here = describe("cpu", link=1e9)
    assert 0 < here.memory <= 2 * free_memory("cpu")
    assert here.bandwidth > 1e8
    assert here.link == 1e9
    assert Rooflines(torch.device("cpu")).link() is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Machine(0.0, 1.0), "memory is 0"),
        (lambda: Machine(1.0, float("nan")), "bandwidth is nan"),
        (lambda: Machine(1.0, 1.0, -1.0), "link is -1"),
        (lambda: describe(None, 1e9), "give both the memory and its bandwidth"),
        (lambda: describe("cpu", memory=0.0, bandwidth=1e9), "memory is 0"),
        (lambda: describe("xpu:9"), "There is no device xpu:9 here"),
        (lambda: describe("nonsense"), "There is no device nonsense here"),
        (lambda: what_fits(BIG, Machine(1.0, 1.0), 0), "length is 0 tokens"),
    ],
)
def test_impossible_machines_are_refused(call, words):
    with pytest.raises(MachineError, match=words):
        call()


def test_the_figure_draws_the_table():
    fits = what_fits(BIG, Machine(24 * GB, 1000 * GB, 25 * GB), 4096)
    weights, cache, rate = figures.what_fits(fits, 24 * GB, "<b>").data
    assert list(weights.x) == list(fits["weights"] / GB)
    assert list(cache.x) == list(fits["cache"] / GB)
    assert list(rate.x) == list(fits["rate"].fillna(0))
    assert rate.text[0] == "does not fit"
    assert rate.text[-1] == "10.1 tokens/s, 5 of 8 experts kept"
    assert list(weights.marker.opacity) == [0.25, 1, 1, 0.25, 1, 1]
    with pytest.raises(FigureError, match="empty"):
        figures.what_fits(fits[:0], 1e9)
