"""Each idea of the model by itself: the plain definition is the economical version, decode is prefill."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import configs, mixtral

from mixtral_lab.config import Config, ConfigError
from mixtral_lab.model import Transformer
from mixtral_lab.model.attention import Attention, RollingCache, attend_masked, attend_one, attend_plain, visible
from mixtral_lab.model.linear import (
    Linear,
    linear,
    onednn_works,
    pack,
    packing_works,
    portable,
    rounded_up,
    row_fed_alike,
)
from mixtral_lab.model.moe import DISPATCH, Experts, Laid, Router, Routing, SwiGLU, mix_dense, route, take_sorted
from mixtral_lab.model.rope import rotate, rotation
from mixtral_lab.model.transformer import Block, RMSNorm
from mixtral_lab.sites import recording

pytestmark = pytest.mark.usefixtures("processor")


def random_model(config: Config) -> Transformer:
    model = Transformer(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@torch.no_grad()
def in_chunks(model, ids, sizes, padding=None):
    cache = model.new_cache(len(ids), ids.shape[1])
    out = torch.cat([model(part, cache, padding) for part in ids.split(sizes, dim=1)], dim=1)
    return out, cache


@st.composite
def chunkings(draw, total: int) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@settings(max_examples=25)
@given(configs() | configs(dense=True), chunkings(33), st.booleans(), st.booleans())
def test_decode_is_prefill_is_any_chunking(config, sizes, padded, plain):
    model = random_model(config)
    for block in model.layers:
        block.attention.plain = plain
    ids = torch.randint(config.vocab, (2, 33))
    padding = torch.tensor([0, 7]) if padded else None
    with torch.no_grad():
        whole = model(ids, padding=padding)
    for chunks in (sizes, [1] * 33, [33]):
        out, cache = in_chunks(model, ids, chunks, padding)
        torch.testing.assert_close(out[0], whole[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(out[1, 7:], whole[1, 7:], atol=1e-4, rtol=0)
        assert cache[0].ring == min(33, config.window or 33)


@settings(max_examples=25)
@given(configs(), st.integers(1, 9))
def test_the_plain_mixture_is_every_economical_one(config, seq):
    model = random_model(config)
    ids = torch.randint(config.vocab, (2, seq))
    outs = {}
    with torch.no_grad():
        for dispatch in (*DISPATCH, "auto", "dense"):
            for block in model.layers:
                block.experts.dispatch = dispatch
            outs[dispatch] = model(ids)
    for dispatch, out in outs.items():
        torch.testing.assert_close(out, outs["dense"], atol=1e-4, rtol=1e-4, msg=dispatch)


@given(configs())
def test_plain_attention_is_every_economical_one(config):
    seq = 12
    query = torch.randn(2, config.n_kv_heads, config.group, seq, config.head_dim)
    key, value = torch.randn(2, 2, config.n_kv_heads, seq, config.head_dim).unbind()
    at = torch.arange(seq)[None]
    mask = visible(at, at, config.window)
    plain = attend_plain(query, key, value, mask)
    torch.testing.assert_close(plain, attend_masked(query, key, value, mask), atol=1e-5, rtol=1e-4)
    one = query[:, :, :, -1:]
    torch.testing.assert_close(attend_one(one, key, value), attend_plain(one, key, value, None), atol=1e-5, rtol=1e-4)


def test_route_takes_the_best_and_shares_one_unit_of_weight():
    routing = route(torch.tensor([[2.0, 0.0, 1.0]]), 2)
    assert routing.experts.tolist() == [[0, 2]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.7311, 0.2689]]), atol=1e-4, rtol=0)


def test_a_window_of_three_sees_itself_and_two_before():
    at = torch.arange(6)[None]
    assert visible(at, at, 3)[0, 5].tolist() == [False, False, False, True, True, True]
    assert visible(at, at, None)[0, 2].tolist() == [True, True, True, False, False, False]


def test_padding_is_seen_by_no_text_and_sees_only_itself():
    at = torch.arange(-2, 3)[None]
    seen = visible(at, at, None)[0]
    assert not seen[2:, :2].any()
    assert seen[:2].tolist() == [[True, False, False, False, False], [False, True, False, False, False]]


@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_the_rolling_cache_keeps_position_p_in_slot_p_mod_ring(ring, sizes):
    cache = RollingCache(torch.full((1, 1, ring, 1), -1.0), torch.full((1, 1, ring, 1), -1.0))
    seen = 0
    for size in sizes:
        columns = cache.columns(size)
        new = torch.arange(seen, seen + size, dtype=torch.float32).view(1, 1, size, 1)
        keys, values = cache.extend(new, -new)
        assert keys.flatten().tolist() == columns.tolist() == (-values).flatten().tolist()
        as_it_lies = cache.keys[0, 0, : cache.filled, 0]
        if size == 1:
            assert sorted(as_it_lies.tolist()) == columns.tolist()
        seen += size
        for position in range(max(0, seen - ring), seen):
            assert cache.keys[0, 0, position % ring, 0] == position
    assert cache.keys.shape[2] == ring


def test_memory_is_bounded_by_the_window():
    model = random_model(mixtral(window=6))
    cache = model.new_cache(1, 10_000)
    held = sum(c.keys.numel() + c.values.numel() for c in cache) * 4
    assert held == model.config.cache_bytes(10_000, bytes_per_number=4) == 2 * 2 * 2 * 8 * 6 * 4


def test_rotated_dot_products_see_only_distance():
    q, k = torch.randn(2, 1, 1, 1, 1, 16).unbind()

    def score(i, j):
        turned = [rotate(x, rotation(torch.tensor([[p]]), 16, 100.0)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), atol=1e-4, rtol=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5), (31,), (32,), (33,), (2, 64), (7, 9, 3)])
@pytest.mark.parametrize("size", [(24, 40), (200, 300), (900, 700)])
def test_linear_is_pytorchs_on_every_number_of_rows(rows, size):
    x, weight = torch.randn(*rows, size[0]), torch.randn(size[1], size[0])
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), x @ weight.T, atol=1e-3, rtol=1e-4)


@pytest.fixture
def tiles(monkeypatch):
    """A processor with AMX, for which every matrix is large enough."""
    monkeypatch.setattr("mixtral_lab.model.linear.amd", lambda: False)
    monkeypatch.setattr("mixtral_lab.model.linear.amx", lambda: True)
    monkeypatch.setattr("mixtral_lab.model.linear.LARGE", 1)


@pytest.mark.parametrize("rows", [(0,), (2,), (33,), (64,), (384,), (3, 5), (2, 64), (7, 9, 3)])
def test_a_product_turned_over_is_the_same(rows, tiles, monkeypatch):
    x, weight = torch.randn(*rows, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    expected = torch.nn.functional.linear(x, weight)
    x_wide = torch.stack((x, x), dim=-1)[..., 0]  # no row of it lies in one piece
    turned = []
    mm = torch.mm
    monkeypatch.setattr("torch.mm", lambda *both: turned.append(1) or mm(*both))
    with torch.no_grad():
        for given in (x, x_wide):
            found = linear(given, weight)
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)
    assert len(turned) == (2 if x.dim() == 2 else 0)  # the rows of an expert
    turned.clear()
    torch.testing.assert_close(linear(x, weight.requires_grad_()), expected)
    assert not turned  # gradients take the usual road


def test_a_model_whose_products_are_turned_over_is_the_same(tiles, monkeypatch):
    model = random_model(mixtral()).bfloat16()
    ids = torch.randint(model.config.vocab, (2, 19))
    found, calls, mm = {}, [], torch.mm
    monkeypatch.setattr("torch.mm", lambda *both: calls.append(1) or mm(*both))
    for turned in (True, False):
        calls.clear()
        monkeypatch.setattr("mixtral_lab.model.linear.amx", lambda turned=turned: turned)
        with torch.no_grad():
            unwatched = model(ids)
            with recording(model, ["*"]) as recorder:
                watched = model(ids)
        found[turned] = {"unwatched": unwatched, "watched": watched} | recorder.values()
        assert bool(calls) == turned
    assert len(found[True]) > 20
    for name, values in found[True].items():
        torch.testing.assert_close(values, found[False][name], atol=0.1, rtol=0.05, msg=name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library's habit that this is about is Linux's")
def test_a_pass_finds_its_memory_in_the_process():
    script = """
