"""What is kept of what was read: sums, from which every measure can be computed once all texts have gone by.

All sums are of whole numbers, and what is kept as an example is chosen by draws that belong to its place in the corpus.
So several processes can read a share each and put their counts together (`Counts.merge`): these are the counts of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tqdm.auto import tqdm

from mixtral_lab import analysis
from mixtral_lab.analysis import offload
from mixtral_lab.lab import Lab
from mixtral_lab.study.corpus import Corpus, StudyError, Text, pieces
from mixtral_lab.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

UNITS = 1_000  # texts of a domain that are told apart; later ones join them in turn
TOPICS = 64  # topics in several languages that are compared, drawn by their names
OFFLOADED = 8_192  # tokens, over all domains, that caches of experts are replayed on
EXAMPLES = 3  # domains of which a text is shown
EXAMPLE = 120  # tokens of it
PLACES = 6  # of every token of the vocabulary, kept with their neighbours
BEFORE, AFTER = 7, 4  # neighbours of a place
ROUTERS = ("layers.*.router.logits", "layers.*.router.experts")
STREAM = "layers.*.residual.between"
ARRAYS = ("ranks", "together", "moved", "entropies", "margins", "vocabulary")  # of `Counts`: sums
LISTS = ("texts", "skipped", "pieces", "tokens", "cached", "digests")  # the same, a number for each domain


class Places:
    """A few places of every token with their neighbours, each place as likely to be kept as any other of that token.

    Of token t the first `min(seen[t], PLACES)` rows count: `ids` around the place (t itself at `BEFORE`, -1 beyond the
    piece), its `domains`, and the `experts` chosen there, `layer choice`. Every place has a draw of its own, and those with
    the smallest `draws` are kept, smallest first, whatever the order in which they come. Takes no more memory for a longer
    corpus. Source: Cohen and Kaplan 2007, Summarizing Data using Bottom-k Sketches.
    """

    def __init__(self, n_vocab: int, n_layers: int, n_experts: int, n_choices: int) -> None:
        self.seen = np.zeros(n_vocab, np.int64)
        self.draws = np.full((n_vocab, PLACES), np.inf)
        self.ids = np.zeros((n_vocab, PLACES, BEFORE + 1 + AFTER), np.int32)
        self.domains = np.zeros((n_vocab, PLACES), np.int32)
        self.experts = np.zeros((n_vocab, PLACES, n_layers, n_choices), np.min_scalar_type(n_experts))

    def add(self, domain: int, ids: np.ndarray, experts: np.ndarray, draws: np.ndarray) -> None:
        """One piece: its ids, `seq`, its choices, `layer seq choice`, and a random number for each place, `seq`."""
        np.add.at(self.seen, ids, 1)
        around = np.pad(ids, (BEFORE, AFTER), constant_values=-1)
        for at in np.flatnonzero(draws < self.draws[ids, -1]):  # few, once a token has been met often
            token, draw = ids[at], draws[at]
            slot = np.searchsorted(self.draws[token], draw)
            if slot == PLACES:  # an earlier place of this piece was drawn before
                continue
            rows = ((self.draws, draw), (self.ids, around[at : at + BEFORE + 1 + AFTER]), (self.domains, domain))
            for kept, new in (*rows, (self.experts, experts[:, at])):
                kept[token, slot + 1 :] = kept[token, slot:-1].copy()
                kept[token, slot] = new

    def merge(self, other: Places) -> None:
        """Keep the places with the smallest draws of both."""
        self.seen += other.seen
        draws = np.concatenate([self.draws, other.draws], axis=1)
        best = np.argsort(draws, axis=1, kind="stable")[:, :PLACES]
        for name in ("draws", "ids", "domains", "experts"):
            both = np.concatenate([getattr(self, name), getattr(other, name)], axis=1)
            setattr(self, name, np.take_along_axis(both, best.reshape(*best.shape, *[1] * (both.ndim - 2)), axis=1))


class Unit:
    """What is resampled as a whole: a text, or of a long corpus every `UNITS`-th text of a domain."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.assigned = np.zeros((n_layers, n_experts), np.int64)
        self.repeated = np.zeros((3, n_layers), np.int64)


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
    parallel: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # by topic and language: layer expert
    examples: dict[str, Trace] = field(default_factory=dict)  # the start of a text, of the first domains
    caches: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        domains, layers, experts = len(self.domains), self.n_layers, self.n_experts
        self.texts, self.skipped, self.pieces, self.tokens, self.cached, self.digests = (
            [0] * domains for _ in range(6)
        )  # by domain; skipped: texts without two tokens; cached: tokens that caches were replayed on
        self.units: list[dict[int, Unit]] = [{} for _ in self.domains]
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

    @property
    def assigned(self) -> list[list[np.ndarray]]:
        """Assignments by domain and unit, the units in the order of the corpus: `layer expert`."""
        return [[units[number].assigned for number in sorted(units)] for units in self.units]

    @property
    def repeated(self) -> list[list[np.ndarray]]:
        """Repetitions by domain and unit: `definition layer`, and the pairs of neighbours below."""
        return [[units[number].repeated for number in sorted(units)] for units in self.units]

    def add_text(self, domain: int, number: int, text: Text, traces: Iterator[Trace]) -> None:
        """Count a domain's text of this number, given as the traces of its pieces."""
        self.texts[domain] += 1
        draw = np.random.default_rng((domain, number))
        digest = hashlib.sha256(number.to_bytes(8, "little"))
        new, before = Unit(self.n_layers, self.n_experts), self.pieces[domain]
        for trace in traces:
            experts, ids = trace.experts.numpy(), trace.ids.numpy()
            digest.update(ids.astype("<i4").tobytes())
            self.places.add(domain, ids, experts, draw.random(len(ids)))
            self._add_piece(domain, trace, experts)
            new.assigned += analysis.assignment_counts(experts, self.n_experts)
            new.repeated += analysis.repetition_counts(experts, self.n_experts)
        if self.pieces[domain] == before:
            self.skipped[domain] += 1
            return
        self.digests[domain] = (self.digests[domain] + int.from_bytes(digest.digest(), "big")) % 2**256
        self._add_unit(domain, number % UNITS, new)
        if text.topic and text.language:
            self._add_parallel((text.topic, text.language), new.assigned)

    def merge(self, other: Counts) -> None:
        """Add what another process counted in its share of the same corpus. Raises `StudyError` for another corpus or model."""
        mine, theirs = self._about, other._about
        if mine != theirs:
            unlike = [name for name in mine if mine[name] != theirs[name]]
            raise StudyError(f"The counts differ in {', '.join(unlike)}: they are not of one model and one corpus.")
        for name in ARRAYS:
            array = getattr(self, name)
            array += getattr(other, name)
        for name in LISTS:
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])
        self.digests = [one % 2**256 for one in self.digests]
        self.places.merge(other.places)
        for domain, units in enumerate(other.units):
            for number, unit in units.items():
                self._add_unit(domain, number, unit)
        for place, assigned in other.parallel.items():
            self._add_parallel(place, assigned)
        for name in self.domains[:EXAMPLES]:
            if name not in self.examples and name in other.examples:
                self.examples[name] = other.examples[name]
        if other.caches is not None:
            self._add_caches(other.caches)

    def to_bytes(self) -> bytes:
        """All but the examples, to be sent to another process: the content of a safetensors file."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        arrays |= {f"places.{name}": array for name, array in vars(self.places).items()}
        for domain, units in enumerate(self.units):
            for number, unit in units.items():
                arrays |= {f"{name}.{domain}.{number}": array for name, array in vars(unit).items()}
        arrays |= {f"parallel.{at}": array for at, array in enumerate(self.parallel.values())}
        rest = {
            "about": {**self._about, "vocab": list(self.vocab)},
            "lists": {name: getattr(self, name) for name in LISTS},
            "parallel": list(self.parallel),
            "caches": None if self.caches is None else self.caches.to_dict("list"),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return save_tensors(tensors, {"counts": json.dumps(rest)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Counts:
        """What `to_bytes` gave."""
        import pandas as pd

        header = int.from_bytes(data[:8], "little")
        rest = json.loads(json.loads(data[8 : 8 + header])["__metadata__"]["counts"])
        arrays = {name: tensor.numpy() for name, tensor in load_tensors(data).items()}
        about = rest["about"]
        found = cls(**{**about, "domains": tuple(about["domains"])})
        for name, values in rest["lists"].items():
            setattr(found, name, values)
        if rest["caches"] is not None:
            found.caches = pd.DataFrame(rest["caches"])
        for name, array in arrays.items():
            kind, *where = name.split(".")
            if kind == "parallel":
                topic, language = rest["parallel"][int(where[0])]
                found.parallel[topic, language] = array
            elif kind == "places":
                setattr(found.places, where[0], array)
            elif where:
                unit = found.units[int(where[0])].setdefault(int(where[1]), Unit(found.n_layers, found.n_experts))
                setattr(unit, kind, array)
            else:
                setattr(found, name, array)
        return found

    @property
    def _about(self) -> dict[str, object]:
        names = ("model", "dtype", "domains", "n_layers", "n_experts", "n_choices", "vocab")
        return {name: getattr(self, name) for name in names}

    def _add_unit(self, domain: int, number: int, new: Unit) -> None:
        unit = self.units[domain].setdefault(number, Unit(self.n_layers, self.n_experts))
        unit.assigned += new.assigned
        unit.repeated += new.repeated

    def _add_parallel(self, place: tuple[str, str], assigned: np.ndarray) -> None:
        """Of more topics than `TOPICS`, those whose names have the smallest hashes stay: the same in whatever order they come."""
        self.parallel[place] = self.parallel.get(place, 0) + assigned
        topics = sorted({topic for topic, _ in self.parallel}, key=lambda name: hashlib.sha256(name.encode()).digest())
        for topic in topics[TOPICS:]:
            for dropped in [one for one in self.parallel if one[0] == topic]:
                del self.parallel[dropped]

    def _add_piece(self, domain: int, trace: Trace, experts: np.ndarray) -> None:
        n_experts, ids = self.n_experts, trace.ids.numpy()
        self.pieces[domain] += 1
        self.tokens[domain] += len(trace)
        self.ranks[domain] += analysis.rank_counts(experts, n_experts)
        self.together += analysis.coactivation_counts(experts, n_experts)
        if self.n_layers > 1:
            self.moved += analysis.transition_counts(experts, n_experts)
        self.vocabulary += analysis.vocabulary_counts(experts, n_experts, ids, len(self.vocab))
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
        self._add_caches(found)

    def _add_caches(self, found: pd.DataFrame) -> None:
        if self.caches is None:
            self.caches = found.copy()
        else:
            sums = ["tokens", "asked", "hits", "ahead", "misses", "loads", "bytes"]
            self.caches[sums] += found[sums]


def count(lab: Lab, corpus: Corpus, share: tuple[int, int] = (0, 1)) -> Counts:
    """Read a corpus, domain by domain and piece by piece; a progress bar shows how far it is.

    `share=(rank, size)` reads every `size`-th text only, beginning with text `rank` of the whole corpus, for processes that
    `Counts.merge` what they found. Raises `StudyError` for a dense model, and for a domain in which no text has two tokens
    (a share may have none: `check_domain` says so of merged counts).
    """
    rank, size = share
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
    running = 0
    with tqdm(total=sum(len(texts) for texts in corpus.values()), unit=" texts", disable=rank > 0) as bar:
        for domain, (name, texts) in enumerate(corpus.items()):
            bar.set_description(f"reading {name}")
            replayed = OFFLOADED // len(corpus)  # the first tokens of every domain, whoever reads them
            for number, one in enumerate(texts):
                text = Text(one) if isinstance(one, str) else one
                mine, shown = running % size == rank, domain < EXAMPLES and name not in counts.examples
                parts = list(pieces(lab, text)) if mine or shown or replayed else []
                if shown and parts:
                    counts.examples[name] = lab.trace_ids(parts[0][:EXAMPLE])
                if mine:
                    counts.add_text(domain, number, text, _traces(lab, counts, domain, parts, replayed))
                replayed = max(0, replayed - sum(map(len, parts)))
                running += 1
                bar.set_postfix_str(f"{sum(counts.tokens):,} tokens", refresh=False)
                bar.update()
            if size == 1:
                check_domain(counts, domain)
    return counts


def check_domain(counts: Counts, domain: int) -> None:
    """Raise `StudyError` if nothing was read of a domain."""
    if not counts.tokens[domain]:
        name = counts.domains[domain]
        raise StudyError(f"The domain {name!r} has no text of two tokens or more: leave it out, or give it one.")


def _vocabulary_of(lab: Lab) -> list[str]:
    """A readable name for every id that the model knows; it may know more than its tokenizer."""
    known = lab.tokenizer.pieces(range(lab.tokenizer.vocab))
    return [*known, *(f"#{unknown}" for unknown in range(len(known), lab.config.vocab))]


def _traces(lab: Lab, counts: Counts, domain: int, parts: Sequence[list[int]], replayed: int) -> Iterator[Trace]:
    """What the routers did with each piece of a text. The first `replayed` tokens go through caches of experts as well."""
    for ids in parts:
        trace = lab.trace_ids(ids, sites=[*ROUTERS, STREAM] if replayed else ROUTERS)
        if replayed:
            counts.add_caches(domain, trace, replayed, lab)
        replayed = max(0, replayed - len(ids))
        yield trace
