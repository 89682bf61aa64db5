"""The routing study: what it reads, that its sums are right, what it writes, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import json
import re
import shutil
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mixtral_lab
from mixtral_lab import Lab, analysis, study
from mixtral_lab.analysis import offload
from mixtral_lab.cli import app
from mixtral_lab.config import LabError
from mixtral_lab.model import Transformer
from mixtral_lab.study import Counts, Study, StudyError, Text

DOMAINS = ("code", "french", "german", "prose")


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def corpus():
    whole = study.bundled_texts()
    return {domain: whole[domain][:3] for domain in DOMAINS}


@pytest.fixture(scope="module")
def short(corpus):
    return {domain: [Text(text.text[:100]) for text in corpus[domain]] for domain in DOMAINS[:3]}


@pytest.fixture(scope="module")
def counts(lab, short):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.corpus, "PIECE", 20)
        patch.setattr(study.counting, "OFFLOADED", 3 * 25)
        return study.count(lab, short)


@pytest.fixture(scope="module")
def pieces(lab, short):
    """The slow way: every piece's trace, by domain and text."""
    found = {}
    for domain, texts in short.items():
        found[domain] = []
        for text in texts:
            ids = lab.tokenizer.encode(text.text)[1:]
            parts = [[1, *ids[at : at + 19]] for at in range(0, len(ids), 19)]
            found[domain].append([lab.trace_ids(part) for part in parts])
    return found


@pytest.fixture(scope="module")
def made(lab, corpus, tmp_path_factory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.counting, "OFFLOADED", 4 * 30)
        patch.setattr(study.report, "_write_pngs", lambda drawn, folder: ["no pictures"])
        return study.study(lab, corpus, tmp_path_factory.mktemp("study") / "out", "a few excerpts")


# What is read


def test_the_excerpts_know_which_say_the_same():
    found = study.bundled_texts()
    assert list(found) == list(mixtral_lab.excerpts())
    labelled = [text for texts in found.values() for text in texts if text.topic]
    assert len(labelled) == 8 * 4
    assert {text.language for text in labelled} == {"english", "french", "german", "spanish"}
    assert all(text.messages for text in found["chat"])
    assert all(text.text or text.messages for texts in found.values() for text in texts)


def write(folder: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def test_a_folder_of_texts_by_domain(tmp_path):
    record = json.dumps({"text": "Bonjour", "topic": "greeting", "language": "french"})
    chat = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    folder = write(
        tmp_path, law__a_txt="First.", law__deep__b_txt="Second.", law__c_md="left aside", law__d_jsonl=record + "\n\n" + chat,
        poems_jsonl=record + "\n", notes_txt="x" * 1_500 + "\n" + "y" * 1_500, readme_md="left aside", empty__z_md="",
    )  # fmt: skip
    found = study.read_texts(folder)
    assert list(found) == ["law", "notes", "poems"]
    bonjour = Text("Bonjour", topic="greeting", language="french")
    hi = Text(messages=({"role": "user", "content": "Hi"},))
    assert list(found["law"]) == [Text("First."), bonjour, hi, Text("Second.")]
    assert len(found["law"]) == 4 and hi in found["law"] and Text("else") not in found["law"]
    assert list(found["poems"]) == [bonjour]
    assert [len(text.text) for text in found["notes"]] == [1_501, 1_500]  # cut where a line ends
    assert list(found["law"]) == list(found["law"])  # read anew


@given(st.text("ab\n", max_size=60), st.integers(1, 12))
def test_stretches_are_the_file_cut_after_lines(text, longest):
    parts = list(study.corpus._stretches(io.StringIO(text), longest))
    assert "".join(parts) == text
    assert all(0 < len(part) <= longest for part in parts)
    for part, after in pairwise(parts):
        if not part.endswith("\n"):  # no line ended there
            assert "\n" not in part and len(part) == longest
        else:  # and as many lines as fit
            assert "\n" not in after[: max(longest - len(part), 0)]


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({}, "holds no .txt or .jsonl files"),
        ({"readme_md": "x"}, "holds no .txt or .jsonl files"),
        ({"a__b_txt": "x", "a_txt": "y"}, "two entries for the domain 'a'"),
        ({"a_jsonl": '{"text": "x"}\nnot json'}, "a.jsonl, line 2 is not JSON: 'not json'"),
        ({"a_jsonl": '["text"]'}, "line 1 is not a record with `text` or `messages`"),
        ({"a_jsonl": '{"id": 1}'}, "line 1 is not a record with `text` or `messages`"),
        ({"a_jsonl": '{"text": 1}'}, "line 1: text, topic and language must be strings"),
        ({"a_jsonl": '{"messages": ["x"]}'}, "line 1: messages must be a list of records"),
        ({"a_jsonl": '{"messages": [{"role": "user"}]}'}, "line 1: messages must be a list of records"),
    ],
)
def test_folders_that_cannot_be_read_are_named(tmp_path, contents, says):
    with pytest.raises(StudyError, match=says):
        for texts in study.read_texts(write(tmp_path, **contents)).values():
            list(texts)


