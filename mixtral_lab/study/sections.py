"""From sums to what the report says: one function for each of its sections, with pictures and tidy tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mixtral_lab import analysis, figures
from mixtral_lab.figures import offload as offload_figures
from mixtral_lab.study.counting import EXAMPLE, Counts

if TYPE_CHECKING:
    import pandas as pd

FAVOURITES = 50  # tokens listed for every expert of every layer
FEW_TEXTS = 5  # with fewer in a domain, chance is judged badly
BARS = 240  # side by side, one for every domain and expert: more of them are drawn as a map
SEED = 0  # of everything that is drawn


class Section(NamedTuple):
    """A part of the report: what it shows in a few sentences, its pictures, and the tables they are drawn from."""

    title: str
    words: str
    figures: dict[str, Any]  # plotly figures, by the name of their file
    tables: dict[str, pd.DataFrame]
    captions: Mapping[str, str] = MappingProxyType({})  # of figures that do not say themselves what they show


def all_sections(counts: Counts) -> tuple[list[Section], list[str]]:
    """All that can be said of what was counted, and a sentence for everything that cannot."""
    found: list[Section] = []
    lacking: list[str] = []
    for make in (
        _shares, _ranks, _examples, _repetition, _certainty, _coactivation, _transitions, _vocabulary, _domains,
        _information, _parallel, _caches,
    ):  # fmt: skip
        made = make(counts)
        if isinstance(made, str):
            lacking.append(made)
        else:
            found.append(made)
    return found, lacking


def tidy(values: Mapping[str, np.ndarray], **axes: Sequence[Any]) -> pd.DataFrame:
    """Arrays of one shape as a table: a row for each cell, a column for each axis and for each array."""
    import pandas as pd

    table = pd.MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)
    return table.assign(**{name: array.ravel() for name, array in values.items()})


def _maker(counts: Counts) -> dict[str, Any]:
    return {"model": counts.model, "dtype": counts.dtype}


def _three_layers(counts: Counts) -> list[int]:
    return sorted({0, (counts.n_layers - 1) // 2, counts.n_layers - 1})


def _crowded(counts: Counts) -> bool:
    return len(counts.domains) * counts.n_experts > BARS


def _shares(counts: Counts) -> Section:
    shares = analysis.as_shares(counts.by_domain)
    domains, layers, experts = counts.domains, range(counts.n_layers), range(counts.n_experts)
    table = tidy({"assignments": counts.by_domain, "share": shares}, domain=domains, layer=layers, expert=experts)
    draw = figures.domain_experts if _crowded(counts) else figures.expert_shares
    return Section(
        "Who reads what",
        "Of all assignments of a domain's tokens to experts, the share that went to each, be it as first choice or as a "
        f"further one (Mixtral paper, Figure 7). A router that used all experts alike would give each {1 / len(experts):.1%}; "
        "one that made no difference between domains would show the same picture for all of them.",
        {"shares": draw(shares, domains, **_maker(counts))},
        {"shares": table},
    )


def _ranks(counts: Counts) -> Section | str:
    if counts.n_choices < 2:
        return "Shares by rank: every token has one choice only."
    shares = analysis.as_shares(counts.ranks)
    table = tidy(
        {"assignments": counts.ranks, "share": shares},
        domain=counts.domains, layer=range(counts.n_layers), choice=range(counts.n_choices),
        expert=range(counts.n_experts),
    )  # fmt: skip
    captions = {}
    if _crowded(counts):
        drawn = {"ranks_first": figures.domain_experts(shares[:, :, 0], counts.domains, **_maker(counts))}
        captions = {"ranks_first": "First choices alone"}
    else:
        drawn = {
            f"ranks_layer_{layer}": figures.rank_shares(shares, counts.domains, layer, **_maker(counts))
            for layer in _three_layers(counts)
        }
    return Section(
        "First and further choices",
        "The same, first choices, second choices and so on apart (Figure 9): some experts are called as the main reader, "
        "others to assist. In the table, choice 0 is the first.",
        drawn,
        {"ranks": table},
        captions,
    )


def _examples(counts: Counts) -> Section:
    names = {f"example_{at}": domain for at, domain in enumerate(counts.examples)}
    return Section(
        "What it looks like in a text",
        f"The first {EXAMPLE} tokens or fewer of a text, each on the colour of its first-choice expert (Figure 8). Whether "
        "colours follow meaning or form, such as indentation and punctuation, is what the measures below put into numbers.",
        {name: figures.tokens_by_expert(counts.examples[domain]) for name, domain in names.items()},
        {},
        names,
    )


def _repetition(counts: Counts) -> Section:
    import pandas as pd

    found = {
        domain: analysis.repetition(np.stack(repeated), SEED)
        for domain, repeated in zip(counts.domains, counts.repeated, strict=True)
    }
    blind = analysis.random_repetition(counts.n_experts, counts.n_choices)
    tables = []
    for domain, one in found.items():
        table = tidy(
            {"share": one.share, "low": one.low, "high": one.high},
            domain=[domain], definition=analysis.neighbours.DEFINITIONS, layer=range(counts.n_layers),
        )  # fmt: skip
        tables.append(table.assign(random=np.repeat(blind, counts.n_layers), texts=one.texts, pairs=one.pairs))
    return Section(
        "Do neighbours share an expert?",
        "Of two tokens in a row, how often the second has the same first choice, and how often any choice in common with the "
        "first (Table 5 and Figure 10). Bands are 95 % intervals, found by drawing texts anew 1,000 times, or Wilson's where "
        "a domain has a single text; dashed is blind choice. More than that means that routing follows stretches of text.",
        {"repetition": figures.repetition(found, counts.n_experts, counts.n_choices, **_maker(counts))},
        {"repetition": pd.concat(tables, ignore_index=True)},
    )


def _certainty(counts: Counts) -> Section | str:
    if counts.n_choices == counts.n_experts:
        return "Entropy and margins: every token takes every expert."
    k, tops = counts.n_choices, {"entropy": counts.most_entropy, "margin": 1 / counts.n_choices}
    values = {"near_ties": np.stack([analysis.near_ties(margins, k) for margins in counts.margins])}
    for name, bins in (("entropy", counts.entropies), ("margin", counts.margins)):
        for share, label in ((0.05, "low"), (0.5, "median"), (0.95, "high")):
            values[f"{name}_{label}"] = np.stack([analysis.binned_quantile(one, tops[name], share) for one in bins])
    figure = figures.router_certainty(
        counts.entropies.sum(0), counts.margins.sum(0), counts.n_experts, k, **_maker(counts)
    )
    return Section(
        "How sure is the router?",
        f"The entropy of a router's probabilities, in bits: 0 is certain, {counts.most_entropy:.3g} undecided among all "
        f"{counts.n_experts}. The margin is the probability between the last expert chosen and the first one left out. "
        f"Where it is below {analysis.certainty.NEAR_TIE} (`near_ties` in the table), another dtype may choose another "
        "expert. In the table, low and high are the 5th and 95th hundredth of the tokens.",
        {"certainty": figure},
        {"certainty": tidy(values, domain=counts.domains, layer=range(counts.n_layers))},
    )


def _coactivation(counts: Counts) -> Section | str:
    if counts.n_choices < 2:
        return "Co-activation: every token has one choice only."
    experts = range(counts.n_experts)
    table = tidy(
        {"tokens": counts.together, "share": analysis.coactivation(counts.together)},
        layer=range(counts.n_layers), expert=experts, other=experts,
    )  # fmt: skip
    return Section(
        "Which experts work together?",
        "Of the tokens that chose one expert, the share that also chose another (OLMoE, section 5). Even company would give "
        f"{(counts.n_choices - 1) / (counts.n_experts - 1):.1%} everywhere.",
        {"coactivation": figures.coactivation(counts.together, **_maker(counts))},
        {"coactivation": table[table.expert != table.other].reset_index(drop=True)},
    )


def _transitions(counts: Counts) -> Section | str:
    if counts.n_layers < 2:
        return "Transitions from layer to layer: the model has one layer."
    experts = range(counts.n_experts)
    table = tidy(
        {"assignments": counts.moved, "share": analysis.transitions(counts.moved)},
        layer=range(counts.n_layers - 1), expert=experts, next_expert=experts,
    )  # fmt: skip
    return Section(
        "From layer to layer",
        "Of what comes from an expert of one layer, the share that goes to each expert of the layer above, every choice "
        "paired with every choice. If layers chose independently, all rows of a panel would be alike.",
        {"transitions": figures.transitions(counts.moved, **_maker(counts))},
        {"transitions": table},
    )


def _vocabulary(counts: Counts) -> Section | str:
    import pandas as pd

    tables = []
    for layer in range(counts.n_layers):  # one at a time: the whole table can be large
        table = analysis.vocabulary(counts.vocabulary[layer : layer + 1], counts.n_choices, counts.vocab)
        tables.append(table.groupby("expert").head(FAVOURITES).assign(layer=layer))
    favourites = pd.concat(tables, ignore_index=True)
    shown = [layer for layer in _three_layers(counts) if (favourites.layer == layer).any()]
    if not shown:
        return "Favourite tokens: no token occurs ten times."
    return Section(
        "Which tokens does an expert like?",
        "Of a token's occurrences, the share that an expert reads, for tokens that occur ten times or more; sorted by lift, "
        "how many times the expert's share of all tokens that is (OLMoE, section 5). The table has the first "
        f"{FAVOURITES} of every expert.",
        {f"vocabulary_layer_{layer}": figures.vocabulary(favourites, layer, **_maker(counts)) for layer in shown},
        {"vocabulary": favourites},
    )


def _domains(counts: Counts) -> Section | str:
    if len(counts.domains) < 2:
        return "Differences between domains: there is only one."
    share = analysis.domain_specialisation(counts.by_domain, counts.n_choices)
    apart = analysis.domain_divergence(analysis.as_shares(counts.by_domain))
    layers, domains = range(counts.n_layers), counts.domains
    divergence = tidy({"bits": apart}, layer=layers, domain=domains, other=domains)
    return Section(
        "Which domains does an expert like?",
        "First, the share of a domain's tokens that chose an expert, against what even use would give, "
        f"{counts.n_choices / counts.n_experts:.3g} (OLMoE, section 5). Then how differently two domains use the experts: "
        "the Jensen-Shannon divergence of their shares, 0 bits if alike and 1 if they have no expert in common.",
        {
            "domains": figures.domain_experts(share, domains, **_maker(counts)),
            "divergence": figures.domain_divergence(apart, domains, **_maker(counts)),
        },
        {
            "domains": tidy({"share": share}, domain=domains, layer=layers, expert=range(counts.n_experts)),
            "divergence": divergence[divergence.domain != divergence.other].reset_index(drop=True),
        },
    )


def _information(counts: Counts) -> Section | str:
    if len(counts.domains) < 2:
        return "Information about the domain: there is only one."
    bits, shuffled = _bits(counts)
    low, high = np.percentile(shuffled, [2.5, 97.5], axis=0)
    values = {"bits": bits, "shuffled_mean": shuffled.mean(0), "shuffled_low": low, "shuffled_high": high}
    few = [domain for domain, units in zip(counts.domains, counts.assigned, strict=True) if len(units) < FEW_TEXTS]
    caution = f" Chance is judged by few texts in {', '.join(few)}." if few else ""
    return Section(
        "What does the expert tell about the domain?",
        "The mutual information of chosen expert and domain, in bits, beside what comes out when the domains are dealt out to "
        f"the texts at random, {len(shuffled)} times (mean and 95 %). A measured bar above that is more than chance.{caution}",
        {"information": figures.domain_information(bits, shuffled, **_maker(counts))},
        {"information": tidy(values, layer=range(counts.n_layers))},
    )


def _bits(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Mutual information of every layer, and the same with shuffled domains, `shuffle layer`."""
    bits = np.array([analysis.domain_information(counts.by_domain[:, layer]) for layer in range(counts.n_layers)])
    labels = [name for name, units in zip(counts.domains, counts.assigned, strict=True) for _ in units]
    units = np.stack([unit for units in counts.assigned for unit in units])
    return bits, analysis.shuffled_information(units, labels, seed=SEED)


