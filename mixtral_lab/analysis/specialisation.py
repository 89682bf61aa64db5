"""What an expert likes: which tokens, which kind of text, and whether it follows the language or the topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from mixtral_lab.analysis.routing import AnalysisError, Experts, checked

if TYPE_CHECKING:
    import pandas as pd

TRANSLATIONS = ("french", "german", "spanish")  # domains of the excerpts that are named for their language
ORIGINAL = "english"  # the language of all others


def vocabulary_counts(
    experts: Experts, n_experts: int, ids: Integer[np.ndarray, " _"], n_vocab: int
) -> Integer[np.ndarray, "layer vocab expert"]:
    """N(token, e): how often each token of the vocabulary was given to each expert, as 32-bit integers.

    The array is large (a vocabulary of 32,000, 32 layers of 8 experts: 33 MB), so count a corpus in large pieces: texts
    may be joined end to end first. Raises `AnalysisError` for ids that are not one per token, or not in the vocabulary.
    """
    layers, seq, _ = experts.shape
    if len(ids) != seq or (seq and not 0 <= ids.min() <= ids.max() < n_vocab):
        raise AnalysisError(
            f"There are {len(ids)} ids for {seq} tokens of a vocabulary of {n_vocab}: give one id from 0 to {n_vocab - 1} each."
        )
    cells = ids.astype(np.int64)[:, None] * n_experts + checked(experts, n_experts)
    counts = np.zeros((layers, n_vocab * n_experts), np.int32)
    for layer in range(layers):
        cell, times = np.unique(cells[layer], return_counts=True)
        counts[layer, cell] = times
    return counts.reshape(layers, n_vocab, n_experts)


def vocabulary(
    counts: Integer[np.ndarray, "layer vocab expert"], n_choices: int, tokens: Sequence[str], minimum: int = 10
) -> pd.DataFrame:
    """Which tokens an expert likes: a tidy table, a row for each layer, expert and token that met, the favourites first.

    Columns: layer, expert, id, token, count = N(token, e), occurrences = N(token), share = N(token, e) / N(token), and
    lift, how many times the share of all tokens that the expert reads. Only tokens that occur `minimum` times or more:
    a token that occurs once gives some expert a share of 1. `counts` come from `vocabulary_counts`, `tokens` names
    the vocabulary. Sorted by layer and expert, then lift, then count, so that
    `table.groupby(["layer", "expert"]).head(10)` are the ten favourites of each. Source: OLMoE (arXiv 2409.02060,
    section 5) for the share. Raises `AnalysisError` unless every id has a name and the counts fit `n_choices`.
    """
    import pandas as pd

    if len(tokens) != counts.shape[1]:
        raise AnalysisError(
            f"There are {len(tokens)} names for a vocabulary of {counts.shape[1]}: give one for each id."
        )
    assigned = counts.sum(-1, dtype=np.int64)
    if minimum < 1 or n_choices < 1 or (assigned % n_choices).any() or not assigned.any():
        raise AnalysisError(
            f"These are not the counts of tokens with {n_choices} choices each, or `minimum` ({minimum}) is not 1 or more."
        )
    occurrences = assigned // n_choices
    usual = counts.sum(1, dtype=np.int64) / occurrences.sum(1, keepdims=True)  # N(e) / N
    layer, token, expert = np.nonzero((counts > 0) & (occurrences >= minimum)[:, :, None])
    count = counts[layer, token, expert]
    share = count / occurrences[layer, token]
    table = pd.DataFrame(
        {
            "layer": layer,
            "expert": expert,
            "id": token,
            "token": np.asarray(tokens, dtype=object)[token],
            "count": count,
            "occurrences": occurrences[layer, token],
            "share": share,
            "lift": share / usual[layer, expert],
        }
    )
    order = ["layer", "expert", "lift", "count", "id"]
    return table.sort_values(order, ascending=[True, True, False, False, True], ignore_index=True)


def share_entropy(shares: Float[np.ndarray, "*axes expert"]) -> Float[np.ndarray, "*axes"]:
    """-Σ s log2 s over the experts, in bits: log2 E if all are used alike, 0 if one does everything.

    Raises `AnalysisError` if the shares are not 0 or more and sum to 1.
    """
    if not np.isfinite(shares).all() or (shares < 0).any() or not np.allclose(shares.sum(-1), 1, atol=1e-3):
        raise AnalysisError("Shares must be 0 or more and sum to 1 over the experts.")
    s = shares.astype(np.float64)
    return np.asarray(np.maximum(-(s * np.log2(np.where(s > 0, s, 1))).sum(-1), 0))  # rounding can leave -1e-17


def divergence(
    shares: Float[np.ndarray, "*axes expert"], others: Float[np.ndarray, "*axes expert"]
) -> Float[np.ndarray, "*axes"]:
    """The Jensen-Shannon divergence in bits: the entropy of the mean of two rows of shares, less their mean entropy.

    0 if they are equal, 1 if they have no expert in common; (1, 0) and (1/2, 1/2) give 0.311. It is also the mutual
    information of expert and row for two rows of equal weight. Source: Lin 1991. Raises `AnalysisError` as
    `share_entropy` does.
    """
    middle = (shares.astype(np.float64) + others) / 2
    return np.asarray(np.maximum(share_entropy(middle) - (share_entropy(shares) + share_entropy(others)) / 2, 0))


def domain_divergence(
    shares: Float[np.ndarray, "domain layer expert"],
) -> Float[np.ndarray, "layer domain other"]:
    """`divergence` of every two domains in every layer. Symmetric, with 0 on the diagonal."""
    return np.stack([divergence(shares, np.broadcast_to(row, shares.shape)) for row in shares], -1).transpose(1, 0, 2)


def mean_divergence(divergences: Float[np.ndarray, "layer domain other"]) -> Float[np.ndarray, " layer"]:
    """The mean of `domain_divergence` over all pairs of different domains. Raises `AnalysisError` for fewer than two."""
    if divergences.shape[1] < 2:
        raise AnalysisError("There is only one domain, so no pair of domains: give two or more.")
    row, column = np.triu_indices(divergences.shape[1], 1)
    return divergences[:, row, column].mean(-1)


def mean_shares(
    shares_by_domain: Mapping[str, Float[np.ndarray, "_ layer expert"]],
) -> tuple[tuple[str, ...], Float[np.ndarray, "domain layer expert"]]:
    """The names of the domains, and the mean of their texts' shares: for recorded shares `text layer expert`.

    Every text weighs the same here, however long, unlike in `domain_shares`. Raises `AnalysisError` if there are no
    domains or one has no text.
    """
    if not shares_by_domain or not all(len(shares) for shares in shares_by_domain.values()):
        raise AnalysisError(f"Every domain needs at least one text; the domains given are {list(shares_by_domain)}.")
    return tuple(shares_by_domain), np.stack([s.mean(0, dtype=np.float64) for s in shares_by_domain.values()])


def parallel_passages(excerpts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, str]]:
    """The passages that exist in every language, as {topic: {language: text}}: a topic is one passage and its translations.

    `excerpts` is what `mixtral_lab.excerpts()` returns: passages of the same `id` say the same thing. Domains named for a
    language are in it, all others in English. Raises `AnalysisError` if no passage exists in all four.
    """
    found: dict[str, dict[str, str]] = {}
    for domain, passages in excerpts.items():
        language = domain if domain in TRANSLATIONS else ORIGINAL
        for passage in passages:
            if "text" in passage:
                found.setdefault(passage["id"], {})[language] = passage["text"]
    languages = (ORIGINAL, *TRANSLATIONS)
    whole = {
        topic: {language: texts[language] for language in languages}
        for topic, texts in found.items()
        if len(texts) == len(languages)
    }
    if not whole:
        raise AnalysisError(f"No passage exists in all of {', '.join(languages)}.")
    return whole


class LanguageOrTopic(NamedTuple):
    """How much of the difference between texts goes with their language, and how much with their topic.

    `language`, `topic` and `rest` are shares that sum to 1 in every layer, to be compared with `language_by_chance` and
    `topic_by_chance`. The other three are mean divergences in bits, of pairs of texts on the same topic in two
    languages, in the same language on two topics, and with neither in common.
    """

    language: Float[np.ndarray, " layer"]
    topic: Float[np.ndarray, " layer"]
    rest: Float[np.ndarray, " layer"]
    language_by_chance: float
    topic_by_chance: float
    same_topic: Float[np.ndarray, " layer"]
    same_language: Float[np.ndarray, " layer"]
    neither: Float[np.ndarray, " layer"]


def language_or_topic(profiles: Float[np.ndarray, "topic language layer expert"]) -> LanguageOrTopic:
    """Does routing follow the language of a text or what it is about? From parallel texts, every topic in every language.

    A profile is a text's shares of assignments, `as_shares(assignment_counts(...))`. In every layer the squared distances
    of the profiles from their mean are split as in an analysis of variance with two factors: what the means of the
    languages explain, what the means of the topics explain, and the rest (which holds what is peculiar to one text, and the
    chance of short texts). If labels meant nothing, L languages and T topics would explain (L - 1) and (T - 1) parts in
    L T - 1, on average. The mean Jensen-Shannon divergences say the same without squares: where `same_topic`
    pairs lie farther apart than `same_language` pairs, routing follows the language. A topic is one passage, so its
    genre is part of it. Shares are not-a-number in a layer where all profiles are equal.
    Raises `AnalysisError` unless there are two topics and two languages at least.
    """
    topics, languages, layers, _ = profiles.shape
    if topics < 2 or languages < 2:
        raise AnalysisError(f"There are {topics} topics in {languages} languages: two of each are needed to compare.")
    p = profiles.astype(np.float64)
    mean = p.mean((0, 1))
    total = ((p - mean) ** 2).sum((0, 1, 3))
    of_language = topics * ((p.mean(0) - mean) ** 2).sum((0, 2))
    of_topic = languages * ((p.mean(1) - mean) ** 2).sum((0, 2))
    rest = np.maximum(total - of_language - of_topic, 0)
    parts = [
        np.divide(part, total, out=np.full(layers, np.nan), where=total > 1e-20)
        for part in (of_language, of_topic, rest)
    ]
    apart = domain_divergence(p.reshape(topics * languages, layers, -1))
    topic, language = np.divmod(np.arange(topics * languages), languages)
    one_topic, one_language = topic[:, None] == topic, language[:, None] == language
    return LanguageOrTopic(
        language=parts[0],
        topic=parts[1],
        rest=parts[2],
        language_by_chance=(languages - 1) / (topics * languages - 1),
        topic_by_chance=(topics - 1) / (topics * languages - 1),
        same_topic=apart[:, one_topic & ~one_language].mean(-1),
        same_language=apart[:, one_language & ~one_topic].mean(-1),
        neither=apart[:, ~one_language & ~one_topic].mean(-1),
    )
