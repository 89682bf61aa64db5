"""The page shows text as text, holds the trace, asks no server, and never replaces a stranger's file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_figures import ODD, dense, made_up

from mixtral_lab.figures import FigureError, expert_colour
from mixtral_lab.model import Routing
from mixtral_lab.page import MINUS_INFINITY, UNKNOWN, PageError, save_page, trace_page
from mixtral_lab.trace import Trace, TraceError

SHAPES = {
    "usual": {"n_prompt": 9},
    "one token, one layer": {"tokens": ("<s>",), "layers": 1, "experts": 4, "choices": 1},
    "many experts": {"experts": 64, "choices": 8},
    "very many experts": {"experts": 300, "choices": 2, "layers": 2},
    "deep": {"layers": 40, "n_prompt": 0},
    "right to left": {"tokens": ("<s>", "שלום", "␣עולם", "⏎", "␣مرحبا")},
    "only line breaks": {"tokens": ("⏎", "⏎⏎", "␣", "⇥")},
}


class Reader(HTMLParser):
    """The page as a browser without JavaScript has it: elements, token spans, strokes of the map."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.spans: list[tuple[str, str]] = []
        self.in_tokens = self.in_span = False
        self.scripts: list[str] = []
        self.heading = ""
        self.tag = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        self.tag = tag
        if tag == "div":
            self.in_tokens = attrs.get("class") == "tokens"
        if tag == "span" and self.in_tokens:
            self.in_span = True
            self.spans.append((attrs["class"], ""))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == "span":
            self.in_span = False
        self.tag = ""

    def handle_data(self, text):
        if self.in_span:
            kind, before = self.spans[-1]
            self.spans[-1] = (kind, before + text)
        if self.tag == "script":
            self.scripts[-1] += text
        if self.tag == "h1":
            self.heading += text

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def unpacked(data: dict, name: str, shape) -> np.ndarray:
    kind = "<i2" if name != "experts" else "<u1" if data["n_experts"] <= 256 else "<u2"
    return np.frombuffer(base64.b64decode(data[name]), kind).reshape(shape)


@pytest.mark.parametrize("name", SHAPES)
def test_the_page_holds_the_trace(name):
    trace = made_up(**SHAPES[name])
    page = Reader(trace_page(trace))
    data, (layers, seq, choices) = page.data, trace.routing.experts.shape
    assert data["shape"] == [layers, seq, choices] and data["n_experts"] == trace.routing.logits.shape[-1]
    assert tuple(data["tokens"]) == trace.tokens and data["ids"] == trace.ids.tolist()
    assert data["n_prompt"] == trace.n_prompt
    np.testing.assert_array_equal(unpacked(data, "experts", (layers, seq, choices)), trace.routing.experts)
    for part in ("weights", "logits"):
        step = data[part.rstrip("s") + "_step"]
        want = getattr(trace.routing, part).numpy()
        np.testing.assert_allclose(unpacked(data, part, want.shape) * step, want, atol=step, rtol=0)
        assert step < 3e-4


@pytest.mark.parametrize("name", SHAPES)
def test_without_javascript_text_and_map_are_there(name):
    trace = made_up(**SHAPES[name])
    page = Reader(trace_page(trace))
    layers, seq, choices = trace.routing.experts.shape
    middle = trace.routing.experts[(layers - 1) // 2, :, 0].tolist()
    assert page.spans == [
        (f"e{expert}", token.replace("␣", " ")) for expert, token in zip(middle, trace.tokens, strict=True)
    ]

    # Every cell of the map is one stroke in its expert's colour, for the first choice and the second.
    drawn = np.full((min(choices, 2), layers, seq), -1)
    choice = -1
    for tag, attrs in page.elements:
        choice += tag == "g"
        if tag == "path" and "class" in attrs:
            expert = int(re.match(r"s(\d+) o\d$", attrs["class"])[1])
            for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)", attrs["d"]):
                cells = drawn[choice, layers - 1 - int(y), int(x) : int(x) + int(run)]
                assert len(cells) == int(run) and (cells == -1).all()
                cells[:] = expert
    np.testing.assert_array_equal(drawn, trace.routing.experts[:, :, :2].permute(2, 0, 1))


