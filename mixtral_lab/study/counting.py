"""What is kept of what was read: sums, from which every measure can be computed once all texts have gone by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from mixtral_lab import analysis
from mixtral_lab.analysis import offload
from mixtral_lab.lab import Lab
from mixtral_lab.study.corpus import Corpus, StudyError, Text, pieces
from mixtral_lab.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

UNITS = 1_000  # texts of a domain that are told apart; later ones join them in turn
TOPICS = 64  # topics in several languages that are compared, the first ones met
OFFLOADED = 8_192  # tokens, over all domains, that caches of experts are replayed on
EXAMPLES = 3  # domains of which a text is shown
EXAMPLE = 120  # tokens of it
PLACES = 6  # of every token of the vocabulary, kept with their neighbours
BEFORE, AFTER = 7, 4  # neighbours of a place
ROUTERS = ("layers.*.router.logits", "layers.*.router.experts")
STREAM = "layers.*.residual.between"


class Places:
    """A few places of every token with their neighbours, each place as likely to be kept as any other of that token.

    Of token t the first `min(seen[t], PLACES)` rows count: `ids` around the place (t itself at `BEFORE`, -1 beyond the
    piece), its `domains`, and the `experts` chosen there, `layer choice`. What is kept depends on the
    order of the corpus alone, and takes no more memory for a longer one. Source: Vitter 1985, algorithm R.
    """

    def __init__(self, n_vocab: int, n_layers: int, n_experts: int, n_choices: int) -> None:
        self.seen = np.zeros(n_vocab, np.int64)
        self.ids = np.zeros((n_vocab, PLACES, BEFORE + 1 + AFTER), np.int32)
        self.domains = np.zeros((n_vocab, PLACES), np.int32)
        self.experts = np.zeros((n_vocab, PLACES, n_layers, n_choices), np.min_scalar_type(n_experts))
        self._random = np.random.default_rng(0)

    def add(self, domain: int, ids: np.ndarray, experts: np.ndarray) -> None:
        """One piece: its ids, `seq`, and its choices, `layer seq choice`."""
        order = np.argsort(ids, kind="stable")
        _, start, times = np.unique(ids[order], return_index=True, return_counts=True)
        nth = np.empty(len(ids), np.int64)
        nth[order] = np.arange(len(ids)) - np.repeat(start, times)  # of its kind in this piece
        nth += self.seen[ids]
        np.add.at(self.seen, ids, 1)
        slot = np.where(nth < PLACES, nth, self._random.random(len(ids)) * (nth + 1)).astype(np.int64)
        around = np.pad(ids, (BEFORE, AFTER), constant_values=-1)
        for at in np.flatnonzero(slot < PLACES):  # few, once a token has been met often
            place = ids[at], slot[at]
            self.ids[place] = around[at : at + BEFORE + 1 + AFTER]
            self.domains[place] = domain
            self.experts[place] = experts[:, at]


@dataclass
class Counts:
    """All that is kept of what was read: sums over pieces, two small tables for each text, a few places of each token."""

    model: str
    dtype: str
    domains: tuple[str, ...]
    n_layers: int
    n_experts: int
    n_choices: int
    vocab: Sequence[str]  # every token, readable
    texts: list[int] = field(default_factory=list)  # by domain
    skipped: list[int] = field(default_factory=list)  # texts without two tokens
    pieces: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    assigned: list[list[np.ndarray]] = field(default_factory=list)  # by domain and unit: layer expert
    repeated: list[list[np.ndarray]] = field(default_factory=list)  # by domain and unit: 3 layer
    parallel: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # by topic and language: layer expert
    examples: dict[str, Trace] = field(default_factory=dict)  # the start of a text, of the first domains
    caches: pd.DataFrame | None = None
    cached: list[int] = field(default_factory=list)  # tokens that caches were replayed on, by domain

    def __post_init__(self) -> None:
        domains, layers, experts = len(self.domains), self.n_layers, self.n_experts
        for counter in (self.texts, self.skipped, self.pieces, self.tokens, self.cached):
            counter += [0] * domains
        self.assigned += [[] for _ in self.domains]
        self.repeated += [[] for _ in self.domains]
        self.hashes = [hashlib.sha256() for _ in self.domains]
        self.ranks = np.zeros((domains, layers, self.n_choices, experts), np.int64)
        self.together = np.zeros((layers, experts, experts), np.int64)
        self.moved = np.zeros((max(layers - 1, 0), experts, experts), np.int64)
        self.entropies = np.zeros((domains, layers, analysis.certainty.BINS), np.int64)
        self.margins = np.zeros_like(self.entropies)
        self.vocabulary = np.zeros((layers, len(self.vocab), experts), np.int32)
        self.places = Places(len(self.vocab), layers, experts, self.n_choices)

    @property
    def most_entropy(self) -> float:
        return float(np.log2(self.n_experts))

    @property
    def by_domain(self) -> np.ndarray:
        """Assignments, `domain layer expert`."""
        return self.ranks.sum(2)

    def add_text(self, domain: int, text: Text, traces: Iterator[Trace]) -> None:
        """Count one text, given as the traces of its pieces."""
        self.texts[domain] += 1
        unit = (self.texts[domain] - self.skipped[domain] - 1) % UNITS
        assigned = repeated = None
        for trace in traces:
            experts = trace.experts.numpy()
            self._add_piece(domain, trace, experts)
            here = analysis.assignment_counts(experts, self.n_experts)
            pairs = analysis.repetition_counts(experts, self.n_experts)
            assigned = here if assigned is None else assigned + here
            repeated = pairs if repeated is None else repeated + pairs
        if assigned is None or repeated is None:
            self.skipped[domain] += 1
            return
        if unit < len(self.assigned[domain]):
            self.assigned[domain][unit] += assigned
            self.repeated[domain][unit] += repeated
        else:
            self.assigned[domain].append(assigned)
            self.repeated[domain].append(repeated)
        known = {topic for topic, _ in self.parallel}
        if text.topic and text.language and (text.topic in known or len(known) < TOPICS):
            place = (text.topic, text.language)
            self.parallel[place] = self.parallel.get(place, 0) + assigned

    def _add_piece(self, domain: int, trace: Trace, experts: np.ndarray) -> None:
        n_experts, ids = self.n_experts, trace.ids.numpy()
        self.pieces[domain] += 1
        self.tokens[domain] += len(trace)
        self.hashes[domain].update(ids.astype("<i4").tobytes())
        self.ranks[domain] += analysis.rank_counts(experts, n_experts)
        self.together += analysis.coactivation_counts(experts, n_experts)
        if self.n_layers > 1:
            self.moved += analysis.transition_counts(experts, n_experts)
        self.vocabulary += analysis.vocabulary_counts(experts, n_experts, ids, len(self.vocab))
        self.places.add(domain, ids, experts)
        logits = trace["layers.*.router.logits"].float().numpy()
        self.entropies[domain] += analysis.binned_counts(analysis.router_entropy(logits), self.most_entropy)
        if self.n_choices < n_experts:
            margins = analysis.near_tie_margin(logits, self.n_choices)
            self.margins[domain] += analysis.binned_counts(margins, 1 / self.n_choices)

    def add_caches(self, domain: int, trace: Trace, most: int, lab: Lab) -> None:
        """Replay `most` tokens of a piece through caches of every size, with two ways to guess what comes next."""
        experts, k = trace.experts[:, :most], self.n_choices
        guesses = {
            "router": offload.guesses_from_router(lab.model, trace[STREAM][:, :most], k),
            "transitions": offload.guesses_from_transitions(experts, self.n_experts, k),
        }
        one = offload.expert_bytes(lab.config, float(lab.model.embed.weight.itemsize))
        found = offload.offload_frame(experts, self.n_experts, one, guesses)
        self.cached[domain] += experts.shape[1]
        if self.caches is None:
            self.caches = found
        else:
            sums = ["tokens", "asked", "hits", "ahead", "misses", "loads", "bytes"]
            self.caches[sums] += found[sums]


def count(lab: Lab, corpus: Corpus) -> Counts:
    """Read a corpus, domain by domain and piece by piece; a progress bar shows how far it is.

    Raises `StudyError` for a dense model, and for a domain in which no text has two tokens.
    """
    config = lab.config
    if config.n_experts is None or config.n_choices is None:
        raise StudyError(
            f"{lab.name} is a dense model: it has no routers to study. Take a mixture of experts, such as mini-mixtral."
        )
    if not corpus:
        raise StudyError("There are no domains: give {domain: [text, ...]}.")
    for name, texts in corpus.items():
        if isinstance(texts, str):
            raise StudyError(f"The domain {name!r} is one string: give a list of texts, [{texts[:20]!r}, ...].")
    counts = Counts(
        lab.name, lab.dtype, tuple(corpus), config.n_layers, config.n_experts, config.n_choices, _vocabulary_of(lab)
    )
    with tqdm(total=sum(len(texts) for texts in corpus.values()), unit=" texts") as bar:
        for domain, (name, texts) in enumerate(corpus.items()):
            bar.set_description(f"reading {name}")
            for one in texts:
                text = Text(one) if isinstance(one, str) else one
                counts.add_text(domain, text, _traces(lab, counts, domain, text))
                bar.set_postfix_str(f"{sum(counts.tokens):,} tokens", refresh=False)
                bar.update()
            if not counts.tokens[domain]:
                raise StudyError(
                    f"The domain {name!r} has no text of two tokens or more: leave it out, or give it one."
                )
    return counts


def _vocabulary_of(lab: Lab) -> list[str]:
    """A readable name for every id that the model knows; it may know more than its tokenizer."""
    known = lab.tokenizer.pieces(range(lab.tokenizer.vocab))
    return [*known, *(f"#{unknown}" for unknown in range(len(known), lab.config.vocab))]


def _traces(lab: Lab, counts: Counts, domain: int, text: Text) -> Iterator[Trace]:
    """What the routers did with each piece of a text. Some pieces of every domain are replayed through caches as well."""
    for ids in pieces(lab, text):
        name = counts.domains[domain]
        if domain < EXAMPLES and name not in counts.examples:
            counts.examples[name] = lab.trace_ids(ids[:EXAMPLE])
        left = OFFLOADED // len(counts.domains) - counts.cached[domain]
        trace = lab.trace_ids(ids, sites=[*ROUTERS, STREAM] if left > 0 else ROUTERS)
        if left > 0:
            counts.add_caches(domain, trace, left, lab)
        yield trace