def test_missing_folders_and_other_encodings_are_named(tmp_path):
    with pytest.raises(StudyError, match="There is no folder"):
        study.read_texts(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(StudyError, match=r"a\.txt is not text in UTF-8"):
        list(study.read_texts(tmp_path)["a"])


def test_long_texts_are_cut_into_pieces(lab, monkeypatch):
    monkeypatch.setattr(study.corpus, "PIECE", 5)
    ids = lab.tokenizer.encode("one two three four five six seven eight nine")
    found = list(study.corpus.pieces(lab, Text("one two three four five six seven eight nine")))
    assert all(part[0] == ids[0] == lab.tokenizer.bos_id for part in found)
    assert [token for part in found for token in part[1:]] == ids[1:]
    assert [len(part) for part in found[:-1]] == [5] * (len(found) - 1)
    assert list(study.corpus.pieces(lab, Text(""))) == []
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    monkeypatch.setattr(study.corpus, "PIECE", 512)
    assert list(study.corpus.pieces(lab, Text(messages=talk))) == [lab.tokenizer.chat(talk[:1])]


# What is counted


def test_sums_agree_with_all_traces_kept(counts, pieces):
    by_domain = {domain: [trace for text in texts for trace in text] for domain, texts in pieces.items()}
    domains, assigned = analysis.domain_counts(by_domain)
    assert counts.domains == domains
    assert (counts.by_domain == assigned).all()
    assert (counts.ranks == analysis.domain_counts(by_domain, analysis.rank_counts)[1]).all()
    every = [trace for traces in by_domain.values() for trace in traces]
    chosen = [trace.experts.numpy() for trace in every]
    assert (counts.together == sum(analysis.coactivation_counts(one, 8) for one in chosen)).all()
    assert (counts.moved == sum(analysis.transition_counts(one, 8) for one in chosen)).all()
    ids = np.concatenate([trace.ids.numpy() for trace in every])
    joined = np.concatenate(chosen, axis=1)
    assert (counts.vocabulary == analysis.vocabulary_counts(joined, 8, ids, 4096)).all()
    assert counts.tokens == [sum(map(len, traces)) for traces in by_domain.values()]
    assert counts.pieces == [len(traces) for traces in by_domain.values()]
    assert counts.texts == [3] * 3
    for domain, texts in enumerate(pieces.values()):
        logits = np.concatenate([trace.routing.logits.numpy() for text in texts for trace in text], axis=1)
        assert (counts.entropies[domain] == analysis.binned_counts(analysis.router_entropy(logits), 3.0)).all()
        assert (counts.margins[domain] == analysis.binned_counts(analysis.near_tie_margin(logits, 2), 0.5)).all()
        for unit, text in enumerate(texts):  # a text is a unit, its pieces are added; no pair spans two pieces
            parts = [trace.experts.numpy() for trace in text]
            assert (counts.assigned[domain][unit] == sum(analysis.assignment_counts(one, 8) for one in parts)).all()
            assert (counts.repeated[domain][unit] == sum(analysis.repetition_counts(one, 8) for one in parts)).all()


def test_places_of_a_token_are_places_of_the_corpus(counts, pieces):
    found = counts.places
    met: dict[int, list[tuple]] = {}
    for domain, texts in enumerate(pieces.values()):
        for trace in (trace for text in texts for trace in text):
            ids, experts = trace.ids.numpy(), trace.experts.numpy()
            around = np.pad(ids, (study.counting.BEFORE, study.counting.AFTER), constant_values=-1)
            for at, token in enumerate(ids.tolist()):
                met.setdefault(token, []).append(
                    (*around[at : at + 12].tolist(), domain, *experts[:, at].ravel().tolist())
                )
    assert found.seen.sum() == sum(counts.tokens)
    assert found.ids.shape == (4096, 6, 12)
    for token, places in met.items():
        assert found.seen[token] == len(places)
        kept = [
            (
                *found.ids[token, slot].tolist(),
                int(found.domains[token, slot]),
                *found.experts[token, slot].ravel().tolist(),
            )
            for slot in range(min(len(places), study.counting.PLACES))
        ]
        few = len(places) <= study.counting.PLACES
        assert sorted(kept) == sorted(places) if few else not Counter(kept) - Counter(places)


def test_every_place_is_as_likely_to_be_kept():
    n, tokens = 40, 500  # of every token so many places, one a piece; which of them stay is known by their domain
    found, random = study.counting.Places(tokens, 1, 2, 1), np.random.default_rng(0)
    for place in range(n):
        found.add(place, np.arange(tokens), np.zeros((1, tokens, 1), int), random.random(tokens))
    times = np.bincount(found.domains.ravel(), minlength=n)
    expected = tokens * study.counting.PLACES / n
    assert times.sum() == tokens * study.counting.PLACES
    assert abs(times - expected).max() < 5 * expected**0.5


def test_caches_are_replayed_on_the_first_tokens_of_every_domain(counts, pieces, lab):
    assert counts.cached == [25] * 3
    expected = 0
    for texts in pieces.values():
        traces = [trace for text in texts for trace in text]
        first, second = traces[0].experts, traces[1].experts
        assert first.shape[1] == 20
        for experts in (first, second[:, :5]):
            expected = expected + offload.replay(experts, 3).hits
    table = counts.caches
    found = table[(table.policy == "LRU") & (table.capacity == 3)]
    assert found.hits.tolist() == expected.tolist()
    assert set(table.policy) == {"LRU", "LFU", "LRU + router", "LRU + transitions"}
    assert table.bytes.max() <= table.asked.max() * 2 * offload.expert_bytes(lab.config, 4.0)


def test_units_and_topics_are_bounded(lab, monkeypatch):
    monkeypatch.setattr(study.counting, "UNITS", 3)
    monkeypatch.setattr(study.counting, "TOPICS", 2)
    monkeypatch.setattr(study.counting, "OFFLOADED", 0)
    texts = [Text(f"Text number {n}.", topic=f"topic {n}", language="en") for n in range(7)] + [Text("")]
    found = study.count(lab, {"a": texts, "b": ["plain strings", "are texts"]})
    assert found.texts == [8, 2] and found.skipped == [1, 0]
    assert len(found.assigned[0]) == 3
    assert (sum(found.assigned[0]) == found.by_domain[0]).all()
    pairs = [sum(one[2, 0] for one in units) for units in found.repeated]
    assert pairs == [tokens - n for tokens, n in zip(found.tokens, found.pieces, strict=True)]
    by_draw = sorted((f"topic {n}" for n in range(7)), key=lambda name: hashlib.sha256(name.encode()).digest())
    assert set(found.parallel) == {(name, "en") for name in by_draw[:2]}


def assert_same(found: Counts, expected: Counts) -> None:
    """Everything that is counted, to the last bit."""
    assert found._about == expected._about
    for name in study.counting.ARRAYS:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for name in study.counting.LISTS:
        assert getattr(found, name) == getattr(expected, name), name
    for name, values in vars(expected.places).items():
        assert np.array_equal(getattr(found.places, name), values), name
    for domain in range(len(expected.domains)):
        for name in ("assigned", "repeated"):
            assert np.array_equal(getattr(found, name)[domain], getattr(expected, name)[domain]), name
    assert found.parallel.keys() == expected.parallel.keys()
    assert all(np.array_equal(found.parallel[place], values) for place, values in expected.parallel.items())
    assert {name: one.ids.tolist() for name, one in found.examples.items()} == {
        name: one.ids.tolist() for name, one in expected.examples.items()
    }
    assert (found.caches is None) == (expected.caches is None)
    if expected.caches is not None:
        pd.testing.assert_frame_equal(found.caches, expected.caches)


def test_shares_put_together_are_the_whole(lab, monkeypatch):
    """Bounds are small here, so that all of them are reached; of 11 processes two have nothing to read."""
    for name, small in {"UNITS": 3, "TOPICS": 2, "OFFLOADED": 30}.items():
        monkeypatch.setattr(study.counting, name, small)
    monkeypatch.setattr(study.corpus, "PIECE", 12)
    words = "Once upon a time there was a small house by the sea and nobody knew who had built it"
    texts = [Text(words[7 * n :], topic=f"topic {n % 3}", language="ab"[n % 2]) for n in range(5)]
    corpus = {"a": [*texts, Text("")], "b": [Text(""), "One plain string."], "c": [words[::-1]]}
    whole = study.count(lab, corpus)
    for size in (2, 3, 11):
        shares = [study.count(lab, corpus, (rank, size)) for rank in range(size)]
        assert [sum(one.texts) for one in shares] == [len(range(rank, 9, size)) for rank in range(size)]
        first, *others = [Counts.from_bytes(one.to_bytes()) for one in shares]
        first.examples = shares[0].examples
        for one in reversed(others) if size == 3 else others:
            first.merge(one)
        assert_same(first, whole)
    assert len(whole.units[0]) == 3 and len({topic for topic, _ in whole.parallel}) == 2
    assert whole.cached == [10, whole.tokens[1], 10] and whole.tokens[1] < 10 < min(whole.tokens[0], whole.tokens[2])
    assert (whole.places.seen > study.counting.PLACES).any()


def test_counts_of_something_else_are_not_added(lab, counts):
    other = study.count(lab, {"code": ["def f(x): return x"]})
    with pytest.raises(StudyError, match="differ in domains: they are not of one model and one corpus"):
        other.merge(counts)


def test_a_fingerprint_tells_corpora_apart(lab, monkeypatch):
    monkeypatch.setattr(study.counting, "OFFLOADED", 0)
    found = [study.count(lab, {"a": texts}).digests for texts in (["One.", "Two."], ["Two.", "One."], ["One.Two."])]
    ids = [np.array(lab.tokenizer.encode(text), "<i4").tobytes() for text in ("One.", "Two.")]
    each = [hashlib.sha256(n.to_bytes(8, "little") + text).digest() for n, text in enumerate(ids)]
    assert found[0] == [sum(int.from_bytes(one, "big") for one in each) % 2**256]
    assert len({one for (one,) in found}) == 3


def test_no_trace_outlives_its_text(lab, corpus, monkeypatch):
    monkeypatch.setattr(study.counting, "OFFLOADED", 100)
    alive: list[weakref.ref] = []
    read = lab.trace_ids

    def watch(*args, **kwargs):
        trace = read(*args, **kwargs)
        alive.append(weakref.ref(trace))
        return trace

    monkeypatch.setattr(lab, "trace_ids", watch)
    found = study.count(lab, corpus)
    gc.collect()
    assert len(alive) > 12
    assert {id(one()) for one in alive if one() is not None} == {id(trace) for trace in found.examples.values()}


def test_a_dense_model_and_empty_domains_are_named(lab):
    with pytest.raises(StudyError, match="mini-mistral is a dense model: it has no routers to study"):
        study.count(mixtral_lab.load("mini-mistral", device="cpu"), {"a": ["text"]})
    with pytest.raises(StudyError, match="no domains"):
        study.count(lab, {})
    with pytest.raises(StudyError, match="The domain 'a' is one string: give a list of texts"):
        study.count(lab, {"a": "Some text"})
    with pytest.raises(StudyError, match="'b' has no text of two tokens"):
        study.count(lab, {"a": ["Some text"], "b": [""]})


# What is said


def test_tables_say_what_the_analyses_say(made, lab, corpus):
    traces = {domain: [lab.trace(text.text) for text in texts] for domain, texts in corpus.items()}
    tables = {name: pd.read_parquet(made.folder / "tables" / f"{name}.parquet") for name in TABLES}
    _, shares = analysis.domain_shares(traces)
    table = tables["shares"].set_index(["domain", "layer", "expert"])
    for d, domain in enumerate(DOMAINS):
        for layer in range(8):
            assert table.loc[(domain, layer)].share.tolist() == shares[d, layer].tolist()
    counted = np.stack([analysis.repetition_counts(*analysis.choices(trace)) for trace in traces["code"]])
    expected = analysis.repetition(counted)
    rows = tables["repetition"].query("domain == 'code' and definition == 'either'")
    assert rows.share.tolist() == expected.share[1].tolist()
    assert rows.low.tolist() == expected.low[1].tolist()
    assert set(rows.random) == {1 - 15 / 28} and set(rows.texts) == {3}
    _, assigned = analysis.domain_counts(traces)
    bits = [analysis.domain_information(assigned[:, layer]) for layer in range(8)]
    assert tables["information"].bits.tolist() == bits
    assert tables["layers"]["bits about the domain"].tolist() == bits
    assert (tables["information"].shuffled_low <= tables["information"].shuffled_high).all()
    whole = [topic for topic in {text.topic for text in corpus["french"]} if topic]
    assert len(whole) == 3
    assert np.allclose(tables["language_or_topic"][["language", "topic", "rest"]].sum(1), 1)
    assert (tables["vocabulary"].occurrences >= 10).all()
    assert sorted(tables["vocabulary"].layer.unique()) == list(range(8))
    assert (tables["caches"].hit_rate == tables["caches"].hits / tables["caches"].asked).all()
    assert tables["corpus"].tokens.sum() == sum(len(trace) for several in traces.values() for trace in several)
    certainty = tables["certainty"]
    assert (certainty.entropy_low <= certainty.entropy_median).all() and certainty.near_ties.between(0, 1).all()


TABLES = (
    "corpus", "layers", "shares", "ranks", "repetition", "certainty", "coactivation", "transitions", "vocabulary", "domains",
    "divergence", "information", "language_or_topic", "caches",
)  # fmt: skip


def test_every_table_is_there_twice_and_alike(made):
    assert {path.stem for path in (made.folder / "tables").iterdir()} == set(TABLES)
    for name in TABLES:
        parquet = pd.read_parquet(made.folder / "tables" / f"{name}.parquet")
        csv = pd.read_csv(made.folder / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])
        assert len(csv) == len(parquet) > 0
        assert list(csv.columns) == list(parquet.columns)
        numbers = parquet.select_dtypes("number").columns
        np.testing.assert_allclose(csv[numbers], parquet[numbers])


