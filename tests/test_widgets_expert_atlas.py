"""The atlas of experts: its state against what was counted, its selection, and studies of every shape."""

from __future__ import annotations

import json

import numpy as np
import pytest
import traitlets

import mixtral_lab
from mixtral_lab import analysis, study
from mixtral_lab.study import Counts, Study, StudyError
from mixtral_lab.widgets import expert_atlas
from mixtral_lab.widgets.base import MOST_STATE, WidgetError
from mixtral_lab.widgets.expert_atlas import FAVOURITES, FEWEST, ExpertAtlas


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def counts(lab):
    whole = study.bundled_texts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.counting, "OFFLOADED", 0)
        return study.count(lab, {domain: whole[domain][:3] for domain in ("code", "french", "prose")})


def counted(layers=2, experts=4, choices=2, domains=("a",), vocab=50, texts=1, seq=64, names=None) -> Counts:
    """A study of made-up decisions; of them only what an atlas reads is counted."""
    random = np.random.default_rng(0)
    names = names or [f"token{n}" for n in range(vocab)]
    found = Counts("made up", "float32", tuple(domains), layers, experts, choices, names)
    for domain in range(len(domains)):
        for _ in range(texts):
            ids = (random.zipf(1.4, seq) - 1) % vocab
            likes = 2 * ((ids[:, None] + np.arange(layers)[:, None, None]) % experts == np.arange(experts))
            logits = random.random((layers, seq, experts)) + random.random((layers, 1, experts)) + likes
            chosen = np.argsort(-logits, -1)[..., :choices]
            found.texts[domain] += 1
            found.tokens[domain] += seq
            found.ranks[domain] += analysis.rank_counts(chosen, experts)
            found.together += analysis.coactivation_counts(chosen, experts)
            if layers > 1:
                found.moved += analysis.transition_counts(chosen, experts)
            np.add.at(found.vocabulary, (np.arange(layers)[:, None, None], ids[None, :, None], chosen), 1)
            found.places.add(domain, ids, chosen, random.random(seq))
    return found


def unpacked(atlas: ExpertAtlas) -> dict[str, np.ndarray]:
    """The arrays as the script reads them."""
    found = {}
    for name, about in atlas.arrays.items():
        size = int(np.prod(about["shape"]))
        raw = np.frombuffer(atlas.data, "<" + about["kind"], size, about["start"]).reshape(about["shape"])
        if about["step"] is not None:
            raw = np.where(raw == 32767, np.nan, raw * about["step"])
        found[name] = raw
    return found


def size(atlas: ExpertAtlas) -> int:
    return sum(len(v) if isinstance(v, bytes) else len(json.dumps(v)) for v in atlas.state().values())


# State


def test_shares_company_and_ways_are_those_of_the_study(counts):
    atlas = ExpertAtlas(counts)
    arrays = unpacked(atlas)
    by_rank = np.stack([counts.by_domain, counts.ranks[:, :, 0], counts.ranks[:, :, 1]], 2)
    assert (arrays["taken"] == by_rank.sum(0)).all()
    np.testing.assert_allclose(arrays["shares"], analysis.as_shares(by_rank), atol=3e-5)
    np.testing.assert_allclose(arrays["together"], analysis.coactivation(counts.together), atol=3e-5)
    np.testing.assert_allclose(arrays["moved"], analysis.transitions(counts.moved), atol=3e-5)
    assert atlas.held == [0, counts.n_layers] and atlas.domains == ["code", "french", "prose"]
    assert atlas.about["tokens"] == counts.tokens and len(atlas.colours) == counts.n_experts
    assert not atlas.notice


def test_favourites_are_those_of_the_analysis_and_their_places_real(counts):
    atlas = ExpertAtlas(counts)
    arrays = unpacked(atlas)
    table = analysis.vocabulary(counts.vocabulary, counts.n_choices, counts.vocab, FEWEST)
    shown = 0
    for (layer, expert), rows in table[table.lift > 1].groupby(["layer", "expert"]):
        best, n = rows.head(FAVOURITES), min(len(rows), FAVOURITES)
        assert [atlas.tokens[at] for at in arrays["liked"][layer, expert, :n]] == best.token.tolist()
        assert (arrays["liked"][layer, expert, n:] == -1).all()
        assert arrays["liked_counts"][layer, expert, :n].tolist() == best["count"].tolist()
        assert arrays["liked_occurrences"][layer, expert, :n].tolist() == best.occurrences.tolist()
        for nth, token in enumerate(best.id):
            kept = counts.places.experts[token, : min(counts.places.seen[token], study.counting.PLACES), layer]
            ranks, slots = np.nonzero(expert == kept.T)  # first choices first
            slots, ranks = slots[:3], ranks[:3]
            assert arrays["liked_ranks"][layer, expert, nth, : len(ranks)].tolist() == ranks.tolist()
            places = arrays["liked_places"][layer, expert, nth]
            assert (places >= 0).sum() == len(slots)
            for slot, place in zip(slots, places, strict=False):
                words = [atlas.tokens[at] if at >= 0 else None for at in arrays["places"][place]]
                assert words == [counts.vocab[at] if at >= 0 else None for at in counts.places.ids[token, slot]]
                assert words[atlas.about["before"]] == counts.vocab[token]
                assert arrays["place_domains"][place] == counts.places.domains[token, slot]
                shown += 1
    assert shown > 100


