"""A small site, built as `make site` does it, and opened as a reader would: from its folder and from a plain server."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from playwright.sync_api import expect

ROOT = Path(__file__).parents[2]
CELLS = [
    new_markdown_cell(
        "# 98 · A small lesson\n\n**Does it hold?** It reads [`moe.py`](../mixtral_lab/model/moe.py), the [table of sites]"
        "(../docs/sites.md), [the next](99_after.ipynb) and [nothing](97_none.ipynb).\n\n"
        "With $G(x)_i$ for the weights:\n\n"
        r"$$y = \sum_{i=1}^{8} G(x)_i \cdot \frac{E_i(x)}{s}$$"
    ),
    new_code_cell(
        "import sys\n\nimport mixtral_lab\nfrom mixtral_lab import figures\nfrom mixtral_lab.widgets import RouterExplorer\n\n"
        'lab = mixtral_lab.load("mini-mixtral", dtype="float32")\n'
        'trace = lab.trace("Once upon a </script><b>time", max_new_tokens=8)\n'
        'print("a progress bar", file=sys.stderr)\nprint("printed " * 60, flush=True)\nprint("below")'
    ),
    new_code_cell("figures.token_layer_map(trace)"),
    new_markdown_cell("## Explore"),
    new_code_cell("RouterExplorer(trace)"),
    new_markdown_cell(
        "<details><summary>Solution</summary>\n\n```python\nanswer = experts[5](x)\n```\n</details>\n\n"
        "A word to look for: quokka."
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    lessons = [folder / "98_small.ipynb", folder / "99_after.ipynb"]
    nbformat.write(new_notebook(cells=CELLS), lessons[0])
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 99 · After\n\nThe end.")]), lessons[1])
    before = [lesson.read_bytes() for lesson in lessons]
    command = [sys.executable, ROOT / "docs/site/build.py", *lessons, "--build", folder / "build", "--jobs", "2"]
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MIXTRAL_LAB_SHAPES": "off"})
    assert built.returncode == 0, built.stderr
    assert "running 2 lessons" in built.stderr and "pages" in built.stdout
    assert [lesson.read_bytes() for lesson in lessons] == before
    return folder / "build" / "site"


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(params=["file", "server"])
def small(request, site, address):
    return f"{site.as_uri() if request.param == 'file' else address}/notebooks/98_small.html"


def opened(new_page, address: str, **kwargs):
    page = new_page(**kwargs)
    page.set_default_timeout(60_000)  # plotly is read, and on a busy machine that takes its time
    page.goto(address)
    return page


def whole(figure) -> None:
    """The drawing ends where its box ends, and the box has no scroll bar."""
    box, drawing = figure.bounding_box(), figure.locator(".main-svg").first.bounding_box()
    assert drawing["width"] > 0.9 * box["width"]
    assert drawing["x"] + drawing["width"] <= box["x"] + box["width"] + 1
    assert drawing["y"] + drawing["height"] <= box["y"] + box["height"] + 1
    assert figure.evaluate("box => getComputedStyle(box).overflowX") == "hidden"


class Links(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.to: list[str] = []
        self.loaded: set[str] = set()  # without being asked, as the target of an <a> is not
        self.names: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.to.append(value)
                if tag != "a":
                    self.loaded.add(value)
            elif name == "id":
                self.names.add(value)


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_outside(site):
    pages = {page: Links(page) for page in site.rglob("*.html")}
    assert {"index.html", "search.html", "docs/sites.html", "README.html", "mixtral_lab/model/moe.py.html"} <= {
        page.relative_to(site).as_posix() for page in pages
    }
    followed = 0
    for page, links in pages.items():
        for link in links.to:
            to = urlsplit(link)
            if to.scheme in ("http", "https", "mailto", "data"):
                assert to.scheme == "data" or link not in links.loaded, f"{page.name} loads {link}"
                continue
            target = (page.parent / unquote(to.path)).resolve() if to.path else page
            assert target.is_file(), f"{page.name} links to {link}"
            if to.fragment and target in pages:
                assert unquote(to.fragment) in pages[target].names, f"{page.name} links to {link}"
            followed += 1
    assert followed > 100


def test_plotly_is_there_once_and_is_not_in_the_pages(site):
    assert [file.relative_to(site).as_posix() for file in site.rglob("plotly*.js")] == ["_static/plotly.min.js"]
    assert max(page.stat().st_size for page in site.rglob("*.html")) < 300_000


def test_a_lesson_as_a_page(small, new_page):
    page = opened(new_page, small, width=1400)
    expect(page.locator("h1")).to_contain_text("98 · A small lesson")
    expect(
        page.locator(".lab-figure[data-drawn] .js-plotly-plot, .lab-figure[data-drawn] .main-svg").first
    ).to_be_visible()
    figure = page.locator(".lab-figure")
    expect(figure).to_contain_text("Who reads each token, layer by layer")
    whole(figure)

    article = page.locator("article")
    expect(article.locator(".cell_output pre", has_text="printed printed")).to_contain_text("below")
    expect(article.locator(".cell_output", has_text="a progress bar")).to_have_count(0)
    sums = page.locator("math[display=block]")
    expect(sums.locator("mfrac")).to_have_count(1)
    assert sums.bounding_box()["height"] > 30
    expect(article).not_to_contain_text("\\frac")

    expect(page.get_by_text("answer = experts[5](x)")).to_be_hidden()
    page.get_by_text("Solution", exact=True).click()
    expect(page.get_by_text("answer = experts[5](x)")).to_be_visible()

    page.get_by_role("link", name="moe.py").click()
    expect(page.locator("pre")).to_contain_text("def route(")
    page.go_back()
    page.locator("a.next-page").click()
    expect(page.locator("h1")).to_contain_text("99 · After")
    page.locator("a.prev-page").click()
    expect(page.locator("h1")).to_contain_text("98 · A small lesson")


def test_the_explorer_answers_in_the_page_and_on_one_of_its_own(small, new_page):
    page = opened(new_page, small, width=1400)
    for _ in range(2):
        explorer = page.locator(".mixtral-lab.router-explorer")
        expect(explorer).to_have_count(1)
        expect(explorer).to_contain_text("</script>")
        for token in (4, 2):
            explorer.locator(".tokens span").nth(token).click()
            expect(explorer.locator(".said")).to_contain_text(f"Token {token}, ")
        own = page.get_by_role("link", name="RouterExplorer on a page of its own")
        if own.count():
            own.click()


def test_dark_follows_the_system_and_the_switch(small, new_page):
    page = opened(new_page, small, width=900, dark=True)
    explorer = page.locator(".mixtral-lab.router-explorer")
    expect(explorer).to_have_attribute("data-theme", "dark")
    figure = page.locator(".lab-figure")
    figure.scroll_into_view_if_needed()
    expect(page.locator(".lab-figure[data-drawn]")).to_have_count(1)
    assert figure.evaluate("box => getComputedStyle(box).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    whole(figure)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator(".theme-toggle:visible").first.click()
    expect(explorer).to_have_attribute("data-theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_search_finds_a_word(small, new_page):
    page = opened(new_page, small, width=1400)
    page.locator("input[name=q]").first.fill("quokka")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a").first
    expect(found).to_contain_text("98 · A small lesson")
    if small.startswith("http"):
        expect(page.locator("#search-results")).to_contain_text("A word to look for")
    found.click()
    expect(page.locator("h1")).to_contain_text("98 · A small lesson")


def test_the_first_page_has_the_map_and_the_words(site, new_page):
    page = opened(new_page, (site / "index.html").as_uri(), width=1400)
    expect(page.get_by_role("heading", name="A map of the lessons")).to_be_visible()
    expect(page.get_by_role("heading", name="The words of the lab")).to_be_visible()
    expect(page.get_by_role("cell", name="near tie")).to_be_visible()
    page.locator(".sidebar-tree").get_by_text("98 · A small lesson").click()
    expect(page.locator("h1")).to_contain_text("98 · A small lesson")


def test_without_javascript_texts_and_routing_are_still_there(site, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / "notebooks/98_small.html").as_uri())
    expect(page.locator(".lab-widget .place")).to_contain_text("Once")
    expect(page.locator("math[display=block] mfrac")).to_have_count(1)
    context.close()
