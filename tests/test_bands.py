"""Bands are an economy: whatever the tiles, the window and the road, they give what the plain definition gives."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_lab.model import bands as module
from mixtral_lab.model.attention import RollingCache, attend_plain, visible
from mixtral_lab.model.bands import Band, attend_banded, bands, by_kernel, ends, head_by_head, products_pay, together
from mixtral_lab.model.linear import portable

ROADS = (together, head_by_head, by_kernel)


@contextmanager
def on(road):
    """Take this road for every band, whatever would pay."""
    with (
        mock.patch.object(module, "products_pay", lambda *_: road is not by_kernel),
        mock.patch.object(module, "fit_at_once", lambda *_: road is together),
    ):
        yield


def seen_by(queries: int, keys: int, window: int | None):
    at = torch.arange(keys)[None]
    return visible(at[:, keys - queries :], at, window)


def draw(batch, kv, group, queries, keys, head_dim, dtype=torch.float32):
    query = torch.randn(batch, kv, group, queries, head_dim)
    key, value = torch.randn(2, batch, kv, keys, head_dim).unbind()
    return query.to(dtype), key.to(dtype), value.to(dtype)


@st.composite
def shapes(draw, longest: int = 40):
    """Sizes of one call: more keys than queries, windows and tiles smaller and larger than everything else."""
    queries, past = draw(st.integers(1, longest)), draw(st.integers(0, longest))
    return dict(
        sizes=(
            draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3)),
            queries, queries + past, draw(st.sampled_from([2, 8, 32])),
        ),
        window=draw(st.none() | st.integers(1, longest + 5)),
        tile=draw(st.integers(1, longest + 5)),
    )  # fmt: skip


def test_five_queries_after_four_columns():
    assert bands(5, 9, window=3, tile=4) == [Band(0, 4, 0, 8), Band(4, 5, 4, 9)]
    assert bands(5, 9, window=None, tile=4) == [Band(0, 4, 0, 8), Band(4, 5, 0, 9)]
    assert bands(3, 9, window=1, tile=4) == [Band(0, 2, 4, 8), Band(2, 3, 8, 9)]


def test_the_ends_of_a_band_by_hand():
    nothing = -torch.inf
    unseen = ends(Band(6, 8, 2, 8), 4, torch.zeros(()))  # the picture at the head of bands.py
    assert unseen.left.tolist() == [[nothing, 0.0], [nothing, nothing]]
    assert unseen.right.tolist() == [[0.0, nothing], [0.0, 0.0]]
    assert ends(Band(6, 8, 0, 8), None, torch.zeros(())).left.shape == (2, 0)


@settings(max_examples=100)
@given(shapes())
def test_bands_are_exactly_what_is_visible(shape):
    """Each query stands in one band, sees nothing outside it, and inside it what the ends leave."""
    queries, keys = shape["sizes"][3:5]
    window, tile = shape["window"], shape["tile"]
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    times = torch.zeros(queries, dtype=torch.int)
    for band in bands(queries, keys, window, tile):
        unseen = ends(band, window, torch.zeros(()))
        scores = torch.zeros(band.stop - band.start, band.last - band.first)
        module.hide(scores, unseen)
        seen[band.start : band.stop, band.first : band.last] = scores == 0
        times[band.start : band.stop] += 1
        assert band.stop - band.start <= tile
        assert band.first % tile == 0
        if window is not None:
            assert band.last - band.first < window + 2 * tile
    assert (times == 1).all()
    assert torch.equal(seen, seen_by(queries, keys, window)[0])


@settings(max_examples=60)
@given(shapes(), st.sampled_from(ROADS))
def test_every_road_is_the_plain_definition(shape, road):
    query, key, value = draw(*shape["sizes"])
    mask = seen_by(query.shape[3], key.shape[2], shape["window"])
    with on(road), torch.no_grad():
        out = attend_banded(query, key, value, shape["window"], shape["tile"])
    torch.testing.assert_close(out, attend_plain(query, key, value, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 63, 64, 65, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("past", [0, 1, 128, 200])
@pytest.mark.parametrize("window", [None, 1, 64, 128, 129, 5000])
def test_the_default_is_the_plain_definition_at_every_edge(queries, past, window, dtype):
    query, key, value = draw(1, 2, 2, queries, queries + past, 16, dtype)
    mask = seen_by(queries, queries + past, window)
    with torch.no_grad():
        out = attend_banded(query, key, value, window)
    assert out.dtype == dtype
    expected = attend_plain(query.float(), key.float(), value.float(), mask)
    close = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.float(), expected, atol=close, rtol=0)


@given(shapes(), st.sampled_from(ROADS))
def test_bfloat16_stays_as_near_to_float32_as_the_plain_definition(shape, road):
    """Scores and patterns are rounded to 8 bits on the way: values of size 1 to 3 come out within 0.03."""
    query, key, value = draw(*shape["sizes"], torch.bfloat16)
    mask = seen_by(query.shape[3], key.shape[2], shape["window"])
    exact = attend_plain(query.float(), key.float(), value.float(), mask)
    with on(road), torch.no_grad():
        off = (attend_banded(query, key, value, shape["window"], shape["tile"]).float() - exact).abs()
    plain_off = (attend_plain(query, key, value, mask).float() - exact).abs()
    assert off.max() < 0.03
    assert off.mean() < 1.5 * plain_off.mean() + 1e-4


def test_softmax_of_bfloat16_is_computed_in_float32():
    scores = (torch.randn(64, 4000) * 4).bfloat16()
    wide = F.softmax(scores, dim=-1, dtype=torch.float32).bfloat16()
    torch.testing.assert_close(F.softmax(scores, dim=-1), wide, rtol=2**-8, atol=0)


@pytest.mark.parametrize("road", [*ROADS, None])
@settings(max_examples=10)
@given(shapes(longest=20))
def test_gradients_are_those_of_the_plain_definition(road, shape):
    query, key, value = draw(*shape["sizes"])
    window = shape["window"]
    mask = seen_by(query.shape[3], key.shape[2], window)
    grads = []
    for attend in (
        lambda *parts: attend_plain(*parts, mask),
        lambda *parts: attend_banded(*parts, window, shape["tile"]),
    ):
        parts = [part.clone().requires_grad_() for part in (query, key, value)]
        if road is None:
            out = attend(*parts)
        else:
            with on(road):
                out = attend(*parts)
        grads.append(torch.autograd.grad((out * out.detach().cos()).sum(), parts))
    for ours, plain in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 12), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 9))
def test_chunks_after_the_rolling_cache_are_the_whole_text(window, sizes, tile):
    total = sum(sizes)
    query, key, value = draw(2, 2, 2, total, total, 8)
    whole = attend_plain(query, key, value, seen_by(total, total, window))
    cache = RollingCache(*torch.zeros(2, 2, 2, min(window, total), 8).unbind())
    parts = []
    for part in torch.arange(total).split(sizes):
        keys, values = cache.extend(key[:, :, part], value[:, :, part])
        parts.append(attend_banded(query[:, :, :, part], keys, values, window, tile))
    torch.testing.assert_close(torch.cat(parts, dim=3), whole, atol=1e-5, rtol=1e-4)


def test_each_road_is_taken_where_it_pays(processor):
    taken = []

    def watched(road):
        return lambda *parts: (taken.append(road.__name__), road(*parts))[1]

    def road(queries, dtype=torch.float32, window=None, grad=False):
        query, key, value = draw(1, 2, 2, queries, queries, 8, dtype)
        taken.clear()
        attend_banded(query.requires_grad_(grad), key, value, window)
        return set(taken)

    with (
        mock.patch.object(module, "together", watched(together)),
        mock.patch.object(module, "head_by_head", watched(head_by_head)),
        mock.patch.object(module, "by_kernel", watched(by_kernel)),
        mock.patch.object(module, "attend_causal", watched(module.attend_causal)),
    ):
        assert road(255) == {"attend_causal"}
        assert road(255, window=20) == {"by_kernel"}
        assert road(90, torch.bfloat16) == {"attend_causal"}
        if processor == "AMD":
            assert road(256) == road(256, window=20) == {"together"}
            assert road(2000) == {"together"}
            assert road(3000) == {"head_by_head"}
            assert road(91, torch.bfloat16) == road(2000, torch.bfloat16) == {"together"}
        else:
            assert road(3000) == road(2000, torch.bfloat16) == {"attend_causal"}
            assert road(3000, window=20) == road(2000, torch.bfloat16, window=20) == {"by_kernel"}
        assert road(300, grad=True) == {"attend_causal"}
        assert road(300, window=20, grad=True) == {"by_kernel"}


def test_without_onednn_the_answer_is_the_same(processor):
    query, key, value = draw(1, 2, 2, 300, 300, 16)
    with on(head_by_head), torch.no_grad():
        tuned = attend_banded(query, key, value, 100)
        with mock.patch("mixtral_lab.model.linear.onednn_works", lambda: False):
            portable = attend_banded(query, key, value, 100)
    torch.testing.assert_close(tuned, portable, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that any single operation gave back."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor):
                self.numbers = max(self.numbers, part.numel())
        return out


@pytest.mark.parametrize("road", ROADS)
def test_no_more_is_held_than_one_tile_by_one_band(road):
    batch, kv, group, seq, head_dim, window, tile = 1, 4, 2, 4096, 1, 64, 32
    query, key, value = draw(batch, kv, group, seq, seq, head_dim)
    with on(road), torch.no_grad(), Largest() as largest:
        attend_banded(query, key, value, window, tile)
    heads = {together: kv * group, head_by_head: group, by_kernel: group}[road]  # the kernel's mask, for its rows
    assert largest.numbers <= max(query.numel(), heads * tile * (window + 2 * tile))
    assert largest.numbers < seq * seq / 100


def test_fewer_keys_than_queries_and_an_empty_window_are_refused():
    query, key, value = draw(1, 1, 1, 5, 4, 2)
    with pytest.raises(ValueError, match=r"found 5 queries but 4 keys.*after those of the cache"):
        attend_banded(query, key, value, None)
    with pytest.raises(ValueError, match=r"found a window of 0.*1 or more"):
        attend_banded(query[:, :, :, :3], key, value, 0)


@pytest.mark.parametrize(
    ("dtype", "amd", "wide", "pays"),
    [
        (torch.float32, True, True, True),
        (torch.float32, True, False, False),  # Zen 4
        (torch.float32, False, False, False),
        (torch.bfloat16, True, False, True),
        (torch.bfloat16, False, False, False),
    ],
)
def test_products_are_for_the_processors_on_which_they_pay(dtype, amd, wide, pays, monkeypatch):
    monkeypatch.setattr(module, "amd", lambda: amd)
    monkeypatch.setattr(module, "wide", lambda: wide)
    query, key, value = draw(1, 2, 1, 512, 512, 8, dtype)
    assert products_pay(query, key, value) is pays
    assert not products_pay(query[:, :, :, :2], key, key)  # little to do
    assert not products_pay(query.requires_grad_(), key, key)
    with portable():  # where float32 has no faster product
        assert products_pay(query.detach(), key, key) is (pays and dtype != torch.float32)