def _parallel(counts: Counts) -> Section | str:
    languages = sorted({language for _, language in counts.parallel})
    topics = sorted({topic for topic, _ in counts.parallel})
    whole = [topic for topic in topics if all((topic, language) in counts.parallel for language in languages)]
    if len(whole) < 2 or len(languages) < 2:
        return "Language or topic: the corpus has no two topics that both exist in the same two languages or more."
    profiles = np.stack([[analysis.as_shares(counts.parallel[t, one]) for one in languages] for t in whole])
    found = analysis.language_or_topic(profiles)
    values = {name: value for name, value in found._asdict().items() if isinstance(value, np.ndarray)}
    table = tidy(values, layer=range(counts.n_layers))
    return Section(
        "Language or topic?",
        f"{len(whole)} passages that say the same in {', '.join(languages)}: how much of the difference between their "
        "shares of experts goes with the language and how much with the topic, a topic being one passage. Below, how far "
        "apart two of them are that share the one or the other.",
        {"language_or_topic": figures.language_or_topic(found, **_maker(counts))},
        {
            "language_or_topic": table.assign(
                language_by_chance=found.language_by_chance, topic_by_chance=found.topic_by_chance
            )
        },
    )


def _caches(counts: Counts) -> Section | str:
    if counts.caches is None:
        return "Offloading: no text was replayed."
    table = counts.caches.assign(hit_rate=counts.caches.hits / counts.caches.asked)
    return Section(
        "If experts had to be fetched",
        "How often a cache of some experts per layer would hold the one asked for, and what it would move, token by token, "
        f"replayed on {sum(counts.cached):,} tokens, at most {max(counts.cached):,} of a domain; with every piece a cache starts "
        "empty. `router` asks the next layer's router beforehand, `transitions` guesses from what followed before (arXiv "
        f"2312.17238). Bytes are those of {counts.dtype}.",
        {
            "caches": offload_figures.expert_cache(counts.caches, **_maker(counts)),
            "caches_by_layer": offload_figures.expert_cache_by_layer(counts.caches, **_maker(counts)),
        },
        {"caches": table},
    )


