"""Everything that a routing study knows of every expert, to walk about in: ExpertAtlas."""

from __future__ import annotations

import html
import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import traitlets

from mixtral_lab import analysis
from mixtral_lab.figures import expert_colour, text_colour
from mixtral_lab.study import Counts, Study
from mixtral_lab.study.counting import BEFORE, PLACES
from mixtral_lab.widgets.base import MOST_STATE, LabWidget, WidgetError, packed

ROOM = 0.9 * MOST_STATE  # bytes that arrays and tokens may take
FAVOURITES = 10  # tokens listed for an expert
FEWEST = 10  # times that a token must occur to be one of them
SHOWN = 3  # places shown of each
STATIC_DOMAINS, STATIC_EXPERTS, STATIC_TOKENS = 24, 16, 5  # in the fallback


class Liked(NamedTuple):
    """The favourite tokens of a layer's experts, the highest lift first; an id of -1 means that there are no more."""

    ids: np.ndarray  # expert favourite
    counts: np.ndarray  # how many of them the expert read
    occurrences: np.ndarray  # how many there are
    slots: np.ndarray  # expert favourite place: which of the kept places the expert read, -1 for none
    ranks: np.ndarray  # expert favourite place: as which choice, 0 is the first


class ExpertAtlas(LabWidget, script="expert_atlas.js"):
    """Who reads what, what each expert likes, its company, and where its tokens come from and go to, for every layer.

        ExpertAtlas(study(lab, bundled_texts(), "out"))
        ExpertAtlas(count(lab, {"code": [...], "prose": [...]}))

    It takes what `mixtral_lab.study.count` counted, or a `Study` made of it. `selected_layer`, `selected_expert` and
    `selected_domain` (None: all of them) can be read and set. Favourite tokens are those of `analysis.vocabulary`, by
    lift, among tokens that occur ten times or more; places are some where the expert was chosen, as the first choice if
    there are such. The numbers of all layers are kept if they fit in a megabyte, else those around the selected layer.
    Raises `WidgetError` for anything but a study, and for an expert, layer or domain that is not in it.
    """

    about = traitlets.Dict(help="what was counted: the model and the size of the corpus").tag(sync=True)
    domains: traitlets.List = traitlets.List(help="their names").tag(sync=True)
    tokens: traitlets.List = traitlets.List(help="which the arrays number").tag(sync=True)
    held: traitlets.List = traitlets.List(help="of the layers known in full: the first, and one past the last").tag(
        sync=True
    )
    selected_layer = traitlets.Int(0, help="the layer that is looked at").tag(sync=True)
    selected_expert = traitlets.Int(0, help="the expert that is looked at").tag(sync=True)
    selected_domain = traitlets.Unicode(None, allow_none=True, help="the domain that is looked at; None: all").tag(
        sync=True
    )

    def __init__(self, study: Study | Counts) -> None:
        counts = _counts_of(study)
        self.counts = counts
        self._liked = cache(lambda layer: _favourites(counts, layer))
        super().__init__()
        self.domains = list(counts.domains)
        if not sum(counts.tokens):
            self.notice = "Nothing was counted, so there is nothing to show: give a study of some texts."
            return
        self.colour(counts.n_experts)
        self.about = {
            "model": counts.model,
            "dtype": counts.dtype,
            "layers": counts.n_layers,
            "experts": counts.n_experts,
            "choices": counts.n_choices,
            "tokens": counts.tokens,
            "texts": [int(n) for n in np.subtract(counts.texts, counts.skipped)],
            "fewest": FEWEST,
            "before": BEFORE,
        }
        self._hold(0)

    @property
    def title(self) -> str:
        return f"The experts of {self.counts.model}"

    @traitlets.validate("selected_layer")
    def _a_layer(self, proposal: Any) -> int:
        return self._numbered(proposal["value"], "layer", self.counts.n_layers)

    @traitlets.validate("selected_expert")
    def _an_expert(self, proposal: Any) -> int:
        return self._numbered(proposal["value"], "expert", self.counts.n_experts)

    @staticmethod
    def _numbered(value: int, what: str, n: int) -> int:
        if not 0 <= value < n:
            raise WidgetError(f"There is no {what} {value}: the study has {n}, numbered 0 to {n - 1}.")
        return value

    @traitlets.validate("selected_domain")
    def _a_domain(self, proposal: Any) -> str | None:
        value = proposal["value"]
        if value is not None and value not in self.counts.domains:
            names = ", ".join(map(repr, self.counts.domains[:20])) + (", ..." if len(self.counts.domains) > 20 else "")
            raise WidgetError(f"There is no domain {value!r}: choose {names}, or None for all.")
        return value

    @traitlets.observe("selected_layer")
    def _moved(self, change: Any) -> None:
        if self.held and not self.held[0] <= change["new"] < self.held[1]:
            self._hold(change["new"])

    def _hold(self, layer: int) -> None:
        """Hand the script this layer, and as many around it as there is room for."""
        counts, layers = self.counts, self.counts.n_layers
        ranks = 1 if counts.n_choices == 1 else 3
        least = 2 * counts.n_experts * (len(counts.domains) * ranks + 2 * counts.n_experts)  # bytes of one layer
        room = max(1, min(layers, int(ROOM / least)))
        while True:
            first = min(max(layer - room // 2, 0), layers - room)
            tokens, arrays = self._detail(first, first + room)
            size = len(json.dumps(tokens, ensure_ascii=False).encode()) + len(packed(arrays)[1])
            if size <= ROOM or room == 1:
                break
            room = max(1, min(room - 1, int(0.97 * room * ROOM / size)))
        if size > ROOM:
            domains = f"{len(counts.domains)} domain" + "s" * (len(counts.domains) > 1)
            self.notice = (
                f"Too much for a widget: {counts.n_experts} experts in {domains} make {size / 1e6:.1f} MB for a single layer. "
                "mixtral_lab.study.study writes a report of any size."
            )
            return
        with self.hold_sync():
            self.tokens, self.held = tokens, [first, first + room]
            self.keep(**arrays)

    def _detail(self, first: int, end: int) -> tuple[list[str], dict[str, np.ndarray]]:
        """Some layers as the script reads them: the names of the tokens, and arrays that number these."""
        counts = self.counts
        liked = Liked(*map(np.stack, zip(*(self._liked(layer) for layer in range(first, end)), strict=True)))
        # Every place once, whichever experts show it.
        layer, expert, favourite, shown = np.nonzero(liked.slots >= 0)
        rows = liked.ids[layer, expert, favourite] * PLACES + liked.slots[layer, expert, favourite, shown]
        rows, which = np.unique(rows, return_inverse=True)
        places = np.full(liked.slots.shape, -1)
        places[layer, expert, favourite, shown] = which
        around = counts.places.ids[rows // PLACES, rows % PLACES]
        used = np.unique(np.concatenate([liked.ids.ravel(), around.ravel()]))
        used = used[used >= 0]

        def numbered(ids: np.ndarray) -> np.ndarray:
            return np.where(ids >= 0, np.searchsorted(used, ids), -1)

        ranks = [counts.ranks.sum(2), *(counts.ranks[:, :, rank] for rank in range(min(counts.n_choices, 2)))]
        by_rank = np.stack(ranks[: 1 if counts.n_choices == 1 else 3], axis=2)  # domain layer rank expert
        arrays = {
            "taken": by_rank.sum(0),
            "shares": analysis.as_shares(by_rank[:, first:end]),
            "liked": numbered(liked.ids),
            "liked_counts": liked.counts,
            "liked_occurrences": liked.occurrences,
            "liked_places": places,
            "liked_ranks": liked.ranks,
            "places": numbered(around),
            "place_domains": counts.places.domains[rows // PLACES, rows % PLACES],
        }
        if counts.n_choices > 1:
            arrays["together"] = analysis.coactivation(counts.together[first:end])
        if counts.n_layers > 1:
            arrays["moved"] = analysis.transitions(counts.moved[max(first - 1, 0) : end])
        return [counts.vocab[token] for token in used.tolist()], arrays

    def fallback(self) -> str:
        """The selected layer as tables: each expert's share of each domain, and its favourite tokens."""
        if not self.about:
            return f"<p>{html.escape(self.notice)}</p>"
        counts, layer = self.counts, self.selected_layer
        shown, named = min(counts.n_experts, STATIC_EXPERTS), min(len(counts.domains), STATIC_DOMAINS)
        shares = analysis.as_shares(counts.by_domain[:, layer])
        plain = "padding:2px 6px;text-align:right;color:inherit"
        heads = "".join(
            f'<th style="padding:2px 6px;background:{expert_colour(e)};color:{text_colour(expert_colour(e))}">{e}</th>'
            for e in range(shown)
        )
        rows = []
        for name, row in zip(counts.domains[:named], shares, strict=False):
            cells = "".join(f'<td style="{plain}">{share:.1%}</td>' for share in row[:shown])
            rows.append(
                f'<tr><th style="{plain};text-align:left;font-weight:400">{html.escape(name[:40])}</th>{cells}</tr>'
            )
        liked = self._liked(layer)
        likes = []
        for expert in range(shown):
            colour = expert_colour(expert)
            tokens = [counts.vocab[token][:20] for token in liked.ids[expert, :STATIC_TOKENS].tolist() if token >= 0]
            words = ", ".join(f"<code>{html.escape(token)}</code>" for token in tokens) or "no token often enough"
            likes.append(
                f'<li><span style="padding:0 6px;background:{colour};color:{text_colour(colour)}">expert {expert}</span> '
                f"{words}</li>"
            )
        cut = [
            f"the first {few} of {all_} {what}"
            for few, all_, what in (
                (named, len(counts.domains), "domains"),
                (shown, counts.n_experts, "experts"),
            )
            if few < all_
        ]
        only = f" Shown: {' and '.join(cut)}." if cut else ""
        return (
            f"<p><b>{html.escape(self.title)}</b>, layer {layer} of 0 to {counts.n_layers - 1}: share of all choices, by domain "
            f"and expert ({1 / counts.n_experts:.1%} if all were used alike). Read: {sum(counts.tokens):,} tokens.{only}</p>"
            f'<table style="border-collapse:collapse;font-size:13px"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'
            f"<p>Tokens that each likes, by lift:</p><ul>{''.join(likes)}</ul>"
        )


def _counts_of(study: object) -> Counts:
    found = study.counts if isinstance(study, Study) else study
    if not isinstance(found, Counts):
        raise WidgetError(
            f"An atlas is made of a study, not of {type(found).__name__}: give what mixtral_lab.study.count(lab, corpus) "
            "or mixtral_lab.study.study(lab, corpus, folder) returns."
        )
    return found


def _favourites(counts: Counts, layer: int) -> Liked:
    """What the experts of a layer like, and which of the kept places show it."""
    table = analysis.vocabulary(counts.vocabulary[layer : layer + 1], counts.n_choices, counts.vocab, FEWEST)
    best = table[table.lift > 1].groupby("expert").head(FAVOURITES)
    expert, nth = best.expert.to_numpy(), best.groupby("expert").cumcount().to_numpy()
    ids, taken, occurrences = (np.full((counts.n_experts, FAVOURITES), empty) for empty in (-1, 0, 0))
    ids[expert, nth], taken[expert, nth], occurrences[expert, nth] = best.id, best["count"], best.occurrences
    places = counts.places
    chosen = places.experts[ids, :, layer] == np.arange(counts.n_experts)[:, None, None, None]  # ... slot choice
    read = chosen.any(-1) & (np.arange(PLACES) < places.seen[ids][..., None]) & (ids >= 0)[..., None]
    none = counts.n_choices * PLACES  # past every pair of choice and slot
    pairs = np.sort(np.where(read, chosen.argmax(-1) * PLACES + np.arange(PLACES), none))[..., :SHOWN]
    ranks, slots = np.divmod(pairs, PLACES)
    return Liked(ids, taken, occurrences, np.where(pairs < none, slots, -1), np.where(pairs < none, ranks, 0))