def test_colours_are_the_experts():
    page = trace_page(made_up(experts=12))
    for expert in range(12):
        colour = expert_colour(expert)
        assert f".e{expert}{{background:{colour};" in page and f".s{expert}{{stroke:{colour}}}" in page


def test_markup_in_a_text_stays_text():
    evil = (
        "<s>",
        "<script>alert(1)</script>",
        "</script>",
        "<!--",
        "<img onerror=alert(1)>",
        "&lt;",
        '"',
        "$title",
        "\u2028",
    )
    trace = made_up(evil, n_prompt=4, model="<i>model</i>")
    whole = trace_page(trace, title="<script>alert(2)</script> $data")
    page = Reader(whole)
    assert tuple(page.data["tokens"]) == evil
    assert tuple(text for _, text in page.spans) == evil
    assert page.heading == "<script>alert(2)</script> $data"
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"img", "i"} & set(tags)
    assert "<script>alert" not in whole and "<img" not in whole


def test_only_the_pages_own_script_may_run():
    whole = trace_page(made_up(ODD))
    page = Reader(whole)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    own = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'"
    assert "innerHTML" not in page.scripts[1]


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_fetched(name):
    page = trace_page(made_up(**SHAPES[name]))
    for outside in ("http://", "https://", "src=", "href=", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert outside not in page


def test_three_hundred_tokens_stay_small():
    trace = made_up([f"␣word{i}" for i in range(300)], layers=8, n_prompt=200)
    assert len(trace_page(trace).encode()) < 150_000


def test_numbers_that_are_none():
    trace = made_up(("a", "b"), layers=1, experts=3)
    logits = torch.tensor([[[1.0, -torch.inf, 0.5], [torch.nan, 0.0, -2.0]]])
    routing = Routing(logits, trace.routing.experts, torch.full((1, 2, 2), torch.nan))
    page = Reader(
        trace_page(Trace.from_arrays(trace.tokens, *routing[1:], routing.logits, n_prompt=2, dtype="float32"))
    )
    packed = unpacked(page.data, "logits", (2, 3))
    assert packed[0, 1] == MINUS_INFINITY and packed[1, 0] == UNKNOWN
    assert packed[1, 2] * page.data["logit_step"] == pytest.approx(-2.0)
    assert (unpacked(page.data, "weights", 4) == UNKNOWN).all()


def test_a_screen_reader_finds_names():
    page = Reader(trace_page(made_up(n_prompt=5)))
    named = {attrs.get("aria-label") for _, attrs in page.elements}
    assert {"Prompt", "Written by made-up", "Layer", "Colours of the experts", "Decisions at every layer"} <= named
    (drawing,) = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert drawing["role"] == "img" and drawing["aria-label"] == "Map of 14 tokens by 5 layers, layer 0 at the bottom."
    assert any(attrs.get("role") == "status" for _, attrs in page.elements)
    assert ("html", {"lang": "en"}) in page.elements


def test_what_has_no_page(tmp_path):
    with pytest.raises(TraceError, match="dense model"):
        trace_page(dense())
    with pytest.raises(TraceError, match="dense model"):
        save_page(dense(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
    whole = made_up()
    with pytest.raises(FigureError, match="each token needs its own"):
        trace_page(replace(whole, tokens=whole.tokens[:3]))


def test_saving(tmp_path):
    path = tmp_path / "page.html"
    first, second = made_up(("one",)), made_up(ODD)
    assert save_page(first, path) == path
    assert path.read_text("utf-8") == trace_page(first)
    save_page(second, str(path), title="Again")
    assert path.read_text("utf-8") == trace_page(second, title="Again")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("content", [b"", b"my thesis", b"<!DOCTYPE html><title>mine</title>", bytes(range(256))])
def test_a_strangers_file_is_left_alone(tmp_path, content):
    path = tmp_path / "page.html"
    path.write_bytes(content)
    with pytest.raises(PageError, match="left alone"):
        save_page(made_up(), path)
    assert path.read_bytes() == content


def test_places_where_no_page_can_be(tmp_path):
    with pytest.raises(PageError, match="left alone"):
        save_page(made_up(), tmp_path)
    with pytest.raises(PageError, match="no folder"):
        save_page(made_up(), tmp_path / "nowhere" / "page.html")
