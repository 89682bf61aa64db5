"""The measuring instruments: what they count, by hand and by brute force."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab import bench
from mixtral_lab.bench import OURS, ProfileError, Shape, profile
from mixtral_lab.bench.fresh import in_this_process
from mixtral_lab.bench.profiling import SITES, _watched
from mixtral_lab.bench.sections import _on_the_way
from mixtral_lab.bench.sides import Ours
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.machine import FAR, Rooflines
from mixtral_lab.model import Transformer
from mixtral_lab.model.attention import visible

CPU = torch.device("cpu")
MIXTURE = Config(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=61, context=128, n_experts=4, n_choices=2
)
DENSE = Config(dim=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, vocab=61, context=128, tied=True)


@pytest.fixture
def model() -> Transformer:
    return Transformer(MIXTURE).requires_grad_(False)


# --- Shapes


def test_the_larger_shape_is_what_the_benchmark_promises():
    config = bench.RANDOM_075B.config
    assert (config.dim, config.n_layers, config.hidden, config.n_experts, config.n_choices) == (1024, 12, 1792, 8, 2)
    assert round(config.parameters / 1e9, 2) == 0.75
    assert config.cache_bytes(32768) == 384 * 2**20
    assert config.cache_bytes(1024) == 12 * 2**20


def test_the_windowed_shape_is_mini_mixtral_otherwise():
    config, mini = bench.windowed().config, PRESETS["mini-mixtral"].config
    assert (config.window, config.context) == (1024, 32768)
    assert (config.dim, config.n_layers, config.parameters) == (mini.dim, mini.n_layers, mini.parameters)


configs = st.builds(
    lambda kv, group, half, dim, layers, hidden, vocab, experts, choices, window, tied: Config(
        dim=dim, n_layers=layers, n_heads=kv * group, n_kv_heads=kv, head_dim=2 * half, hidden=hidden, vocab=vocab,
        context=64, n_experts=experts, n_choices=min(choices, experts) if experts else None, window=window, tied=tied,
    ),
    *(st.integers(1, 3) for _ in range(3)), st.integers(1, 9), st.integers(1, 3), st.integers(1, 7), st.integers(2, 11),
    st.none() | st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(1, 9), st.booleans(),
)  # fmt: skip


@given(config=configs, seq=st.integers(1, 12))
def test_operations_and_bytes_by_brute_force(config, seq):
    """Every weight matrix of the model, token by token, and every visible pair, position by position."""
    model = Transformer(config)
    positions = torch.arange(seq)[None]
    pairs = int(visible(positions, positions, config.window).sum())
    read = operations = 0
    for name, parameter in model.named_parameters():
        if name.startswith(("embed.", "unembed")):
            continue
        numbers = parameter.numel()
        if ".experts." in name:
            numbers = numbers * config.n_choices // config.n_experts
        read += numbers
        operations += 2 * numbers * seq
    vocabulary = config.vocab * config.dim
    looked_up = 0 if config.tied else config.dim  # tied: the row is read with the whole matrix
    shape = Shape("drawn", config)
    assert shape.read_per_token == read + vocabulary + looked_up
    attention = 4 * pairs * config.n_heads * config.head_dim * config.n_layers
    # norms and looked-up rows are counted as if they were products: a thousandth of a real shape
    extra = 2 * looked_up * seq
    assert shape.operations(seq) == operations + 2 * vocabulary + attention + extra


def test_operations_by_hand():
    shape = Shape("one", Config(
        dim=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, hidden=3, vocab=5, context=9, window=2, tied=True
    ))  # fmt: skip
    in_the_layer = 4 * 2 * 2 + 3 * 2 * 3 + 2 * 2 + 2  # attention, feed-forward, two norms, the last norm
    assert shape.read_per_token == in_the_layer + 10
    pairs = 1 + 2 + 2  # positions 0, 1 and 2 with a window of 2
    assert shape.operations(3) == 2 * (3 * in_the_layer + 10) + 4 * pairs * 2


# --- Rooflines and memory


def test_rooflines_are_rates(monkeypatch):
    rooflines = Rooflines(CPU)
    monkeypatch.setattr(rooflines, "_best", lambda work: (work(), 0.5)[1])
    assert rooflines.bandwidth() == FAR / 0.5
    assert rooflines.rate(torch.float32) == 2 * 2048**3 / 0.5


def test_the_best_of_three_tries():
    seconds = iter([0.02, 0.001, 0.02])
    assert 0.001 <= Rooflines(CPU)._best(lambda: time.sleep(next(seconds))) < 0.02


PEAKS = """
import torch
from mixtral_lab.bench.fresh import Memory
cpu = torch.device("cpu")
before = Memory(cpu)
block = torch.ones(2**24)  # 64 MiB
del block
print(before.grown(), Memory(cpu).grown())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are only known on Linux")
def test_memory_counts_what_came_and_went():
    """In a process of its own, as the bench measures: here, what earlier tests left may be freed in between."""
    answer = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    came, afterwards = map(int, answer.stdout.split())
    assert came >= 64 * 2**20 * 0.9
    assert afterwards < 64 * 2**20 * 0.5  # forgets peaks from before it was made