def by_layer(counts: Counts) -> pd.DataFrame:
    """The whole study in one row per layer: over all domains, the numbers one asks for first."""
    shares = analysis.as_shares(counts.by_domain).mean(0)
    table = tidy({"largest share": shares.max(-1), "smallest share": shares.min(-1)}, layer=range(counts.n_layers))
    if counts.n_choices < counts.n_experts:
        table["median entropy, bits"] = analysis.binned_quantile(counts.entropies.sum(0), counts.most_entropy, 0.5)
        table["near ties"] = analysis.near_ties(counts.margins.sum(0), counts.n_choices)
    repeated = np.sum([unit for units in counts.repeated for unit in units], axis=0)
    table["same first choice as its neighbour"] = repeated[0] / repeated[2]
    table["any choice in common"] = repeated[1] / repeated[2]
    if len(counts.domains) > 1:
        bits, shuffled = _bits(counts)
        table["bits about the domain"] = bits
        table["bits, domains shuffled"] = shuffled.mean(0)
    return table


def corpus_table(counts: Counts) -> pd.DataFrame:
    """What was read of every domain, and a fingerprint of it, by which one sees that two studies read the same.

    The fingerprint is the sum of the texts' hashes modulo 2^256, each SHA-256 of the text's number in its domain, from 0, as a
    64-bit and its ids as 32-bit little-endian integers: a sum, so that several processes can share the texts. (It is not
    safe against somebody who seeks two corpora with one fingerprint.)
    """
    import pandas as pd

    return pd.DataFrame(
        {
            "domain": counts.domains,
            "texts": np.subtract(counts.texts, counts.skipped),
            "left out": counts.skipped,
            "pieces": counts.pieces,
            "tokens": counts.tokens,
            "sha256 of ids": [f"{one:064x}" for one in counts.digests],
        }
    )
