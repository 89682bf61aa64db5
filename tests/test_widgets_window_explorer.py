"""WindowExplorer: what it says about windows against composed masks and the real cache; what it sends against the trace."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import traitlets

import mixtral_lab
from mixtral_lab import PRESETS, Config, Trace
from mixtral_lab.model.attention import RollingCache, visible
from mixtral_lab.widgets.base import LARGEST, MOST_STATE, WidgetError
from mixtral_lab.widgets.window_explorer import SITES, WindowExplorer, layers_to_first, prefill_pairs, reach

STORY = "Once upon a time, there was a little dog named Max. He liked to play in the garden. "


@pytest.fixture(scope="module")
def dense():
    return mixtral_lab.load("mini-mistral", device="cpu")


@pytest.fixture(scope="module")
def trace(dense):
    return dense.trace(STORY * 7, sites=SITES)


def random_trace(seq, layers=2, kv=2, group=2, head_dim=8, window=None, tokens=None, **kwargs):
    """Queries and keys out of thin air."""
    seeds = torch.Generator().manual_seed(1)
    recorded = {}
    for layer in range(layers):
        stem = f"layers.{layer}.attention.heads"
        recorded[f"{stem}.query"] = torch.randn(kv, group, seq, head_dim, generator=seeds)
        recorded[f"{stem}.key"] = torch.randn(kv, seq, head_dim, generator=seeds)
    return Trace(
        ids=torch.arange(seq), tokens=tuple(tokens or (f"␣t{n}" for n in range(seq))), n_prompt=seq, model="random",
        dtype="float32", n_layers=layers, window=window, recorded=recorded, **kwargs,
    )  # fmt: skip


def sent(explorer):
    """What the script unpacks: {head: {query: (first key, weights)}}, and the blocks of a long text or None."""
    arrays = {}
    for name, about in explorer.arrays.items():
        size = int(np.prod(about["shape"]))
        values = np.frombuffer(explorer.data, "<" + about["kind"], size, about["start"]).astype(np.float64)
        if about["step"] is not None:
            values = np.where(values == LARGEST + 1, np.nan, values * about["step"])
        arrays[name] = values.reshape(about["shape"])
    window, found = explorer.facts["window"], {}
    for n, head in enumerate(explorer.held.get("heads", ())):
        start, rows = 0, {}
        for query in arrays["queries"].astype(int):
            first = 0 if window is None else max(0, query - window + 1)
            rows[query] = (first, arrays["exact"][n, start : start + query - first + 1])
            start += query - first + 1
        assert start == arrays["exact"].shape[1]
        found[head] = rows
    return found, arrays.get("overview")


def size(explorer):
    """Bytes in the notebook's file, where the numbers are base64."""
    state = explorer.state()
    data = state.pop("data")
    return len(json.dumps(state, ensure_ascii=False).encode()) + 4 * len(data) // 3


@pytest.mark.parametrize("window", [1, 2, 3, 5, None])
def test_reach_is_what_composed_masks_allow(window):
    at = torch.arange(24)[None]
    mask = visible(at, at, window)[0].float()
    held = torch.eye(24)
    for layers in range(1, 7):
        held = ((held @ mask) > 0).float()  # what a position may hold something of, after so many layers
        for position in range(24):
            back, first = reach(layers, window), int(held[position].nonzero()[0])
            assert first == (0 if back is None else max(0, position - back))
            need = layers_to_first(position, window)
            assert (first == 0) == (need is not None and need <= layers)


def test_reach_of_the_published_shape():
    assert reach(32, 4096) == 131_040  # the paper's 131K is 32 x 4096 = 131,072
    assert reach(0, None) == 0 and layers_to_first(0, 1) == 0 and layers_to_first(9, 1) is None