import resource, torch
from mixtral_lab.config import Config
from mixtral_lab.model import Transformer
config = Config(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden=256, n_experts=4, n_choices=2, vocab=64, context=4096
)
model = Transformer(config).eval()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        model(torch.zeros(1, 1024, dtype=torch.int64))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min([faults() for _ in range(5)][2:]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert int(said.stdout) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3, 2), (3, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("order", [None, (5, 0, 3, 1, 4, 2)])
def test_answers_are_weighed_and_summed_where_they_lie(dtype, shape, order):
    rows, weights = torch.randn(6, 16).to(dtype), torch.rand(shape).to(dtype)
    laid = Laid(rows, None if order is None else torch.tensor(order), torch.Size(shape))
    each = (rows if order is None else rows[torch.tensor(order).argsort()]).view(*shape, 16)
    assert torch.equal(laid.by_choice(), each)
    plain = (each.double() * weights.double()[..., None]).sum(-2).to(dtype)
    near = {"atol": 0.02, "rtol": 0.02} if dtype in (torch.bfloat16, torch.float16) else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(laid.mixed(weights), plain, **near)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(laid.mixed(weights), plain, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_answers_changes_nothing(dtype):
    model = random_model(mixtral(n_experts=4)).to(dtype)
    ids = torch.randint(model.config.vocab, (1, 24))
    with torch.no_grad():
        before = model(ids)
        with recording(model, ["layers.*.experts.out"]) as recorder:
            watched = model(ids)
    assert len(recorder.values()) == len(model.blocks)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(watched, before, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_vector_is_multiplied_as_many_are(dtype):
    x, weight = torch.randn(1, 1, 200).to(dtype), torch.randn(300, 200).to(dtype)
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.01}
    with torch.no_grad():
        for matrix in (weight, weight.T.contiguous().T):
            torch.testing.assert_close(linear(x, matrix), torch.nn.functional.linear(x, weight), **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_tokens_norm_is_that_of_many(dtype):
    norm, x = RMSNorm(96, 1e-5).to(dtype), (3 * torch.randn(1, 4, 96)).to(dtype)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        alone = torch.stack([norm.row(one.float()) for one in x[0]])
        torch.testing.assert_close(alone[None].to(dtype), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_and_its_two_experts_in_one_sweep_are_the_plain_mixture(dtype):
    torch.manual_seed(0)
    experts, router = Experts(64, 96, 5).to(dtype), Router(64, 5, 2).to(dtype)
    experts.lay_out()
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.01, "rtol": 0.03}
    chosen = set()
    with torch.no_grad():
        for x in torch.randn(20, 1, 1, 64).to(dtype):
            routing = router(x)
            chosen.add(tuple(routing.experts.flatten().tolist()))
            found = experts.row(
                x.view(-1).float(), Routing(*(part.view(-1) for part in routing[:2]), routing.weights.view(-1).float())
            )
            assert found is not None and found.dtype == torch.float32
            torch.testing.assert_close(found.view(1, 1, -1).to(dtype), mix_dense(x, routing, experts.ffn), **near)
    assert any(first > second for first, second in chosen) and any(first < second for first, second in chosen)


def test_portable_is_plain_pytorch(monkeypatch, processor):
    x, weight = torch.randn(1, 200), torch.randn(300, 200)
    with torch.no_grad():
        with portable():
            assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
            with pytest.raises(RuntimeError), portable():
                raise RuntimeError
        monkeypatch.setattr("torch.nn.functional.linear", None)
        if processor == "AMD":  # the shorter road again
            linear(x, weight)
        else:
            linear(x.bfloat16(), torch.randn(900, 200).bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.no_grad()
def test_packed_weights_give_the_same_and_notice_a_change(rows, processor):
    layer = Linear(256, 640).bfloat16().requires_grad_(False)
    x = torch.randn(rows, 256).bfloat16()
    plain = layer(x)
    assert pack(layer) == (640 * 256 * 2 if processor == "AMD" and packing_works() else 0)
    torch.testing.assert_close(layer(x), plain, atol=0.02, rtol=0.02)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), plain * 2, atol=0.04, rtol=0.02)
    layer.weight.data = layer.weight.data * 2
    pack(layer)
    layer.weight.data = layer.weight.data.float().mul(-1).bfloat16()
    torch.testing.assert_close(layer(x), plain * -4, atol=0.08, rtol=0.02)


def packed_layers() -> tuple[SwiGLU, Attention]:
    """Layers of which every matrix is large enough to pack."""
    made = SwiGLU(512, 384), Attention(512, 4, 2, 128, window=None)
    return tuple(layer.bfloat16().requires_grad_(False) for layer in made)  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_matrices_fed_alike_are_packed_together(rows, processor):
    expert, attention = packed_layers()
    x = torch.randn(1, rows, 512).bfloat16()
    turn = rotation(torch.arange(rows)[None], 128, 10000.0)
    turn = turn[0].bfloat16(), turn[1].bfloat16()
    with torch.no_grad():
        plain = expert(x), attention(x, turn, None, None)
        seen = []
        with expert.up.register_forward_hook(lambda module, given, out: seen.append(out)):
            expert(x)
        size = 2 * sum(weight.numel() for layer in (expert, attention) for weight in layer.parameters())
        works = processor == "AMD" and packing_works()
        assert pack(expert) + pack(attention) == (size if works else 0)
        assert [one.packed is not None for one in (expert.gate, expert.up, expert.down)] == [works, False, works]
        for packed, before in zip((expert(x), attention(x, turn, None, None)), plain, strict=True):
            torch.testing.assert_close(packed, before, atol=0.02, rtol=0.02)
        # One of them alone, and one that is watched.
        torch.testing.assert_close(expert.up(x), seen[0], atol=0.02, rtol=0.02)
        with expert.up.register_forward_hook(lambda module, given, out: seen.append(out)):
            torch.testing.assert_close(expert(x), plain[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(seen[1], seen[0], atol=0.02, rtol=0.02)
        expert.up.weight.mul_(2)  # one of two that were packed together
        torch.testing.assert_close(expert(x), plain[0] * 2, atol=0.04, rtol=0.02)
        assert expert.gate.packed is None or rows == 40


@pytest.mark.parametrize("changed", ["up", "key"])
def test_a_packed_row_is_what_forward_gives_and_notices_a_change(changed):
    layers = packed_layers()
    x = torch.randn(512)
    with torch.no_grad():
        for layer in layers:
            pack(layer)
            names = ("gate", "up", "down") if isinstance(layer, SwiGLU) else ("query", "key", "value", "output")
            parts = [getattr(layer, name) for name in names]
            for _ in range(2):
                for one in parts:
                    given = x[: one.in_features]
                    plain = torch.nn.functional.linear(given.bfloat16(), one.weight).float()
                    torch.testing.assert_close(one.row(given), plain, atol=0.02, rtol=0.02)
                alike = parts[:-1]
                for out, one in zip(row_fed_alike(x, *alike), alike, strict=True):
                    plain = torch.nn.functional.linear(x.bfloat16(), one.weight).float()
                    torch.testing.assert_close(out, plain, atol=0.02, rtol=0.02)
                if hasattr(layer, changed):
                    getattr(layer, changed).weight.mul_(-1)
                    getattr(layer, names[-1]).weight.mul_(-1)


def test_a_packed_model_keeps_gradients_and_can_be_copied():
    expert, _ = packed_layers()
    x = torch.randn(1, 512).bfloat16().requires_grad_()
    expert(x).sum().backward()
    plain, x.grad = x.grad, None
    pack(expert)
    expert(x).sum().backward()
    torch.testing.assert_close(x.grad, plain)
    twin = copy.deepcopy(expert)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), expert(x), atol=0.02, rtol=0.02)
        twin.gate.weight.zero_()
        assert not twin(x).any() and expert(x).any()


def test_float32_small_matrices_and_those_of_inference_mode_are_not_packed():
    assert pack(Linear(256, 640)) == 0
    assert pack(Linear(256, 320).bfloat16()) == 0
    with torch.inference_mode():  # whose weights change without anybody's noticing
        assert pack(Linear(256, 640).bfloat16()) == 0


def test_linear_without_onednn_is_the_same(monkeypatch):
    x, weight = torch.randn(5, 900), torch.randn(700, 900)
    with torch.no_grad():
        fast = linear(x, weight)
        monkeypatch.setattr("mixtral_lab.model.linear.onednn_works", lambda: False)
        torch.testing.assert_close(linear(x, weight), fast, atol=1e-3, rtol=1e-4)


def test_the_probe_for_onednn_says_yes_or_no():
    assert onednn_works() in (True, False)


def test_a_custom_dispatch_is_called_with_the_routing():
    experts, router = Experts(8, 12, 3), Router(8, 3, 2)
    seen = []

    def mix(x, routing, ffn):
        seen.append((routing.experts.shape, len(ffn)))
        return x

    experts.dispatch = mix
    x = torch.randn(2, 4, 8)
    assert experts(x, router(x)) is x
    assert seen == [((2, 4, 2), 3)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_heads": 5}, "5 query heads cannot share 2"),
        ({"head_dim": 7}, "must be even"),
        ({"n_choices": None}, "give both"),
        ({"n_choices": 9}, "cannot choose 9 of 5"),
        ({"window": 0}, "at least 1"),
        ({"dim": 0}, "dim is 0"),
        ({"vocab": -5}, "vocab is -5"),
        ({"norm_eps": 0.0}, "above 0"),
    ],
)
def test_contradicting_numbers_are_named(wrong, says):
    with pytest.raises(ConfigError, match=says):
        mixtral(**wrong)


def test_published_sizes():
    from mixtral_lab.config import PRESETS

    def billions(name):
        config = PRESETS[name].config
        return round(config.parameters / 1e9, 1), round(config.active_parameters / 1e9, 1)

    assert billions("mixtral-8x7b") == (46.7, 12.9)
    assert billions("mixtral-8x22b") == (140.6, 39.2)
    assert billions("mistral-7b-v0.1") == (7.2, 7.2)
    assert billions("mistral-nemo-12b") == (12.2, 12.2)
    assert billions("mistral-small-24b") == (23.6, 23.6)
    assert billions("mistral-large-123b") == (122.6, 122.6)
    for preset in PRESETS.values():
        model = Transformer.__new__(Transformer)  # counted on the meta device: no memory
        with torch.device("meta"):
            model.__init__(preset.config)
        assert sum(p.numel() for p in model.parameters()) == preset.config.parameters


def test_rows_beyond_an_experts_own_are_seen_by_nobody():
    torch.manual_seed(0)
    experts, router = Experts(32, 64, 3), Router(32, 3, 2)
    x = torch.randn(1, 101, 32)
    with torch.no_grad():
        routing = router(x)
        rounded = experts(x, routing)
        with portable():
            torch.testing.assert_close(rounded, experts(x, routing), atol=1e-5, rtol=1e-5)
        seen = {}
        for number, expert in enumerate(experts.ffn):
            expert.register_forward_hook(lambda _, rows, out, number=number: seen.update({number: (rows[0], out)}))
        torch.testing.assert_close(experts(x, routing), rounded, atol=1e-5, rtol=1e-5)
    for number, (rows, out) in seen.items():
        mine = (routing.experts == number).any(-1)
        assert torch.equal(rows, x[mine]) and len(out) == mine.sum() and len(out) % 32


def test_a_part_that_is_replaced_added_or_removed_is_the_one_that_is_used():
    model = random_model(mixtral())
    block = model.blocks[0]
    x = torch.randn(1, 1, model.config.dim)
    for put in (setattr, Block.register_module, Block.add_module):
        new = RMSNorm(model.config.dim, eps=0.5)
        put(block, "ffn_norm", new)
        assert block.ffn_norm is new and block._modules["ffn_norm"] is new and new in list(model.modules())
        torch.testing.assert_close(block.ffn_norm(x), new(x))
    twin = copy.deepcopy(block)
    assert twin.ffn_norm is twin._modules["ffn_norm"] and twin.ffn_norm is not block.ffn_norm
    block.ffn_norm = None
    assert block.ffn_norm is None and block._modules["ffn_norm"] is None
    del block.ffn_norm
    assert not hasattr(block, "ffn_norm") and "ffn_norm" not in dict(block.named_children())


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_rows_that_are_rounded_up_change_nothing(multiple):
    assert rounded_up(300, 1) == 300 and rounded_up(31, 32) == 31
    assert rounded_up(33, 32) == 64 and rounded_up(257, 32) == 320
    generator = torch.Generator().manual_seed(1)
    rows, weight = torch.randn(1, 700, 2, 6, generator=generator), torch.randn(3, 5, 6, generator=generator)
    chosen = torch.stack((torch.randint(0, 2, (1, 700), generator=generator), torch.full((1, 700), 2)), dim=-1)
    met = []

    def expert(matrix, x):
        met.append(len(x))
        return x @ matrix.T

    parts = [functools.partial(expert, matrix) for matrix in weight]
    found = take_sorted(rows, chosen, parts, multiple).by_choice()
    torch.testing.assert_close(found, torch.einsum("bscf,bscof->bsco", rows, weight[chosen]))
    assert multiple == 1 or all(n % multiple == 0 for n in met[:-1])
