"""Measures against hand-worked examples and against slow, obvious versions of themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mixtral_lab.analysis import (
    AnalysisError,
    as_shares,
    assignment_counts,
    choices,
    domain_counts,
    domain_information,
    domain_shares,
    domain_specialisation,
    rank_counts,
    repetition_counts,
    shuffled_information,
)
from mixtral_lab.config import Config
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.model.moe import route
from mixtral_lab.trace import Trace, TraceError

BY_HAND = np.array([[[0, 1], [0, 2]], [[3, 1], [1, 3]]])  # two layers, two tokens, two of four experts


def made_up(layers=2, seq=5, experts=4, n_choices=2, model="made-up", dtype="float32") -> Trace:
    logits, chosen, weights = route(torch.randn(layers, seq, experts), n_choices)
    tokens = [f"␣{i}" for i in range(seq)]
    return Trace.from_arrays(tokens, chosen, weights, logits, model=model, dtype=dtype)


@st.composite
def routed(draw) -> tuple[np.ndarray, int]:
    """Drawn choices `layer seq choice`, and the number of experts."""
    layers, seq, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    n_choices, seed = draw(st.integers(1, experts)), draw(st.integers(0, 999))
    random = np.random.default_rng(seed)
    return random.random((layers, seq, experts)).argsort(-1)[..., :n_choices], experts


# Counts and shares


def test_counts_by_hand():
    assert assignment_counts(BY_HAND, 4).tolist() == [[2, 1, 1, 0], [0, 2, 0, 2]]
    assert rank_counts(BY_HAND, 4).tolist() == [[[2, 0, 0, 0], [0, 1, 1, 0]], [[0, 1, 0, 1], [0, 1, 0, 1]]]
    assert as_shares(assignment_counts(BY_HAND, 4)).tolist() == [[0.5, 0.25, 0.25, 0], [0, 0.5, 0, 0.5]]


@given(routed())
def test_counts_see_every_choice_of_every_token(drawn):
    experts, n_experts = drawn
    layers, seq, n_choices = experts.shape
    counts, by_rank = assignment_counts(experts, n_experts), rank_counts(experts, n_experts)
    for layer in range(layers):
        seen = Counter(experts[layer, t, c].item() for t in range(seq) for c in range(n_choices))
        assert counts[layer].tolist() == [seen[expert] for expert in range(n_experts)]
        for c in range(n_choices):
            at_rank = Counter(experts[layer, :, c].tolist())
            assert by_rank[layer, c].tolist() == [at_rank[expert] for expert in range(n_experts)]
    np.testing.assert_array_equal(by_rank.sum(1), counts)
    np.testing.assert_allclose(as_shares(counts), counts / (n_choices * seq))


@pytest.mark.parametrize("count", [assignment_counts, rank_counts])
def test_texts_add_up(count):
    one, other = made_up(seq=9), made_up(seq=2)
    joined = np.concatenate([choices(one).experts, choices(other).experts], axis=1)
    np.testing.assert_array_equal(count(*choices(one)) + count(*choices(other)), count(joined, 4))


@pytest.mark.parametrize("small", [np.uint8, np.int16, np.uint16])
def test_small_integers_do_not_overflow(small):
    experts = np.arange(200).reshape(1, 100, 2)
    assert (assignment_counts(experts.astype(small), 200) == 1).all()
    assert rank_counts(np.repeat(experts, 3, axis=0).astype(small), 200).sum() == 600


@pytest.mark.parametrize(("n_experts", "expert"), [(3, 3), (2, 3)])
def test_an_expert_that_is_not_there(n_experts, expert):
    with pytest.raises(AnalysisError, match=f"no expert {expert}: {n_experts} experts"):
        assignment_counts(BY_HAND, n_experts)
    with pytest.raises(AnalysisError, match="no expert -1"):
        assignment_counts(BY_HAND - 1, 4)


def test_nothing_has_no_shares():
    with pytest.raises(AnalysisError, match="Nothing was counted"):
        as_shares(assignment_counts(np.zeros((2, 0, 2), int), 4))
    assert np.isnan(as_shares(np.array([[0, 0], [1, 3]]))[0]).all()
    assert as_shares(np.array([[0, 0], [1, 3]]))[1].tolist() == [0.25, 0.75]


def test_choices_come_from_a_trace():
    trace = made_up(layers=3, experts=6)
    experts, n_experts = choices(trace)
    assert n_experts == 6
    np.testing.assert_array_equal(experts, trace.experts)
    with pytest.raises(AnalysisError, match="5 tokens but decisions for 2"):
        choices(replace(trace, recorded={site: value[:2] for site, value in trace.recorded.items()}))


# Domains


def test_a_domain_is_all_its_tokens_together():
    long, short, other = made_up(seq=9), made_up(seq=1), made_up(seq=4)
    domains, shares = domain_shares({"code": [long, short], "prose": [other]})
    assert domains == ("code", "prose") and shares.shape == (2, 2, 4)
    together = np.concatenate([choices(long).experts, choices(short).experts], axis=1)
    np.testing.assert_allclose(shares[0], as_shares(assignment_counts(together, 4)))
    np.testing.assert_allclose(shares[1], as_shares(assignment_counts(*choices(other))))
    assert domain_counts({"code": [long, short]})[1].sum() == 2 * 10 * 2


def test_a_domain_counts_whatever_is_counted():
    traces = {"code": [made_up(seq=9), made_up(seq=1)], "prose": [made_up(seq=4)]}
    for count in (rank_counts, repetition_counts):
        domains, counts = domain_counts(traces, count)
        assert domains == ("code", "prose")
        for name, found in zip(domains, counts, strict=True):
            np.testing.assert_array_equal(found, sum(count(*choices(trace)) for trace in traces[name]))


@given(routed())
def test_specialisation_is_the_share_of_tokens(drawn):
    experts, n_experts = drawn
    layers, seq, n_choices = experts.shape
    found = domain_specialisation(assignment_counts(experts, n_experts)[None], n_choices)
    for layer in range(layers):
        for expert in range(n_experts):
            choosing = sum(expert in experts[layer, t] for t in range(seq))
            assert found[0, layer, expert] == pytest.approx(choosing / seq)


def test_shares_of_a_real_model_come_from_its_trace():
    config = Config(
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        hidden=8,
        vocab=30,
        context=64,
        n_experts=4,
        n_choices=2,
    )

    class Words:
        vocab, stop_ids = 30, ()

        def pieces(self, ids):
            return [str(i) for i in ids]

    lab = Lab.__new__(Lab)
    lab.model, lab.tokenizer, lab.name = Transformer(config).eval(), Words(), "tiny"
    trace = lab.trace_ids([1, 2, 3, 4], max_new_tokens=3)
    _, shares = domain_shares({"numbers": [trace]})
    assert len(trace) == 7
    for layer in range(2):
        for expert in range(4):
            chosen = (trace.routing.experts[layer] == expert).sum().item()
            assert shares[0, layer, expert] == pytest.approx(chosen / 14)


def test_domains_that_cannot_be_compared():
    with pytest.raises(TraceError, match="no traces"):
        domain_shares({})
    with pytest.raises(TraceError, match="'prose' has no text"):
        domain_shares({"code": [made_up()], "prose": []})
    for other in (made_up(model="another"), made_up(dtype="bfloat16"), made_up(layers=3), made_up(experts=8)):
        with pytest.raises(TraceError, match="one model in one dtype"):
            domain_shares({"code": [made_up()], "prose": [other]})
    dense = Trace(torch.arange(2), ("a", "b"), 2, "dense", "float32", n_layers=2)
    with pytest.raises(TraceError, match="dense"):
        domain_shares({"code": [dense]})


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[1, 1], [1, 1]], 0),
        ([[2, 4, 6], [1, 2, 3]], 0),  # one domain has more tokens, but uses the experts alike
        ([[5, 0], [0, 5]], 1),
        ([[7, 0, 0, 0], [0, 7, 0, 0], [0, 0, 7, 0], [0, 0, 0, 7]], 2),
        ([[3, 0], [0, 1]], log2(4) - 0.75 * log2(3)),  # all there is to know: the entropy of (3/4, 1/4)
        ([[2, 1], [1, 2]], 1 - (log2(3) - 2 / 3)),  # 1 bit, less the entropy of (2/3, 1/3)
        ([[3, 9]], 0),
    ],
)
def test_information_by_hand(counts, bits):
    assert domain_information(np.array(counts)) == pytest.approx(bits, abs=1e-12)


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 50)))
def test_information_is_entropy_less_what_remains(counts):
    total = int(counts.sum())
    if not total:
        with pytest.raises(AnalysisError):
            domain_information(counts)
        return

    def entropy(row):
        return -sum(n / sum(row) * log2(n / sum(row)) for n in row if n)

    of_domains = entropy(counts.sum(1).tolist())
    once_expert_is_known = sum(sum(column) / total * entropy(column) for column in counts.T.tolist() if sum(column))
    assert domain_information(counts) == pytest.approx(of_domains - once_expert_is_known, abs=1e-9)
    assert domain_information(counts) == pytest.approx(domain_information(counts.T), abs=1e-9)
    assert 0 <= domain_information(counts) <= log2(min(counts.shape)) + 1e-9


@pytest.mark.parametrize("counts", [[[0, 0]], [[1, -1]], [[1.0, np.nan]]])
def test_information_of_no_table(counts):
    with pytest.raises(AnalysisError, match="0 or more"):
        domain_information(np.array(counts))


def shuffled_slowly(counts, domains, shuffles, seed):
    random = np.random.default_rng(seed)
    names = sorted(set(domains))
    labels = np.array([names.index(domain) for domain in domains])
    rows = []
    for _ in range(shuffles):
        dealt = random.permutation(labels)
        row = []
        for layer in range(counts.shape[1]):
            table = np.zeros((len(names), counts.shape[2]))
            for text, domain in enumerate(dealt):
                table[domain] += counts[text, layer]
            row.append(domain_information(table))
        rows.append(row)
    return rows


@given(st.integers(2, 4), st.integers(4, 8), st.integers(0, 99))
def test_shuffling_deals_out_whole_texts(n_domains, texts, seed):
    counts = np.random.default_rng(seed).integers(0, 20, (texts, 2, 3)) + 1
    domains = [f"domain {text % n_domains}" for text in range(texts)]
    found = shuffled_information(counts, domains, shuffles=5, seed=seed)
    np.testing.assert_allclose(found, shuffled_slowly(counts, domains, 5, seed))
    np.testing.assert_array_equal(found, shuffled_information(counts, domains, shuffles=5, seed=seed))


def test_shuffling_by_hand():
    """Four texts that keep to one expert each: dealt out in pairs, either both of a domain agree (1 bit) or none (0)."""
    counts = np.array([[[9, 0]], [[9, 0]], [[0, 9]], [[0, 9]]])
    bits = shuffled_information(counts, ["a", "a", "b", "b"], shuffles=400, seed=3)[:, 0]
    assert set(bits.round(9).tolist()) == {0.0, 1.0}
    assert bits.mean() == pytest.approx(1 / 3, abs=0.08)  # of six ways to deal, two; three standard errors are 0.07


@pytest.mark.parametrize("domains", [["a", "a"], ["a"], ["a", "b", "b"]])
def test_shuffling_what_cannot_be_compared(domains):
    with pytest.raises(AnalysisError, match="one label"):
        shuffled_information(np.ones((2, 1, 4), int), domains)