def test_reading_longer_texts_takes_more(tmp_path):
    shape = Shape("longer", MIXTURE)
    folder = shape.write(torch.float32, tmp_path / "checkpoint")
    found = in_this_process(
        "lengths", side={"who": OURS}, folder=str(folder), device="cpu", dtype="float32", tokens=[64, 16]
    )
    assert found["cache"] == [MIXTURE.cache_bytes(seq, 4) for seq in (16, 64)]
    assert len(found["peak"]) == 2


def test_recording_keeps_what_it_is_told(tmp_path):
    folder = Shape("recorded", MIXTURE).write(torch.float32, tmp_path / "checkpoint")
    for names, kept in (([], 0), (["layers.*.router.experts"], 2), (["embed", "layers.1.residual.after"], 2)):
        found = in_this_process("record", folder=str(folder), device="cpu", dtype="float32", tokens=20, names=names)
        assert found["kept"] == kept


# --- Reading on the way


def test_a_text_is_read_on_from_mark_to_mark(model):
    side = Ours(model)
    ids = torch.randint(61, (1, 20))
    marks = list(_on_the_way(side, ids, [5, 20, 11]))
    assert [at for at, _, _ in marks] == [5, 11, 20]
    for at, token, cache in marks:
        assert cache[0].seen == at  # a copy: reading on did not change it
        whole = model.new_cache(1, 20)
        assert torch.equal(token, side.read(ids[:, :at], whole))
        torch.testing.assert_close(cache[1].keys[:, :, :at], whole[1].keys[:, :, :at])


# --- Where the time goes


@pytest.mark.parametrize("config", [MIXTURE, DENSE], ids=["mixture", "dense"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_profile_is_tidy_and_sums_to_the_pass(config, batch):
    model = Transformer(config).requires_grad_(False)
    frame = profile(model, torch.randint(61, (batch, 30)), repeats=2)
    assert list(frame.columns) == ["work", "site", "seconds", "share"]
    assert list(dict.fromkeys(frame.work)) == ["prefill", "decode"] == list(frame.attrs)
    assert (frame.seconds > 0).all()
    for _, rows in frame.groupby("work"):
        assert rows.share.sum() == pytest.approx(1)
        assert (rows.seconds / rows.seconds.sum()).tolist() == pytest.approx(rows.share.tolist())
    prefill = frame[frame.work == "prefill"].site.tolist()
    expected = [site for site in SITES if site != "router" or config.n_experts]
    assert prefill == expected  # in the order of SITES, each once
    assert ("rotation" in set(frame[frame.work == "decode"].site)) == (batch > 1)  # a token alone goes by `row`
    assert all(seconds > 0 for seconds in frame.attrs.values())


def test_a_profile_finds_who_is_slow(model, monkeypatch):
    """Sleep in one place at a time: the time must appear there."""
    block = model.layers[1]
    places = {
        "norms": block.ffn_norm, "attention projections": block.attention.output, "router": block.router,
        "unembedding": model.final_norm, "rest": model.embed,
    }  # fmt: skip
    ids = torch.randint(61, (1, 12))
    for site, module in places.items():
        forward = module.forward

        def slow(*args, forward=forward):
            time.sleep(0.02)
            return forward(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", slow)
            frame = profile(model, ids, repeats=1)
        for _, rows in frame.groupby("work"):
            assert rows.set_index("site").seconds[site] >= 0.02
            assert rows.set_index("site").seconds.idxmax() == site


def test_rotation_and_attention_are_told_apart(model, monkeypatch):
    def slow(function):
        def slower(*args, **kwargs):
            time.sleep(0.02)
            return function(*args, **kwargs)

        return slower

    import mixtral_lab.model.attention as attention

    ids = torch.randint(61, (1, 12))
    with monkeypatch.context() as patch:
        patch.setattr(attention, "rotate", slow(attention.rotate))
        frame = profile(model, ids, repeats=1)
    assert frame[frame.work == "prefill"].set_index("site").seconds.idxmax() == "rotation"
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend_banded", slow(attention.attend_banded))
        frame = profile(model, ids, repeats=1)
    assert frame[frame.work == "prefill"].set_index("site").seconds.idxmax() == "attention"


def test_nothing_is_left_behind(model):
    ids = torch.randint(61, (1, 12))
    before = model(ids)
    for block in model.blocks:
        block.experts.lay_out()
    banks = [block.experts.bank for block in model.blocks]
    profile(model, ids, repeats=1)
    assert torch.equal(model(ids), before)
    assert all(block.experts.bank is bank for block, bank in zip(model.blocks, banks, strict=True))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module) and "row" not in vars(module)


def test_experts_are_watched_without_hooks(model):
    """With hooks the model would run them by another road, and another road would be profiled."""
    with _watched(model, CPU):
        for block in model.blocks:
            hooked = [module for module in block.modules() if module._forward_hooks or module._forward_pre_hooks]
            assert hooked == [block.attention.heads.value, block.attention.heads.out]


def test_a_profile_needs_a_pass(model):
    with pytest.raises(ProfileError, match="repeats is 0"):
        profile(model, torch.randint(61, (1, 12)), repeats=0)
