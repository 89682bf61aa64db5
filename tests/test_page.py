"""A widget's page shows text as text, asks no server, runs its own script only, and never replaces a stranger's file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_figures import ODD, dense, made_up

from mixtral_lab.figures import expert_colour
from mixtral_lab.widgets.page import PageError, write_page
from mixtral_lab.widgets.router_explorer import RouterExplorer

SHAPES = {
    "usual": {"n_prompt": 9},
    "one token, one layer": {"tokens": ("<s>",), "layers": 1, "experts": 4, "choices": 1},
    "many experts": {"experts": 64, "choices": 8},
    "very many experts": {"experts": 300, "choices": 2, "layers": 2},
    "deep": {"layers": 40, "n_prompt": 0},
    "right to left": {"tokens": ("<s>", "שלום", "␣עולם", "⏎", "␣مرحبا")},
    "only line breaks": {"tokens": ("⏎", "⏎⏎", "␣", "⇥")},
}
EVIL = (
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


class Reader(HTMLParser):
    """The page as a browser without JavaScript has it: elements, token spans, strokes of the map."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.spans: list[tuple[str, str]] = []
        self.in_tokens = self.in_span = False
        self.scripts: list[str] = []
        self.heading = self.tag = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        self.tag = tag
        if tag == "div":
            self.in_tokens = "pre-wrap" in attrs.get("style", "")
        if tag == "span" and self.in_tokens:
            self.in_span = True
            self.spans.append((attrs["style"], ""))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == "span":
            self.in_span = False
        self.tag = ""

    def handle_data(self, text):
        if self.in_span:
            style, before = self.spans[-1]
            self.spans[-1] = (style, before + text)
        if self.tag == "script":
            self.scripts[-1] += text
        if self.tag == "h1":
            self.heading += text

    @property
    def state(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(trace, tmp_path, **kwargs) -> str:
    return RouterExplorer(trace).save_html(tmp_path / "page.html", **kwargs).read_text("utf-8")


@pytest.mark.parametrize("name", SHAPES)
def test_without_javascript_text_and_map_are_there(name, tmp_path):
    trace = made_up(**SHAPES[name])
    page = Reader(page_of(trace, tmp_path))
    layers, seq, choices = trace.routing.experts.shape
    middle = trace.routing.experts[(layers - 1) // 2, :, 0].tolist()
    assert [text for _, text in page.spans] == [token.replace("␣", " ") for token in trace.tokens]
    assert [re.search("background:(#......)", style)[1] for style, _ in page.spans] == list(map(expert_colour, middle))

    # Every cell of the map is one stroke in its expert's colour, for the first choice and the second.
    experts = {expert_colour(expert): expert for expert in range(trace.n_experts)}
    drawn = np.full((min(choices, 2), layers, seq), -1)
    choice = -1
    for tag, attrs in page.elements:
        choice += tag == "g"
        if tag == "path" and "stroke-opacity" in attrs:
            for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)", attrs["d"]):
                cells = drawn[choice, layers - 1 - int(y), int(x) : int(x) + int(run)]
                assert len(cells) == int(run) and (cells == -1).all()
                cells[:] = experts[attrs["stroke"]]
    np.testing.assert_array_equal(drawn, trace.routing.experts[:, :, :2].permute(2, 0, 1))


def test_markup_in_a_text_stays_text(tmp_path):
    trace = made_up(EVIL, n_prompt=4, model="<i>model</i>")
    whole = page_of(trace, tmp_path, title="<script>alert(2)</script> $data")
    page = Reader(whole)
    assert tuple(page.state["panes"][0]["tokens"]) == EVIL
    assert tuple(text for _, text in page.spans) == EVIL
    assert page.heading == "<script>alert(2)</script> $data"
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"img", "i"} & set(tags)
    assert "<script>alert" not in whole and "<img" not in whole


def test_only_the_pages_own_script_may_run(tmp_path):
    page = Reader(page_of(made_up(ODD), tmp_path))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    own = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'"
    assert "innerHTML" not in page.scripts[1]


@pytest.mark.parametrize("name", [*SHAPES, "dense"])
def test_nothing_is_fetched(name, tmp_path):
    page = page_of(dense() if name == "dense" else made_up(**SHAPES[name]), tmp_path)
    page = page.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    for outside in ("http://", "https://", "src=", "href=", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert outside not in page


def test_three_hundred_tokens_stay_small(tmp_path):
    trace = made_up([f"␣word{i}" for i in range(300)], layers=8, n_prompt=200)
    assert len(page_of(trace, tmp_path).encode()) < 320_000


def test_without_javascript_a_screen_reader_finds_names(tmp_path):
    page = Reader(page_of(made_up(n_prompt=5), tmp_path))
    (drawing,) = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert drawing["role"] == "img" and drawing["aria-label"] == "Map of 14 tokens by 5 layers, layer 0 at the bottom."
    assert ("html", {"lang": "en"}) in page.elements


def test_saving_replaces_an_earlier_page(tmp_path):
    path = tmp_path / "page.html"
    assert RouterExplorer(made_up(("one",))).save_html(path) == path
    assert Reader(path.read_text("utf-8")).state["panes"][0]["tokens"] == ["one"]
    RouterExplorer(made_up(ODD)).save_html(str(path), title="Again")
    page = Reader(path.read_text("utf-8"))
    assert tuple(page.state["panes"][0]["tokens"]) == ODD and page.heading == "Again"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("content", [b"", b"my thesis", b"<!DOCTYPE html><title>mine</title>", bytes(range(256))])
def test_a_strangers_file_is_left_alone(tmp_path, content):
    path = tmp_path / "page.html"
    path.write_bytes(content)
    with pytest.raises(PageError, match="left alone"):
        RouterExplorer(made_up()).save_html(path)
    assert path.read_bytes() == content


def test_places_where_no_page_can_be(tmp_path):
    with pytest.raises(PageError, match="left alone"):
        RouterExplorer(made_up()).save_html(tmp_path)
    with pytest.raises(PageError, match="no folder"):
        RouterExplorer(made_up()).save_html(tmp_path / "nowhere" / "page.html")


def test_a_page_of_an_earlier_version_may_be_replaced(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!DOCTYPE html>\n<head>\n<!-- mixtral_lab.page.1 -->")
    write_page(
        path, "Title", "export default { render() {} };", "", {"a": b"\x00\xff", "b": "</script>"}, "<p>still</p>"
    )
    page = Reader(path.read_text("utf-8"))
    assert page.state == {"a": {"$bytes": base64.b64encode(b"\x00\xff").decode()}, "b": "</script>"}