def test_a_study_is_taken_as_what_it_counted(counts, tmp_path):
    made = Study(tmp_path, tmp_path / "report.html", [], [], [], counts)
    assert ExpertAtlas(made).data == ExpertAtlas(counts).data


# Selection


def test_the_selection_is_read_and_set(counts):
    atlas = ExpertAtlas(counts)
    assert (atlas.selected_layer, atlas.selected_expert, atlas.selected_domain) == (0, 0, None)
    atlas.selected_layer, atlas.selected_expert, atlas.selected_domain = 7, 3, "french"
    assert atlas.state()["selected_layer"] == 7 and atlas.state()["selected_domain"] == "french"
    atlas.selected_domain = None


@pytest.mark.parametrize(
    ("trait", "value", "says"),
    [
        ("selected_layer", 8, "There is no layer 8: the study has 8, numbered 0 to 7"),
        ("selected_layer", -1, "There is no layer -1"),
        ("selected_expert", 8, "There is no expert 8: the study has 8, numbered 0 to 7"),
        ("selected_domain", "law", "There is no domain 'law': choose 'code', 'french', 'prose', or None for all"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(counts, trait, value, says):
    atlas = ExpertAtlas(counts)
    with pytest.raises(WidgetError, match=says):
        setattr(atlas, trait, value)
    assert getattr(atlas, trait) in (0, None)
    with pytest.raises(traitlets.TraitError):
        setattr(atlas, trait, 1.5)


def test_other_things_are_refused(lab):
    with pytest.raises(WidgetError, match=r"made of a study, not of Lab: give what mixtral_lab.study.count"):
        expert_atlas._counts_of(lab)  # what checks types in these tests would be first to refuse it
    with pytest.raises(StudyError, match="mini-mistral is a dense model: it has no routers to study"):
        ExpertAtlas(study.count(mixtral_lab.load("mini-mistral", device="cpu"), {"a": ["text"]}))


def test_an_empty_study_is_said():
    atlas = ExpertAtlas(Counts("m", "float32", ("a",), 2, 4, 2, ["x"]))
    assert atlas.notice.startswith("Nothing was counted") and atlas.notice in atlas.fallback()


# Every shape


DOMAINS = tuple(f"domain {n}" for n in range(57))


def test_state_is_small_for_a_large_model():
    atlas = ExpertAtlas(counted(32, 8, 2, DOMAINS, 32_000, seq=256))
    assert atlas.held == [0, 32] and size(atlas) < 300_000
    assert len(atlas.fallback()) < 60_000


def test_with_many_experts_layers_are_held_as_they_are_chosen():
    counts = counted(32, 64, 8, DOMAINS, 32_000, seq=64)
    atlas = ExpertAtlas(counts)
    assert not atlas.notice and size(atlas) < MOST_STATE
    first, end = atlas.held
    assert first == 0 and 8 < end < 32
    atlas.selected_layer = end  # the first that is not here
    first, end = atlas.held
    assert first <= atlas.selected_layer < end and size(atlas) < MOST_STATE
    arrays = unpacked(atlas)
    assert arrays["taken"].shape == (32, 3, 64)  # of all layers always
    np.testing.assert_allclose(arrays["shares"][:, :, 0], analysis.as_shares(counts.by_domain[:, first:end]), atol=2e-4)
    np.testing.assert_allclose(
        arrays["moved"], analysis.transitions(counts.moved[max(first - 1, 0) : end]), atol=1e-4, equal_nan=True
    )
    before = atlas.data
    atlas.selected_layer = end - 1
    assert atlas.data == before  # already here
    assert len(atlas.fallback()) < 60_000


def test_what_no_layer_can_hold_is_said():
    atlas = ExpertAtlas(counted(3, 520, 2, seq=20))
    assert (
        "520 experts in 1 domain make 1.2 MB" in atlas.notice
        and "study.study writes a report of any size" in atlas.notice
    )
    assert size(atlas) < MOST_STATE and atlas.fallback()


@pytest.mark.parametrize(("layers", "choices", "domains"), [(1, 1, ("a",)), (1, 2, ("a",)), (3, 1, ("a", "b"))])
def test_small_studies_have_what_they_can_have(layers, choices, domains):
    atlas = ExpertAtlas(counted(layers, 4, choices, domains))
    arrays = unpacked(atlas)
    assert arrays["taken"].shape == (layers, 1 if choices == 1 else 3, 4)
    assert arrays["shares"].shape == (len(domains), layers, 1 if choices == 1 else 3, 4)
    assert ("together" in arrays) == (choices > 1) and ("moved" in arrays) == (layers > 1)
    assert len(atlas.fallback()) < 60_000


def test_short_texts_have_no_favourites():
    atlas = ExpertAtlas(counted(seq=5))
    assert (unpacked(atlas)["liked"] == -1).all()
    assert "no token often enough" in atlas.fallback()


def test_nothing_that_was_read_writes_into_the_page(tmp_path):
    evil = "<script>alert(1)</script>"
    names = [evil, "שלום", "日本語", *(f"t{n}" for n in range(47))]
    atlas = ExpertAtlas(counted(domains=(evil, "b"), names=names, seq=200))
    assert evil in atlas.tokens and "שלום" in atlas.tokens
    page = atlas.save_html(tmp_path / "page.html").read_text("utf-8")
    assert "<script>alert" not in page and page.count("</script>") == 2
    assert "&lt;script&gt;alert(1)" in atlas.fallback()
