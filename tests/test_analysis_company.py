"""Co-activation, transitions and saturation against counts by hand and slow loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_analysis import BY_HAND, made_up, routed

from mixtral_lab.analysis import (
    AnalysisError,
    assignment_counts,
    coactivation,
    coactivation_counts,
    saturation,
    saturation_counts,
    transition_counts,
    transitions,
)
from mixtral_lab.trace import Trace


def test_company_by_hand():
    first, second = coactivation(coactivation_counts(BY_HAND, 4))
    np.testing.assert_array_equal(
        first, [[1, 0.5, 0.5, 0], [1, 1, 0, 0], [1, 0, 1, 0], [np.nan] * 4]
    )  # nobody chose expert 3
    np.testing.assert_array_equal(second[1], [0, 1, 0, 1])


@given(routed())
def test_company_is_that_of_tokens(drawn):
    experts, n_experts = drawn
    counts = coactivation_counts(experts, n_experts)
    shares = coactivation(counts)
    for layer, i, j in np.ndindex(counts.shape):
        chose = [set(token) for token in experts[layer].tolist()]
        both = sum(i in token and j in token for token in chose)
        alone = sum(i in token for token in chose)
        assert counts[layer, i, j] == both
        assert shares[layer, i, j] == pytest.approx(both / alone) if alone else np.isnan(shares[layer, i, j])
    rows = shares.sum(-1)
    np.testing.assert_allclose(rows[np.isfinite(rows)], experts.shape[2])  # k
    np.testing.assert_array_equal(np.diagonal(counts, axis1=1, axis2=2), assignment_counts(experts, n_experts))


def test_an_expert_is_chosen_once():
    with pytest.raises(AnalysisError, match="same expert twice"):
        coactivation_counts(np.array([[[1, 0, 1]]]), 4)


def test_transitions_by_hand():
    first = transition_counts(BY_HAND[:, :, :1], 4)[0]  # token 0 goes from 0 to 3, token 1 from 0 to 1
    assert first[0].tolist() == [0, 1, 0, 1] and first.sum() == 2
    every = transitions(transition_counts(BY_HAND, 4))[0]
    assert every[0].tolist() == [0, 0.5, 0, 0.5] and every[2].tolist() == [0, 0.5, 0, 0.5]
    assert np.isnan(every[3]).all()


@given(routed(), st.data())
def test_transitions_follow_every_token(drawn, data):
    experts, n_experts = drawn
    layers, seq, n_choices = experts.shape
    if layers == 1:
        with pytest.raises(AnalysisError, match="has 1 layers"):
            transition_counts(experts, n_experts)
        return
    step = data.draw(st.integers(1, layers - 1))
    counts = transition_counts(experts, n_experts, step)
    slow = np.zeros((layers - step, n_experts, n_experts), int)
    for layer in range(layers - step):
        for t in range(seq):
            for a in experts[layer, t]:
                for b in experts[layer + step, t]:
                    slow[layer, a, b] += 1
    np.testing.assert_array_equal(counts, slow)
    rows = transitions(counts).sum(-1)
    np.testing.assert_allclose(rows[np.isfinite(rows)], 1)
    np.testing.assert_array_equal(counts.sum(-1), n_choices * assignment_counts(experts[:-step], n_experts))


@pytest.mark.parametrize("step", [0, 2])
def test_layers_that_are_not_there(step):
    with pytest.raises(AnalysisError, match=f"no layer {step} above"):
        transition_counts(BY_HAND, 4, step)


def imported(experts, ids, model="made-up") -> Trace:
    tokens = [str(i) for i in ids]
    return Trace.from_arrays(tokens, torch.as_tensor(experts), ids=ids, n_experts=4, model=model)


def test_saturation_by_hand():
    final = np.array([[[1, 0], [2, 3]], [[0, 2], [1, 3]]])
    assert saturation_counts(BY_HAND, 4, final).tolist() == [3, 2]
    assert saturation([imported(BY_HAND, [7, 8])], [imported(final, [7, 8])]).tolist() == [0.75, 0.5]


@given(routed(), st.integers(0, 99))
def test_saturation_is_the_mean_overlap(drawn, seed):
    experts, n_experts = drawn
    final = np.random.default_rng(seed).permutation(experts, axis=1)
    found = saturation_counts(experts, n_experts, final)
    for layer in range(len(experts)):
        pairs = zip(experts[layer].tolist(), final[layer].tolist(), strict=True)
        assert found[layer] == sum(len(set(a) & set(b)) for a, b in pairs)
    assert (saturation_counts(experts, n_experts, experts) == experts[0].size).all()


def test_saturation_weighs_every_token_alike():
    one, other, third = (imported(experts, [1, 2]) for experts in (BY_HAND, BY_HAND[:, ::-1].copy(), BY_HAND))
    long = imported(np.concatenate([BY_HAND] * 3, axis=1), [1] * 6)
    apart = saturation_counts(BY_HAND, 4, BY_HAND[:, ::-1])
    np.testing.assert_allclose(saturation([one, long], [other, long]), (apart + 12) / 16)
    assert saturation([one], [third]).tolist() == [1, 1]


def test_checkpoints_that_cannot_be_compared():
    trace = imported(BY_HAND, [1, 2])
    with pytest.raises(AnalysisError, match="have not read the same ids"):
        saturation([trace], [imported(BY_HAND, [1, 3], model="other")])
    with pytest.raises(AnalysisError, match="these read 1 and 0"):
        saturation([trace], [])
    with pytest.raises(AnalysisError, match=r"\(2, 2, 2\) and \(2, 2, 1\)"):
        saturation([trace], [imported(BY_HAND[:, :, :1], [1, 2])])
    short = made_up()
    with pytest.raises(AnalysisError, match="each token needs its own"):
        saturation([replace(short, tokens=short.tokens[:2])], [short])