def test_the_report_is_one_page_that_asks_nobody(made):
    page = made.report.read_text("utf-8")
    assert not re.search(r"<script[^>]* src=", page)
    assert not re.search(r'<(?:link|img|iframe)[^>]*(?:src|href)="(?:http|//)', page)
    assert "default-src 'none'" in page[:600]
    assert page.count("plotly.js v") == 1  # inlined once
    drawn = [name for section in made.sections for name in section.figures]
    for name in drawn:
        assert f'id="{name}"' in page
        assert (made.folder / "figures" / f"{name}.html").is_file()
    assert (made.folder / "figures" / "plotly.min.js").is_file()
    for said in ("mini-mixtral: 21.5 M parameters", "float32 on cpu", "a few excerpts", f"torch {torch.__version__}"):
        assert said in page
    for section in made.sections:
        assert section.words.endswith(".") and len(section.words) > 60


@pytest.fixture(scope="module")
def tiny(lab):
    """A model with random weights, one layer and one choice."""
    config = dataclasses.replace(
        lab.config, n_layers=1, n_choices=1, dim=32, n_heads=2, n_kv_heads=1, head_dim=16, hidden=32
    )
    torch.manual_seed(0)
    return Lab(Transformer(config), lab.tokenizer, "tiny <b>")


def test_a_study_carries_what_it_was_made_of(made):
    assert made.counts.domains == DOMAINS
    assert sum(made.counts.tokens) == pd.read_parquet(made.folder / "tables" / "corpus.parquet").tokens.sum()


