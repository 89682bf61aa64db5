"""Repetition against a count by hand, a slow loop, and simulation."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_analysis import routed

from mixtral_lab.analysis import AnalysisError, random_repetition, repetition, repetition_counts

TEXT = np.array([[[0, 1], [0, 2], [3, 0], [1, 2]]])  # first repeats once of three, either twice


def test_by_hand():
    assert repetition_counts(TEXT, 4)[:, 0].tolist() == [1, 2, 3]
    found = repetition(repetition_counts(TEXT, 4)[None])
    assert found.share[:, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert (found.texts, found.pairs) == (1, 3)
    # Wilson's interval of 1 in 3: (1/3 + 0.6402 ± 1.96 sqrt(0.0741 + 0.1067)) / 2.2805
    assert (found.low[0, 0], found.high[0, 0]) == pytest.approx((0.0615, 0.7923), abs=1e-4)


@given(routed())
def test_every_pair_of_neighbours_counts_once(drawn):
    experts, n_experts = drawn
    for layer, found in zip(experts.tolist(), repetition_counts(experts, n_experts).T, strict=True):
        first = sum(a[0] == b[0] for a, b in pairwise(layer))
        either = sum(bool(set(a) & set(b)) for a, b in pairwise(layer))
        assert found.tolist() == [first, either, len(layer) - 1]


def test_the_end_of_a_text_is_no_neighbour_of_the_next():
    one = repetition_counts(TEXT[:, ::-1], 4)  # ends with expert 0, where the other starts
    apart, joined = one + repetition_counts(TEXT, 4), repetition_counts(np.concatenate([TEXT[:, ::-1], TEXT], 1), 4)
    assert apart[:, 0].tolist() == [2, 4, 6] and joined[:, 0].tolist() == [3, 5, 7]
    assert repetition(np.stack([one, repetition_counts(TEXT, 4)])).pairs == 6


def test_texts_are_weighed_by_their_pairs():
    counts = np.array([[[1], [2], [4]], [[10], [10], [10]], [[0], [0], [0]]])  # the last has a single token
    found = repetition(counts)
    assert found.share[:, 0].tolist() == pytest.approx([11 / 14, 12 / 14])
    assert (found.texts, found.pairs) == (2, 14)


@given(st.integers(2, 6), st.integers(0, 99))
def test_the_bootstrap_is_the_slow_one(texts, seed):
    random = np.random.default_rng(seed)
    pairs = random.integers(1, 30, texts)
    counts = np.stack([random.binomial(pairs, 0.3), random.binomial(pairs, 0.6), pairs], 1)[:, :, None]
    found = repetition(counts, seed=seed)
    drawn = np.random.default_rng(seed).multinomial(texts, [1 / texts] * texts, 1000)
    shares = []
    for times in drawn:
        repeats = sum(n * text[:2, 0] for n, text in zip(times, counts, strict=True))
        shares.append(repeats / sum(n * text[2, 0] for n, text in zip(times, counts, strict=True)))
    np.testing.assert_allclose([found.low[:, 0], found.high[:, 0]], np.percentile(shares, [2.5, 97.5], axis=0))
    np.testing.assert_array_equal(found.low, repetition(counts, seed=seed).low)
    assert (found.low <= found.share).all() and (found.share <= found.high).all()


def test_intervals_know_that_texts_differ():
    """Where all pairs of a text are alike, 40 texts say no more than 40 pairs; taking pairs for independent would mislead."""
    random, covered, width = np.random.default_rng(0), 0, []
    for seed in range(100):
        alike = random.random(40) < 0.3
        counts = np.stack([alike * 50, alike * 50, np.full(40, 50)], 1)[:, :, None]
        found = repetition(counts, seed)
        covered += found.low[0, 0] <= 0.3 <= found.high[0, 0]
        width.append(found.high[0, 0] - found.low[0, 0])
    assert covered >= 88  # of 100; the nominal 95 less three standard deviations
    naive = repetition(counts.sum(0)[None])
    assert np.mean(width) > 4 * (naive.high - naive.low)[0, 0]


@given(st.integers(0, 40), st.integers(1, 40))
def test_wilson_solves_its_own_equation(repeats, pairs):
    """The ends are the shares p for which the count found lies 1.96 standard deviations of p from p."""
    repeats = min(repeats, pairs)
    found = repetition(np.array([[[repeats], [repeats], [pairs]]]))
    for end in (found.low[0, 0], found.high[0, 0]):
        if 1e-9 < end < 1 - 1e-9:
            distance = abs(repeats / pairs - end) / np.sqrt(end * (1 - end) / pairs)
            assert distance == pytest.approx(1.959964, rel=1e-6)
    assert 0 <= found.low[0, 0] <= repeats / pairs + 1e-12 and repeats / pairs - 1e-12 <= found.high[0, 0] <= 1


@pytest.mark.parametrize(("n_experts", "n_choices"), [(8, 2), (8, 1), (4, 3), (6, 2), (3, 3)])
def test_blind_choice_tries_all_pairs(n_experts, n_choices):
    chosen = list(combinations(range(n_experts), n_choices))
    either = np.mean([bool(set(a) & set(b)) for a in chosen for b in chosen])
    assert random_repetition(n_experts, n_choices) == pytest.approx((1 / n_experts, either))


def test_blind_choice_is_the_papers():
    first, either = random_repetition(8, 2)
    assert first == 0.125 and round(100 * either, 1) == 46.4


def test_no_neighbours():
    with pytest.raises(AnalysisError, match="no neighbours"):
        repetition(repetition_counts(TEXT[:, :1], 4)[None])
