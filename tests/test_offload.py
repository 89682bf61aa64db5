"""Expert caches: worked by hand, against slow and obvious caches, and against what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab.analysis import AnalysisError
from mixtral_lab.analysis.offload import (
    NO_GUESS,
    expert_bytes,
    guess_recall,
    guesses_from_router,
    guesses_from_transitions,
    offload_frame,
    replay,
)
from mixtral_lab.config import PRESETS, Config
from mixtral_lab.expert_cache import LFU, LRU, ExpertCacheError
from mixtral_lab.figures import FigureError
from mixtral_lab.figures.offload import expert_cache, expert_cache_by_layer
from mixtral_lab.model import Transformer


@st.composite
def choices(draw):
    """Chosen experts `layer seq choice`, no expert twice for one token, and how many experts there are."""
    layers, seq, experts = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    torch.manual_seed(draw(st.integers(0, 999)))
    return torch.rand(layers, seq, experts).topk(k, dim=-1).indices, experts


def touches(cache, *experts):
    return [cache.touch(expert) for expert in experts]


def test_the_least_recently_used_makes_room():
    cache = LRU(2)
    assert touches(cache, 0, 1, 0, 2, 1) == [False, False, True, False, False]
    assert cache.resident == (2, 1)


def test_the_least_frequently_used_makes_room():
    cache = LFU(2)
    assert touches(cache, 0, 0, 1, 2, 0) == [False, True, False, False, True]
    assert set(cache.resident) == {0, 2}
    assert touches(cache, 1, 0) == [False, True]  # 2 and 1 were used once each before: 2, in the cache, goes


def test_a_step_keeps_what_it_needs():
    cache = LRU(2)
    touches(cache, 0, 1)
    found = cache.use([2, 0])  # touched in this order, 2 would put 0 out and then miss it
    assert found == ([0], [], [2])
    assert cache.resident == (0, 2)


def test_guessed_experts_wait_beside_the_cache():
    cache = LRU(2)
    touches(cache, 0, 1)
    assert cache.stage([1, 2, 3]) == [2, 3]
    assert cache.resident == (0, 1)
    assert cache.use([2, 4]) == ([], [2], [4])
    assert cache.resident == (2, 4)
    assert cache.use([3]).missing == [3]  # it was fetched, not used, and forgotten


def test_no_room_at_all():
    for policy in (LRU, LFU):
        with pytest.raises(ExpertCacheError, match="1 or more"):
            policy(0)


class SlowLRU:
    """Every use is written down with its time; who must go is looked up in the whole record."""

    def __init__(self, capacity):
        self.capacity, self.held, self.uses = capacity, set(), []

    def use(self, experts, guessed=()):
        fetched = [e for e in set(guessed) if e not in self.held]
        inside = [e for e in experts if e in self.held]
        ahead = [e for e in experts if e in fetched]
        missing = [e for e in experts if e not in inside and e not in ahead]
        for expert in inside + ahead + missing:
            if expert not in self.held and len(self.held) == self.capacity:
                self.held.remove(min(self.held, key=self.rank))
            self.held.add(expert)
            self.uses.append(expert)
        return len(experts), len(inside) + len(ahead), len(ahead), len(missing) + len(fetched)

    def rank(self, expert):
        return max(i for i, used in enumerate(self.uses) if used == expert)


class SlowLFU(SlowLRU):
    def rank(self, expert):
        return self.uses.count(expert), super().rank(expert)


@given(choices(), st.integers(1, 6), st.sampled_from([(LRU, SlowLRU), (LFU, SlowLFU)]), st.data())
def test_replay_is_the_slow_cache(drawn, capacity, policies, data):
    experts, n_experts = drawn
    layers, seq, _ = experts.shape
    n_prompt = data.draw(st.integers(1, seq))
    guesses = None
    if data.draw(st.booleans()):
        guesses = np.random.default_rng(0).integers(-1, n_experts, (layers, seq, data.draw(st.integers(1, 3))))
    done = replay(experts, capacity, policies[0], guesses, n_prompt)
    for layer in range(layers):
        slow = policies[1](capacity)
        prompt = sorted(set(experts[layer, :n_prompt].flatten().tolist()))
        total = np.array(slow.use(prompt))
        for token in range(n_prompt, seq):
            guessed = [] if guesses is None else [g for g in guesses[layer, token].tolist() if g != -1]
            total += slow.use(experts[layer, token].tolist(), guessed)
        assert [part[layer] for part in done] == total.tolist()


def test_replay_by_hand():
    experts = torch.tensor([[[0, 1], [1, 2], [0, 1]], [[3, 0], [3, 1], [3, 2]]])
    done = replay(experts, 2)
    assert done.asked.tolist() == [6, 6]
    assert done.hits.tolist() == [2, 2]  # layer 0: 1 at the second token, 1 at the third; layer 1: 3 twice
    assert done.loads.tolist() == [4, 4]
    right = np.array([[[-1], [-1], [-1]], [[-1], [1], [0]]])
    done = replay(experts, 2, guesses=right)
    assert done.hits.tolist() == [2, 3] and done.ahead.tolist() == [0, 1]
    assert done.loads.tolist() == [4, 5]  # the wrong guess, 0, was copied for nothing: it had left the cache
    prompt = replay(experts, 2, n_prompt=2)
    assert prompt.asked.tolist() == [3 + 2, 3 + 2]
    assert prompt.hits.tolist() == [1, 1]  # it leaves 1 and 2 in the first cache, 1 and 3 in the second


@given(choices())
def test_a_cache_for_all_misses_each_expert_once(drawn):
    experts, n_experts = drawn
    for policy in (LRU, LFU):
        done = replay(experts, n_experts, policy)
        distinct = [len(layer.unique()) for layer in experts]
        assert (done.asked - done.hits).tolist() == distinct == done.loads.tolist()


def test_chance_finds_c_of_e():
    experts = torch.rand(1, 4000, 8, generator=torch.Generator().manual_seed(0)).topk(2, dim=-1).indices
    for policy in (LRU, LFU):
        for capacity in (1, 2, 5):
            done = replay(experts, capacity, policy)
            assert done.hits[0] / done.asked[0] == pytest.approx(capacity / 8, abs=0.02)


def test_the_table_is_replay_for_every_cache():
    experts = torch.rand(2, 30, 4).topk(2, dim=-1).indices
    guesses = guesses_from_transitions(experts, 4, 2)
    frame = offload_frame(experts, 4, bytes_per_expert=10, guesses={"transitions": guesses})
    assert len(frame) == 3 * 4 * 2 and set(frame.policy) == {"LRU", "LFU", "LRU + transitions"}
    assert (frame.hits + frame.misses == frame.asked).all() and (frame.bytes == 10 * frame.loads).all()
    for (name, capacity), part in frame.groupby(["policy", "capacity"]):
        policy = LFU if name == "LFU" else LRU
        done = replay(experts, int(capacity), policy, guesses if "transitions" in name else None)
        assert part.hits.tolist() == done.hits.tolist() and part.ahead.tolist() == done.ahead.tolist()
    plain = frame[frame.policy == "LRU"].groupby("capacity").hits.sum()
    assert plain.is_monotonic_increasing and plain[4] == 2 * (60 - 4)


def test_transitions_by_hand():
    experts = torch.tensor([[[0], [1], [0], [0], [0]], [[2], [0], [1], [1], [2]]])
    guesses = guesses_from_transitions(experts, 3, 2)
    assert (guesses[0] == NO_GUESS).all()
    # token 2 comes from 0, which went to 2 once; token 3 from 0, which went to 2 and to 1; token 4: 1 twice, 2 once.
    assert guesses[1].tolist() == [[-1, -1], [-1, -1], [2, -1], [1, 2], [1, 2]]
    recall = guess_recall(experts, guesses)
    assert np.isnan(recall[0]) and recall[1] == pytest.approx(2 / 5)


@given(choices(), st.integers(1, 4))
def test_transitions_are_shares_of_earlier_tokens(drawn, n_guesses):
    experts, n_experts = drawn
    guesses = guesses_from_transitions(experts, n_experts, n_guesses)
    for layer in range(1, experts.shape[0]):
        for token in range(experts.shape[1]):
            scores = []
            for expert in range(n_experts):
                score = 0.0
                for here in experts[layer - 1, token].tolist():
                    earlier = [t for t in range(token) if here in experts[layer - 1, t].tolist()]
                    if earlier:
                        score += sum(expert in experts[layer, t].tolist() for t in earlier) / len(earlier)
                scores.append(score)
            ranked = sorted((e for e in range(n_experts) if scores[e] > 0), key=lambda e: (-scores[e], e))
            got = [g for g in guesses[layer, token].tolist() if g != NO_GUESS]
            # Sums of shares may tie in one order of addition and not in another.
            assert [scores[e] for e in got] == pytest.approx([scores[e] for e in ranked[:n_guesses]])


def tiny(**changes) -> Config:
    shape = dict(dim=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, hidden=8, vocab=30, context=64)
    return Config(**{**shape, "n_experts": 4, "n_choices": 2, **changes})


def test_the_router_guesses_from_the_stream_before():
    model = Transformer(tiny()).eval()
    streams = torch.randn(3, 7, 16)
    guesses = guesses_from_router(model, streams, 2)
    assert (guesses[0] == NO_GUESS).all()
    for layer in (1, 2):
        before, block = model.blocks[layer - 1], model.blocks[layer]
        for token in range(7):
            stream = streams[layer - 1, token]
            normed = stream / (stream.square().mean() + 1e-5).sqrt() * before.ffn_norm.weight
            scores = [(row @ normed).item() for row in block.router.score.weight]
            assert guesses[layer, token].tolist() == sorted(range(4), key=lambda e: -scores[e])[:2]


def test_the_guess_is_right_where_nothing_happens_between():
    """With attention and experts that add nothing and equal norms, the next router reads the very same vector."""
    model = Transformer(tiny()).eval()
    streams = torch.randn(1, 7, 16).expand(3, 7, 16)
    experts = torch.stack([block.router(block.ffn_norm(streams[0, None])).experts[0] for block in model.blocks])
    guesses = guesses_from_router(model, streams, 2)
    np.testing.assert_array_equal(guess_recall(experts, guesses), [np.nan, 1, 1])
    done = replay(experts, 2, guesses=guesses)
    assert (done.hits[1:] == done.asked[1:] - 2).all()  # all but the first token, which counts as the prompt


def test_bytes_of_an_expert():
    assert expert_bytes(PRESETS["mixtral-8x7b"].config) == 3 * 4096 * 14336 * 2
    assert expert_bytes(PRESETS["mixtral-8x7b"].config, 0.5) == 3 * 4096 * 14336 // 2
    with pytest.raises(AnalysisError, match="dense"):
        expert_bytes(PRESETS["mistral-7b-v0.1"].config)


def test_what_cannot_be_replayed():
    experts = torch.zeros(2, 3, 1, dtype=torch.long)
    for n_prompt in (0, 4):
        with pytest.raises(AnalysisError, match="prompt"):
            replay(experts, 1, n_prompt=n_prompt)
    with pytest.raises(AnalysisError, match="guesses for 2 layers of 4 tokens"):
        replay(experts, 1, guesses=np.zeros((2, 4, 1), dtype=np.int64))
    with pytest.raises(AnalysisError, match="1 or more"):
        guesses_from_transitions(experts, 1, 0)
    with pytest.raises(AnalysisError, match="no router"):
        guesses_from_router(Transformer(tiny(n_experts=None, n_choices=None)), torch.zeros(3, 2, 16), 1)
    with pytest.raises(AnalysisError, match="The stream has 2 layers"):
        guesses_from_router(Transformer(tiny()), torch.zeros(2, 2, 16), 1)


def table():
    experts = torch.rand(3, 20, 8).topk(2, dim=-1).indices
    return offload_frame(experts, 8, 10**6, {"transitions": guesses_from_transitions(experts, 8, 2)})


def test_the_figure_shows_the_table():
    frame = table()
    fig = expert_cache(frame, "made-up", "float32")
    assert "made-up, float32" in fig.layout.title.text
    found = {trace.name: trace for trace in fig.data[::2]}
    moved = {trace.name: trace for trace in fig.data[1::2]}
    for policy, part in frame.groupby("policy"):
        sums = part.groupby("capacity")[["asked", "hits", "bytes"]].sum()
        np.testing.assert_allclose(found[policy].y, sums.hits / sums.asked)
        np.testing.assert_allclose(moved[policy].y, sums.bytes / 20 / 1e6)
        assert list(found[policy].x) == list(range(1, 9))
    assert list(fig.data[-1].y) == [1 / 8, 1]


def test_the_figure_by_layer_shows_the_table():
    frame = table()
    fig = expert_cache_by_layer(frame, "LFU", capacities=[3, 5])
    for trace, capacity in zip(fig.data, (3, 5), strict=True):
        part = frame[(frame.policy == "LFU") & (frame.capacity == capacity)].sort_values("layer")
        np.testing.assert_allclose(trace.y, part.hits / part.asked)
    assert [shape.y0 for shape in fig.layout.shapes] == [3 / 8, 5 / 8]
    assert len(expert_cache_by_layer(frame).data) == 3


def test_figures_of_no_table():
    frame = table()
    with pytest.raises(FigureError, match="lacks bytes"):
        expert_cache(frame.drop(columns="bytes"))
    with pytest.raises(FigureError, match="lacks rows"):
        expert_cache(frame[:0])
    with pytest.raises(FigureError, match="no policy 'FIFO'"):
        expert_cache_by_layer(frame, "FIFO")
    with pytest.raises(FigureError, match="no cache of 9"):
        expert_cache_by_layer(frame, capacities=[9])