def test_texts_and_names_cannot_write_into_the_page(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(study.report, "_write_pngs", lambda drawn, folder: [])
    evil = "</script><img src=x onerror=alert(1)>"
    found = study.study(tiny, {evil: [evil * 12], "b": [evil]}, tmp_path / "out", source=evil)
    page = found.report.read_text("utf-8")
    assert "<img" not in page and "tiny <b>" not in page
    assert page.count("</script>") == page.count("<script")
    assert all("<img" not in path.read_text("utf-8") for path in (tmp_path / "out" / "figures").glob("*.html"))


def test_what_the_model_has_not_is_left_out_and_said(tiny):
    found, lacking = study.all_sections(study.count(tiny, {"only": ["Some text, one domain, one layer, one choice."]}))
    said = " ".join(lacking)
    for what in (
        "by rank",
        "Co-activation",
        "from layer to layer",
        "Favourite",
        "between domains",
        "Language or topic",
    ):
        assert what in said
    assert len(found) + len(lacking) == 12


def test_more_bars_than_fit_become_a_map(counts, monkeypatch):
    bars, ranks = study.sections._shares(counts), study.sections._ranks(counts)
    assert bars.figures["shares"].data[0].type == "bar"
    assert list(ranks.figures) == ["ranks_layer_0", "ranks_layer_3", "ranks_layer_7"]
    monkeypatch.setattr(study.sections, "BARS", 20)
    crowded = study.sections._ranks(counts)
    assert study.sections._shares(counts).figures["shares"].data[0].type == "heatmap"
    assert list(crowded.figures) == list(crowded.captions) == ["ranks_first"]
    assert crowded.tables["ranks"].equals(ranks.tables["ranks"])


# What is written


def test_a_study_is_replaced_and_nothing_else(lab, corpus, made, monkeypatch):
    monkeypatch.setattr(study.report, "_write_pngs", lambda drawn, folder: [])
    monkeypatch.setattr(study.counting, "OFFLOADED", 0)
    mine = made.folder / "tables" / "mine.csv"
    mine.write_text("keep me")
    outside = made.folder.parent / "outside.txt"
    outside.write_text("keep me")
    manifest = json.loads((made.folder / "study.json").read_text())
    before = set(manifest["files"])
    manifest["files"].append("../outside.txt")
    copy = made.folder.parent / "copy"
    shutil.copytree(made.folder, copy)
    (copy / "study.json").write_text(json.dumps(manifest))
    again = study.study(lab, {"prose": corpus["prose"]}, copy)
    assert (copy / "tables" / "mine.csv").read_text() == outside.read_text() == "keep me"
    after = json.loads((copy / "study.json").read_text())
    assert set(after["files"]) < before
    there = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert there == {name for name in after["files"] if not name.endswith(".png")} | {"study.json", "tables/mine.csv"}
    assert "What could not be said" in again.report.read_text()
    mine.unlink()


@pytest.mark.parametrize("foreign", ["precious.txt", "study.json", "report.html"])
def test_other_folders_are_refused_before_anything_is_read(lab, tmp_path, foreign):
    (tmp_path / foreign).write_text("{}")
    with pytest.raises(StudyError, match="not a study; it was left alone"):
        study.study(lab, {"a": ["one token is not read, nor are two"]}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [foreign]
    with pytest.raises(StudyError, match="is a file"):
        study.check_folder(tmp_path / foreign)
    study.check_folder(tmp_path / "new")


def test_pictures_that_cannot_be_made_are_named(monkeypatch, tmp_path):
    kaleido = pytest.importorskip("kaleido")

    def fail(*_args, **_options):
        raise RuntimeError("no browser\nat all")

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", fail)
    assert study.report._write_pngs({}, tmp_path) == ["There are no PNG files: kaleido said RuntimeError: no browser"]


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs a browser")
def test_pictures_are_made_where_there_is_a_browser(made, tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", shutil.which("chromium") or shutil.which("google-chrome"))
    name, figure = next(iter(made.sections[0].figures.items()))
    assert study.report._write_pngs({name: figure}, tmp_path) == []
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# In a terminal


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["study", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_the_command_studies_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(study.report, "_write_pngs", lambda drawn, folder: ["no pictures"])
    texts = write(
        tmp_path / "texts", a__1_txt="Once upon a time.", a__2_txt="A story.", b_txt="def f(x):\n    return x"
    )
    code, said = run("mini-mixtral", "--texts", str(texts), "--out", str(tmp_path / "out"), "--device", "cpu")
    assert code == 0, said
    assert "report.html" in said and "no pictures" in said and "Favourite tokens" in said
    assert str(texts) in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mini-mixtral", "--out", "new"], "Give either --texts DIR"),
        (["mini-mixtral", "--out", "new", "--domains", "--texts", "x"], "Give either --texts DIR"),
        (["mini-mixtral", "--out", "new", "--texts", "nowhere"], "There is no folder nowhere"),
        (["mini-mistral", "--out", "new", "--domains"], "is a dense model"),
        (["no-such", "--out", "new", "--domains"], "Bundled models are"),
        (["mini-mixtral", "--out", ".", "--domains"], "not a study; it was left alone"),
    ],
)
def test_errors_in_the_terminal_are_one_sentence(words, says, tmp_path, monkeypatch):
    (tmp_path / "precious.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    code, said = run(*words)
    assert code == 1
    assert says in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_errors_are_of_one_kind():
    assert issubclass(StudyError, LabError)
