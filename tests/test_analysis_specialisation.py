"""What experts like, against counts by hand, slow loops and other definitions of the same number."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_analysis import BY_HAND, routed

import mixtral_lab
from mixtral_lab.analysis import (
    AnalysisError,
    divergence,
    domain_divergence,
    domain_information,
    language_or_topic,
    mean_divergence,
    mean_shares,
    parallel_passages,
    share_entropy,
    vocabulary,
    vocabulary_counts,
)


@st.composite
def shares(draw, *axes: int) -> np.ndarray:
    """Drawn shares `*axes expert`, some of them 0."""
    n_experts = draw(st.integers(2, 6))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    drawn = random.integers(0, 5, (*axes, n_experts)) + np.eye(n_experts, dtype=int)[0]
    return drawn / drawn.sum(-1, keepdims=True)


# Vocabulary


def test_vocabulary_by_hand():
    """Three tokens, "a" "b" "a": the first "a" goes to experts 0 and 1, "b" to 0 and 2, the second "a" to 0 and 1."""
    experts = np.array([[[0, 1], [0, 2], [1, 0]]])
    counts = vocabulary_counts(experts, 3, np.array([5, 6, 5]), 8)
    assert counts.shape == (1, 8, 3) and counts[0, 5].tolist() == [2, 2, 0] and counts[0, 6].tolist() == [1, 0, 1]
    table = vocabulary(counts, 2, list("vwxyzab?"), minimum=1)
    rows = table[["expert", "token", "count", "occurrences", "share"]].to_numpy().tolist()
    assert rows == [[0, "a", 2, 2, 1.0], [0, "b", 1, 1, 1.0], [1, "a", 2, 2, 1.0], [2, "b", 1, 1, 1.0]]
    assert table.lift.tolist() == pytest.approx([1, 1, 1.5, 3])  # expert 1 reads 2 of 3 tokens, expert 2 one
    assert vocabulary(counts, 2, list("vwxyzab?"), minimum=2).token.tolist() == ["a", "a"]


@given(routed(), st.integers(0, 99), st.integers(1, 4))
def test_vocabulary_counts_every_token(drawn, seed, minimum):
    experts, n_experts = drawn
    layers, seq, n_choices = experts.shape
    ids = np.random.default_rng(seed).integers(0, 5, seq)
    counts = vocabulary_counts(experts, n_experts, ids, 5)
    slow = np.zeros((layers, 5, n_experts), int)
    for layer, t, choice in np.ndindex(experts.shape):
        slow[layer, ids[t], experts[layer, t, choice]] += 1
    np.testing.assert_array_equal(counts, slow)
    table = vocabulary(counts, n_choices, list("abcde"), minimum)
    found = {(r.layer, r.expert, r.id): r for r in table.itertuples()}
    for layer, token, expert in np.ndindex(slow.shape):
        row, occurs = found.pop((layer, expert, token), None), int((ids == token).sum())
        if not slow[layer, token, expert] or occurs < minimum:
            assert row is None
            continue
        assert (row.token, row.count, row.occurrences) == ("abcde"[token], slow[layer, token, expert], occurs)
        usual = sum(expert in experts[layer, t] for t in range(seq)) / seq
        assert row.share == pytest.approx(row.count / occurs) and row.lift == pytest.approx(row.share / usual)
    assert not found


def test_the_favourites_come_first():
    counts = np.zeros((2, 4, 2), np.int32)
    counts[:, :, 0], counts[:, :, 1] = [90, 10, 20, 0], [10, 0, 0, 30]
    table = vocabulary(counts, 1, list("abcd"))
    assert table[(table.layer == 1) & (table.expert == 0)].token.tolist() == ["c", "b", "a"]  # b and c have one lift
    assert table[table.expert == 1].groupby("layer").head(1).token.tolist() == ["d", "d"]
    assert table.layer.is_monotonic_increasing


def test_vocabulary_of_joined_texts_is_their_sum():
    ids = np.array([1, 2])
    whole = vocabulary_counts(np.concatenate([BY_HAND, BY_HAND], 1), 4, np.concatenate([ids, ids]), 3)
    np.testing.assert_array_equal(whole, 2 * vocabulary_counts(BY_HAND, 4, ids, 3))
    assert whole.dtype == np.int32


@pytest.mark.parametrize("ids", [[1], [1, 9], [-1, 1]])
def test_ids_that_are_not_the_texts(ids):
    with pytest.raises(AnalysisError, match="one id from 0 to 8"):
        vocabulary_counts(BY_HAND, 4, np.array(ids), 9)


def test_vocabularies_that_are_none():
    counts = vocabulary_counts(BY_HAND, 4, np.array([0, 1]), 2)
    with pytest.raises(AnalysisError, match="3 names for a vocabulary of 2"):
        vocabulary(counts, 2, list("abc"))
    with pytest.raises(AnalysisError, match="3 choices"):
        vocabulary(counts, 3, list("ab"))
    with pytest.raises(AnalysisError, match="1 or more"):
        vocabulary(counts, 2, list("ab"), minimum=0)


# Entropy and divergence of shares


def test_entropy_and_divergence_by_hand():
    one, half, other = np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.array([0.0, 1.0])
    assert share_entropy(np.stack([one, half])).tolist() == [0, 1]
    assert divergence(one, other) == 1 and divergence(half, half) == 0
    assert float(divergence(one, half)) == pytest.approx(1.5 - 0.75 * log2(3))  # 0.3113: H(3/4, 1/4) less half a bit


@given(shares(3, 2))
def test_divergence_is_the_mean_distance_to_the_middle(drawn):
    found = domain_divergence(drawn)
    for layer, i, j in np.ndindex(2, 3, 3):
        p, q = drawn[i, layer], drawn[j, layer]
        middle = (p + q) / 2
        slow = sum(a / 2 * log2(a / m) for row in (p, q) for a, m in zip(row, middle, strict=True) if a > 0)
        assert found[layer, i, j] == pytest.approx(slow, abs=1e-9)
        assert found[layer, i, j] == pytest.approx(domain_information(np.stack([p, q])), abs=1e-9)
    assert (found <= 1 + 1e-12).all()
    pairs = [found[:, i, j] for i in range(3) for j in range(i + 1, 3)]
    np.testing.assert_allclose(mean_divergence(found), np.mean(pairs, axis=0))


def test_single_precision_shares_will_do():
    drawn = np.full((2, 1, 3), 1 / 3, np.float32)
    assert share_entropy(drawn)[0, 0] == pytest.approx(log2(3), abs=1e-6)
    assert domain_divergence(drawn).max() == 0


@pytest.mark.parametrize("row", [[0.5, 0.6], [1.5, -0.5], [np.nan, 1.0]])
def test_no_shares(row):
    with pytest.raises(AnalysisError, match="sum to 1"):
        share_entropy(np.array([row]))


def test_one_domain_has_no_pairs():
    with pytest.raises(AnalysisError, match="only one domain"):
        mean_divergence(np.zeros((3, 1, 1)))


def test_every_text_weighs_the_same():
    texts = {"law": np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]]), "maths": np.array([[[0.25, 0.75]]])}
    names, means = mean_shares(texts)
    assert names == ("law", "maths") and means.tolist() == [[[0.5, 0.5]], [[0.25, 0.75]]]
    with pytest.raises(AnalysisError, match="at least one text"):
        mean_shares({"law": texts["law"][:0]})


# Language or topic


def test_parallel_passages_of_the_box():
    found = parallel_passages(mixtral_lab.excerpts())
    assert len(found) == 8
    for topic, texts in found.items():
        assert list(texts) == ["english", "french", "german", "spanish"] and topic.startswith(("bible:", "tale:"))
        assert len(set(texts.values())) == 4
    assert found["tale:25"]["english"] in {p["text"] for p in mixtral_lab.excerpts()["stories"]}


def test_passages_without_translation():
    with pytest.raises(AnalysisError, match="No passage exists in all of"):
        parallel_passages(
            {"prose": [{"id": "a", "text": "one"}], "french": [{"id": "b", "text": "un"}], "chat": [{"id": "c"}]}
        )


def test_routing_that_follows_one_or_the_other():
    """Layer 0 goes by the language alone, layer 1 by the topic alone, layer 2 by nothing that can be seen."""
    profiles = np.zeros((3, 2, 3, 4))
    for topic, language in np.ndindex(3, 2):
        profiles[topic, language, 0, language] = 1
        profiles[topic, language, 1, topic] = 1
        profiles[topic, language, 2, 0] = 1
    found = language_or_topic(profiles)
    assert found.language.tolist()[:2] == pytest.approx([1, 0]) and found.topic.tolist()[:2] == pytest.approx([0, 1])
    assert np.isnan([found.language[2], found.topic[2], found.rest[2]]).all()
    assert (found.same_topic[0], found.same_language[0], found.neither[0]) == (1, 0, 1)
    assert (found.same_topic[1], found.same_language[1], found.neither[1]) == (0, 1, 1)
    assert (found.language_by_chance, found.topic_by_chance) == (1 / 5, 2 / 5)


@given(shares(3, 4, 2))
def test_language_and_topic_are_the_slow_ones(profiles):
    found = language_or_topic(profiles)
    grid = list(np.ndindex(3, 4))
    for layer in range(2):
        p = profiles[:, :, layer]
        everywhere = sum(p[cell] for cell in grid) / 12
        total = sum(((p[cell] - everywhere) ** 2).sum() for cell in grid)
        of_language = [sum(p[t, lang] for t in range(3)) / 3 for lang in range(4)]
        of_topic = [sum(p[t, lang] for lang in range(4)) / 4 for t in range(3)]
        apart = {"same_topic": [], "same_language": [], "neither": []}
        language = topic = rest = 0.0
        for t, lang in grid:
            language += ((of_language[lang] - everywhere) ** 2).sum()
            topic += ((of_topic[t] - everywhere) ** 2).sum()
            rest += ((p[t, lang] - of_language[lang] - of_topic[t] + everywhere) ** 2).sum()
            for other_t, other in grid:
                if (other_t, other) != (t, lang):
                    kind = "same_topic" if other_t == t else "same_language" if other == lang else "neither"
                    apart[kind].append(divergence(p[t, lang], p[other_t, other]))
        if total > 1e-9:
            assert [part[layer] for part in found[:3]] == pytest.approx([language / total, topic / total, rest / total])
        for kind, values in apart.items():
            assert getattr(found, kind)[layer] == pytest.approx(np.mean(values), abs=1e-9)


def test_labels_that_mean_nothing_explain_their_share():
    random = np.random.default_rng(0)
    rows = random.dirichlet(np.ones(5), 12)
    dealt = [language_or_topic(random.permutation(rows).reshape(4, 3, 1, 5)) for _ in range(400)]
    for part, chance in (("language", dealt[0].language_by_chance), ("topic", dealt[0].topic_by_chance)):
        explained = [getattr(found, part)[0] for found in dealt]
        assert np.mean(explained) == pytest.approx(chance, abs=4 * np.std(explained) / 20)


@pytest.mark.parametrize("grid", [(1, 4), (4, 1)])
def test_one_language_or_topic_is_too_few(grid):
    with pytest.raises(AnalysisError, match="two of each"):
        language_or_topic(np.full((*grid, 1, 2), 0.5))