@pytest.mark.parametrize(
    ("length", "chunk", "window"), [(23, 5, 6), (23, 6, 5), (16, 4, 4), (9, 20, 3), (12, 1, 4), (12, 5, None)]
)
def test_chunked_prefill_counts_what_the_cache_hands_out(length, chunk, window):
    store = torch.zeros(1, 1, window or length, 2)
    cache, pairs = RollingCache(store.clone(), store.clone()), 0
    for part in torch.arange(length).split(chunk):
        keys = torch.zeros(1, 1, len(part), 2)
        # A chunk of one overwrites the slot of the key that it no longer sees at once; our count lets it look there.
        extra = int(len(part) == 1 and cache.seen >= cache.ring)
        pairs += len(part) * (cache.extend(keys, keys)[0].shape[2] + extra)
    assert prefill_pairs(length, chunk, window) == pairs


def test_every_head_of_a_short_text_is_sent_as_it_was_recorded(trace):
    explorer = WindowExplorer(trace)
    assert len(trace) <= 256 and explorer.window == trace.window == 128
    assert explorer.held["heads"] == list(range(8)) and explorer.held["layer"] == explorer.layer
    pattern = trace[f"layers.{explorer.layer}.attention.pattern"].numpy()
    heads, overview = sent(explorer)
    assert overview is None
    for head, rows in heads.items():
        whole = pattern[head // 2, head % 2]  # query heads are (kv group), kv outermost
        assert sorted(rows) == list(range(len(trace)))
        for query, (first, weights) in rows.items():
            np.testing.assert_allclose(weights, whole[query, first : query + 1], atol=2e-5)
            assert abs(weights.sum() - 1) < 2e-3
            assert not whole[query, :first].any()
    assert size(explorer) < MOST_STATE


def test_another_layer_comes_when_it_is_selected(trace):
    explorer = WindowExplorer(trace)
    for layer in (0, 7):
        explorer.layer = layer
        assert explorer.held["layer"] == layer
        whole = trace[f"layers.{layer}.attention.pattern"].numpy()[1, 1]
        np.testing.assert_allclose(sent(explorer)[0][3][150][1], whole[150, 23:151], atol=2e-5)


@pytest.mark.parametrize("window", [None, 128])
def test_a_long_text_is_sent_as_blocks_and_the_rows_around_the_position(window):
    trace = random_trace(1500, window=window)
    explorer = WindowExplorer(trace)
    explorer.layer, explorer.head, explorer.position = 1, 2, 700
    whole = trace["layers.1.attention.pattern"].numpy()[1, 0]
    heads, overview = sent(explorer)
    block = explorer.held["block"]
    assert list(heads) == [2] and overview.shape == (250, 250) and block == 6
    padded = whole.reshape(250, 6, 250, 6)
    np.testing.assert_allclose(overview, padded.max((1, 3)), atol=2e-5)
    for query in (explorer.held["first"], 700, explorer.held["last"]):
        first, weights = heads[2][query]
        np.testing.assert_allclose(weights, whole[query, first : query + 1], atol=2e-5)
    before = explorer.data
    explorer.position = 701
    assert explorer.data is before  # its row was at hand
    explorer.position = 3
    assert explorer.held["first"] == 0 and 3 in sent(explorer)[0][2]
    assert size(explorer) < MOST_STATE


def test_four_thousand_tokens_stay_under_a_megabyte():
    explorer = WindowExplorer(random_trace(4096, layers=1, kv=1))
    assert size(explorer) < MOST_STATE and len(explorer.fallback()) < 60_000
    first, weights = sent(explorer)[0][0][4095]
    assert first == 0 and len(weights) == 4096 and abs(weights.sum() - 1) < 0.01
    explorer.position = 10
    assert 10 in sent(explorer)[0][0]


def test_many_heads_are_sent_one_at_a_time():
    explorer = WindowExplorer(random_trace(256, kv=8, group=4))
    assert explorer.held["heads"] == [0] and size(explorer) < MOST_STATE
    explorer.head = 31
    assert explorer.held["heads"] == [31]


def test_a_lab_with_a_text_is_traced(dense):
    explorer = WindowExplorer(dense, text="Once upon a time")
    assert explorer.facts["tokens"] == dense.tokenizer.pieces(dense.tokenizer.encode("Once upon a time"))
    assert explorer.facts["model"] == "mini-mistral" and explorer.held["layer"] == explorer.layer
    assert explorer.facts["token_bytes"] == dense.config.cache_bytes(1, 4) and explorer.facts["context"] == 2048
    with pytest.raises(WidgetError, match="without a text"):
        WindowExplorer(dense)


def test_a_config_has_everything_but_a_pattern():
    config = PRESETS["mistral-7b-v0.1"].config
    explorer = WindowExplorer(config)
    assert explorer.title == "Sliding-window attention: Mistral 7B v0.1"
    assert (explorer.window, explorer.length, explorer.position) == (4096, 12288, 12287)
    assert "no pattern" in explorer.missing and not explorer.held
    assert explorer.facts["token_bytes"] == config.cache_bytes(1) == 131_072
    explorer.length = 40
    assert explorer.position == 39
    explorer.window = 8
    assert "sees tokens 32 to 39, 8 keys" in explorer.fallback()
    assert WindowExplorer(PRESETS["mistral-7b-v0.1"]).facts["model"] == "Mistral 7B v0.1"
    other = WindowExplorer(dataclasses.replace(config, window=5))
    assert other.facts["model"] == "This config" and other.window == 5 and other.length == 15


def test_without_a_window_it_says_so():
    explorer = WindowExplorer(PRESETS["mixtral-8x7b"].config)
    assert explorer.window is None and "has no window" in explorer.notice
    assert "Without a window the cache keeps every token" in explorer.fallback()
    explorer.window = 16
    assert "a window of 16" in explorer.fallback()
    explorer.window = None
    assert explorer.window is None


def test_a_traces_own_window_counts_whatever_its_model_is_called():
    explorer = WindowExplorer(dataclasses.replace(random_trace(200, layers=8), model="mini-mistral"))
    assert explorer.window is None and explorer.facts["window"] is None and explorer.facts["context"] == 2048
    assert sent(explorer)[0][0][199][0] == 0


def test_the_teaching_window_changes_nothing_recorded(trace):
    explorer = WindowExplorer(trace)
    before = explorer.data
    explorer.window, explorer.chunk, explorer.position, explorer.view = 8, 4, 17, "ring"
    assert explorer.data is before and explorer.facts["window"] == 128
    fallback = explorer.fallback()
    assert "sees tokens 10 to 17, 8 keys, itself included" in fallback
    assert "slot 1 (17 mod 8), where token 9 was" in fallback
    assert f"needs {prefill_pairs(len(trace), 4, 8):,} scores" in fallback
    assert f"{8 * explorer.facts['token_bytes']:,} bytes" in fallback


@pytest.mark.parametrize(("name", "value", "words"), [
    ("window", 0, "window is 0, but it can be 1 to"), ("window", -3, "a token sees at least itself"), ("chunk", 0, "chunk is 0"),
    ("window", 10**9, "can be 1 to"), ("position", -1, "position is -1"), ("position", 10**6, "the text has"),
    ("layer", 8, "layer is 8, but it can be 0 to 7: there are 8 layers"), ("head", 8, "query heads are 4 x 2, kv outermost"),
    ("length", 5, "only a config's can be set"), ("chunk", True, "chunk is True"),
])  # fmt: skip
def test_what_is_impossible_is_refused(trace, name, value, words):
    explorer = WindowExplorer(trace)
    before = getattr(explorer, name)
    with pytest.raises(WidgetError, match=re.escape(words)):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before


def test_wrong_kinds_are_refused(trace):
    explorer = WindowExplorer(trace)
    for name, value in (("view", "maks"), ("position", "seven"), ("chunk", None), ("window", 2.5)):
        with pytest.raises(traitlets.TraitError):
            setattr(explorer, name, value)
    for wrong in ("a text", 7, None):
        with pytest.raises(WidgetError, match="was given"):
            WindowExplorer(wrong)
    with pytest.raises(WidgetError, match="goes with a lab"):
        WindowExplorer(trace, text="more")


def test_an_imported_trace_says_what_it_lacks():
    experts = torch.zeros(3, 5, 2, dtype=torch.long)
    explorer = WindowExplorer(Trace.from_arrays(list("abcde"), experts))
    assert "no attention pattern" in explorer.missing and "no window on record" in explorer.notice
    assert explorer.facts["token_bytes"] == 0 and explorer.facts["kv"] == 0
    assert "within reach after 1 layer." in explorer.fallback()
    explorer.layer = 2
    with pytest.raises(WidgetError):
        explorer.head = 1


def test_patterns_of_some_layers_and_positions(dense):
    part = dense.trace(
        "Once upon a time", sites=["layers.2.attention.pattern", "layers.5.attention.pattern"], positions=[2, 4]
    )
    explorer = WindowExplorer(part)
    assert explorer.facts["recorded"] == [2, 5] and explorer.layer == 5
    rows = sent(explorer)[0][7]
    assert sorted(rows) == [2, 4]
    np.testing.assert_allclose(rows[4][1], part["layers.5.attention.pattern"][3, 1, 1, :5].numpy(), atol=2e-5)
    explorer.layer = 3
    assert "Of layer 3 no pattern is on record, only of layers 2, 5" in explorer.missing and not explorer.held
    assert "Of layer 3" in explorer.fallback()
    explorer.layer, explorer.position = 2, 3
    assert explorer.missing == "" and "looks at most" not in explorer.fallback()


def test_a_mixture_without_a_window():
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    routed = WindowExplorer(lab.trace("Once upon a time"))
    assert "no attention pattern" in routed.missing and "mini-mixtral has no window" in routed.notice
    assert routed.facts["token_bytes"] == lab.config.cache_bytes(1, 4)
    explorer = WindowExplorer(lab, text="Once upon a time")
    assert explorer.window is None and explorer.held["heads"] == list(range(8))


def test_odd_traces():
    one = WindowExplorer(random_trace(1, layers=1, kv=1, group=1))
    assert one.position == 0 and one.chunk == 1 and sent(one)[0][0][0][1] == pytest.approx([1.0])
    assert "sees token 0, 1 key, itself included" in one.fallback()
    words = ["<script>alert(1)</script>", "שלום", "🙂", "naïve", "⏎", "a" * 300]
    odd = WindowExplorer(random_trace(6, window=2, tokens=words))
    fallback = odd.fallback()
    assert (
        "<script" not in fallback and "&lt;script&gt;" in fallback and "שלום" in fallback and "a" * 50 not in fallback
    )
    assert odd.facts["tokens"] == words
    narrow = WindowExplorer(random_trace(9, window=1))
    assert "the first token is never within reach" in narrow.fallback()
    with pytest.raises(WidgetError, match="no tokens"):
        WindowExplorer(random_trace(0))


def test_bytes_of_a_shape_that_no_preset_has():
    explorer = WindowExplorer(random_trace(12, layers=3, kv=2, head_dim=8, window=4))
    shape = Config(16, 3, 2, 2, 8, hidden=1, vocab=1, context=12, window=4)
    assert explorer.facts["token_bytes"] == shape.cache_bytes(1, 4) == 2 * 3 * 2 * 8 * 4
    assert min(12, 4) * explorer.facts["token_bytes"] == shape.cache_bytes(12, 4)


def test_its_own_page(trace, tmp_path):
    explorer = WindowExplorer(trace)
    page = explorer.save_html(tmp_path / "window.html").read_text("utf-8")
    assert "Sliding-window attention: mini-mistral" in page and len(page) < 1_100_000
    assert len(explorer.fallback()) < 60_000
