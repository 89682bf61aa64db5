"""Measures against hand-worked examples and against slow, obvious versions of themselves."""

from __future__ import annotations

from collections import Counter
from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mixtral_lab.analysis import (
    AnalysisError,
    assignment_counts,
    assignment_shares,
    domain_counts,
    domain_information,
    domain_shares,
)
from mixtral_lab.config import Config
from mixtral_lab.lab import Lab
from mixtral_lab.model import Routing, Transformer
from mixtral_lab.model.moe import route
from mixtral_lab.trace import Trace, TraceError


def made_up(layers=2, seq=5, experts=4, choices=2, model="made-up", dtype="float32") -> Trace:
    routing = route(torch.randn(layers, seq, experts), choices)
    return Trace(torch.arange(seq), tuple(f"␣{i}" for i in range(seq)), seq, model, dtype, routing)


@st.composite
def routings(draw) -> Routing:
    layers, seq, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 999)))
    return route(torch.randn(layers, seq, experts), draw(st.integers(1, experts)))


def test_shares_by_hand():
    experts = torch.tensor([[[0, 1], [0, 2]], [[3, 1], [1, 3]]])
    routing = Routing(torch.zeros(2, 2, 4), experts, torch.full((2, 2, 2), 0.5))
    assert assignment_counts(routing).tolist() == [[2, 1, 1, 0], [0, 2, 0, 2]]
    assert assignment_shares(routing).tolist() == [[0.5, 0.25, 0.25, 0], [0, 0.5, 0, 0.5]]


@given(routings())
def test_shares_count_every_choice_of_every_token(routing):
    layers, seq, choices = routing.experts.shape
    shares = assignment_shares(routing)
    for layer in range(layers):
        seen = Counter(routing.experts[layer, t, c].item() for t in range(seq) for c in range(choices))
        for expert in range(routing.logits.shape[-1]):
            assert shares[layer, expert] == pytest.approx(seen[expert] / (choices * seq))


def test_no_token_has_no_shares():
    with pytest.raises(TraceError, match="no token"):
        assignment_shares(Routing(torch.zeros(2, 0, 4), torch.zeros(2, 0, 2).long(), torch.zeros(2, 0, 2)))


def test_a_domain_is_all_its_tokens_together():
    long, short, other = made_up(seq=9), made_up(seq=1), made_up(seq=4)
    domains, shares = domain_shares({"code": [long, short], "prose": [other]})
    assert domains == ("code", "prose") and shares.shape == (2, 2, 4)
    together = Routing(*(torch.cat(pair, dim=1) for pair in zip(long.routing, short.routing, strict=True)))
    np.testing.assert_allclose(shares[0], assignment_shares(together))
    np.testing.assert_allclose(shares[1], assignment_shares(other.routing))
    assert domain_counts({"code": [long, short]})[1].sum() == 2 * 10 * 2


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
    dense = Trace(torch.arange(2), ("a", "b"), 2, "dense", "float32")
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
