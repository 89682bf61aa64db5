"""Entropy, margins and their bins against hand-worked numbers and slow loops."""

from __future__ import annotations

from math import exp, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_analysis import made_up

from mixtral_lab.analysis import (
    AnalysisError,
    binned_counts,
    binned_quantile,
    near_tie_margin,
    near_ties,
    router_entropy,
    router_logits,
    router_probabilities,
)

LOGITS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6)),
    elements=st.floats(-30, 30, width=32),
)


def test_entropy_by_hand():
    logits = np.log(np.array([[[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]]))
    assert router_entropy(logits)[0].tolist() == pytest.approx([1.75, 2.0])
    assert near_tie_margin(logits, 1)[0].tolist() == pytest.approx([0.25, 0.0])
    assert near_tie_margin(logits, 2)[0].tolist() == pytest.approx([0.125, 0.0])
    assert near_tie_margin(logits, 3)[0].tolist() == pytest.approx([0.0, 0.0])


@given(LOGITS)
def test_entropy_and_margin_are_the_slow_ones(logits):
    entropies = router_entropy(logits)
    margins = [near_tie_margin(logits, k) for k in range(1, logits.shape[-1])]
    for layer, seq in np.ndindex(logits.shape[:2]):
        powers = [exp(float(x) - 30) for x in logits[layer, seq]]
        p = [power / sum(powers) for power in powers]
        assert entropies[layer, seq] == pytest.approx(-sum(x * log2(x) for x in p if x > 0), abs=1e-9)
        best = sorted(p, reverse=True)
        for k, found in enumerate(margins, start=1):
            assert found[layer, seq] == pytest.approx(best[k - 1] - best[k], abs=1e-9)


def test_huge_logits_and_experts_shut_out():
    logits = np.array([[[1e4, -np.inf, 1e4, -1e4]]], np.float32)
    assert router_probabilities(logits)[0, 0].tolist() == [0.5, 0, 0.5, 0]
    assert router_entropy(logits)[0, 0] == 1.0 and near_tie_margin(logits, 2)[0, 0] == 0.5
    certain = router_entropy(np.array([[[0.0, -np.inf]]]))
    assert certain[0, 0] == 0 and not np.signbit(certain[0, 0])


@pytest.mark.parametrize("row", [[np.nan, 0.0], [-np.inf, -np.inf], [np.inf, 0.0]])
def test_logits_that_say_nothing(row):
    with pytest.raises(AnalysisError, match="say nothing"):
        router_entropy(np.array([[row]]))


@pytest.mark.parametrize("n_choices", [0, 3])
def test_a_margin_needs_an_expert_left_out(n_choices):
    with pytest.raises(AnalysisError, match="1 to 2 choices of 3"):
        near_tie_margin(np.zeros((1, 1, 3)), n_choices)


def test_logits_come_from_a_trace():
    trace = made_up()
    np.testing.assert_array_equal(router_logits(trace), trace.routing.logits)
    entropies = router_entropy(router_logits(trace))
    assert entropies.shape == (2, 5) and (entropies > 0).all() and (entropies < 2).all()


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60), st.lists(st.floats(0, 3), min_size=1, max_size=60))
def test_bins_add_up_and_quantiles_are_close(some, more):
    counts = binned_counts(np.array([some]), 3.0) + binned_counts(np.array([more]), 3.0)
    assert counts.shape == (1, 100) and counts.sum() == len(some) + len(more)
    ordered = sorted(some + more)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        found = binned_quantile(counts, 3.0, share)[0]
        rank = max(int(np.ceil(share * len(ordered))) - 1, 0)
        assert abs(found - ordered[rank]) <= 3 / 100 + 1e-9
    for edge, count in enumerate(counts[0]):
        assert count == sum(min(int(value * 100 / 3), 99) == edge for value in ordered)


def test_quantiles_by_hand():
    counts = np.zeros((2, 100), int)
    counts[0, 10] = 4  # between 0.10 and 0.11 of 1
    counts[1, [0, 99]] = 1
    assert binned_quantile(counts, 1.0, 0.5).tolist() == pytest.approx([0.105, 0.01])
    assert binned_quantile(counts, 1.0, 1.0).tolist() == pytest.approx([0.11, 1.0])


@given(st.integers(1, 4), st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_near_ties_are_those_below_a_hundredth(k, values):
    margins = np.array([[value / k for value in values]])
    margins = margins[(abs(margins - 0.01) > 1e-9) | (margins == 0)][None]
    if not margins.size:
        return
    found = near_ties(binned_counts(margins, 1 / k), k)
    assert found[0] == pytest.approx(sum(margin < 0.01 for margin in margins[0]) / margins.size)


def test_no_tokens_have_no_median():
    nothing = binned_counts(np.zeros((2, 0)), 1.0)
    assert nothing.shape == (2, 100) and not nothing.any()
    for measure in (lambda: binned_quantile(nothing, 1.0, 0.5), lambda: near_ties(nothing, 2)):
        with pytest.raises(AnalysisError, match="no token"):
            measure()
