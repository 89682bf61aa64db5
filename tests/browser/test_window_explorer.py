"""WindowExplorer in a real browser: its words and colours against composed masks, the real cache, and the trace."""

import re

import numpy as np
import pytest
import torch
from conftest import evaluate
from playwright.sync_api import expect

import mixtral_lab
from mixtral_lab import PRESETS, Trace
from mixtral_lab.model.attention import RollingCache, visible
from mixtral_lab.widgets.window_explorer import VIEWS, WindowExplorer, prefill_pairs, reach

STORY = "Once upon a time, there was a little dog named Max. He liked to play."
LEFT, TOP, SIDE = 112, 22, 460  # where a grid of few tokens stands in its canvas, at 1,200 pixels

# The colour at the middle of each of the cells (query, key) of a grid of n x n.
COLOURS = """([canvas, n, cells, left, top, side]) => {
  const pen = canvas.getContext("2d"), dots = canvas.width / parseFloat(canvas.style.width);
  return cells.map(([query, key]) => {
    const at = [left + (key + 0.5) * side / n, top + (query + 0.25) * side / n].map(v => Math.round(v * dots));
    return "#" + [...pen.getImageData(...at, 1, 1).data.slice(0, 3)].map(v => v.toString(16).padStart(2, "0")).join("");
  });
}"""
# The colours at these places of a canvas, in pixels of the page.
SPOTS = """([canvas, spots]) => {
  const pen = canvas.getContext("2d"), hex = value => value.toString(16).padStart(2, "0");
  return spots.map(([x, y]) => "#" + [...pen.getImageData(Math.round(x), Math.round(y), 1, 1).data.slice(0, 3)].map(hex).join(""));
}"""
NAMED = """(root, names) => names.map(name => getComputedStyle(root).getPropertyValue("--" + name).trim())"""


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mistral", device="cpu")


@pytest.fixture
def explorer(lab):
    """A short text with a window of 6, at token 13."""
    explorer = WindowExplorer(lab, text=STORY)
    explorer.window, explorer.chunk, explorer.position = 6, 5, 13
    return explorer


def tab(page, view):
    page.locator(f"[data-view={view}]").click()
    expect(page.locator(f"[data-view={view}]")).to_have_attribute("aria-selected", "true")
    settled(page)


def settled(page):
    """Two frames later, everything is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def grid(page, n):
    """The colour of every cell by name, `query key`."""
    names = ["seen", "faint", "past", "future", "now", "dim", "rule"]
    values = page.locator(".mixtral-lab").evaluate(NAMED, names)
    meaning = dict(zip(values, names, strict=True))
    cells = [[query, key] for query in range(n) for key in range(n)]
    found = page.evaluate(COLOURS, [page.locator("canvas").element_handle(), n, cells, LEFT, TOP, SIDE])
    return np.array([meaning.get(colour, colour) for colour in found]).reshape(n, n)


def point(page, n, query, key):
    """Hover over a cell, and give the words that appear."""
    page.locator("canvas").hover(position={"x": LEFT + (key + 0.5) * SIDE / n, "y": TOP + (query + 0.5) * SIDE / n})
    return page.locator(".tip").inner_text()


def said(page):
    settled(page)
    return page.locator(".said").inner_text().replace("\u00a0", " ")


def test_the_mask_is_the_models_own(pages, explorer):
    page, n = pages(explorer), explorer.length
    at = torch.arange(n)[None]
    mask = visible(at, at, 6)[0].numpy()
    settled(page)
    colours = grid(page, n)
    assert ((colours == "faint") | (colours == "seen") == mask).all()
    assert (np.flatnonzero(colours[13] == "seen") == np.flatnonzero(mask[13])).all()
    assert (colours[13] == "seen").sum() == 6 and (colours == "seen").sum() == 6
    assert (colours[12] == "past").sum() == (~mask[12, :12]).sum()
    assert re.fullmatch(r"Token 13 “.*” sees tokens 8 to 13: 6 keys, itself included\.", said(page))
    assert f"Of {n * (n + 1) // 2} pairs" in page.locator(".card").inner_text()
    assert f"leaves {mask.sum()}" in page.locator(".card").inner_text()
    trap = point(page, n, 13, 7)
    assert "just does not see" in trap and "off-by-one" in trap and "6 keys, the token itself included" in trap
    assert "the last that a window of 6 reaches" in point(page, n, 13, 8)
    assert "it comes later" in point(page, n, 13, 14)
    assert "6 back" not in point(page, n, 13, 13) and "sees itself" in point(page, n, 13, 13)
    page.locator("canvas").click(position={"x": LEFT + 20, "y": TOP + (4 + 0.5) * SIDE / n})
    expect(page.locator(".said")).to_contain_text("sees tokens 0 to 4: 5 keys")
    seen = page.locator(".strip .seen").all_inner_texts()
    assert [text.strip() for text in seen] == [
        token.replace("␣", " ").strip() for token in explorer.facts["tokens"][:5]
    ]


def test_keys_sliders_and_boxes(pages, explorer):
    page = pages(explorer)
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".said")).to_contain_text("sees tokens 9 to 14")
    expect(page.locator("canvas")).to_have_attribute("aria-valuenow", "14")
    page.keyboard.press("Home")
    expect(page.locator(".said")).to_contain_text("sees token 0: 1 key")
    page.get_by_label("Position", exact=True).focus()
    page.keyboard.press("End")
    expect(page.locator(".said")).to_contain_text(f"Token {explorer.length - 1} ".replace(" ", "\u00a0", 1))
    page.get_by_label("Window", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".said")).to_contain_text("7 keys")
    page.get_by_label("Window, as a number").fill("3")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_contain_text("3 keys")
    page.get_by_label("no window").check()
    expect(page.locator(".said")).to_contain_text(f"{explorer.length} keys")
    page.get_by_text("The model's: 128").click()
    expect(page.get_by_label("Window, as a number")).to_have_value("128")
    expect(page.locator(".card")).to_contain_text("it hides nothing here")
    page.locator("[data-view=mask]").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("[data-view=prefill]")).to_be_focused()
    expect(page.locator("[data-view=prefill]")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("Chunk", exact=True)).to_be_visible()


def test_the_pattern_is_the_traces(pages, lab):
    trace = lab.trace(STORY, sites=["layers.*.attention.pattern"])
    explorer = WindowExplorer(trace)
    explorer.layer, explorer.head, explorer.position, explorer.view, n = 3, 4, 13, "pattern", len(trace)
    page = pages(explorer)
    pattern = trace["layers.3.attention.pattern"].numpy()
    for head in (4, 5):
        page.get_by_label("Query head").select_option(str(head))
        settled(page)
        row = pattern[head // 2, head % 2, 13]
        best = np.argsort(-row[:14], kind="stable")
        bars = page.locator(".bars .bar")
        expect(bars.first.locator(".name")).to_have_text(re.compile(rf" {best[0]}$"))
        shown = [float(text.replace("\u00a0%", "")) for text in page.locator(".bars .value").all_inner_texts()]
        np.testing.assert_allclose(shown[:10], 100 * row[best[:10]], atol=0.06)
        np.testing.assert_allclose(sum(shown), 100, atol=0.6)
        expect(page.locator(".card")).to_contain_text("Its 14 weights sum to 1.00.")
        assert f"head {head}: token 13" in said(page) and f"with {round(100 * row.max())} %" in said(page)
        # The heat map: the more weight, the darker.
        colours = page.evaluate(
            COLOURS, [page.locator("canvas").element_handle(), n, [[13, key] for key in range(14)], LEFT, TOP, SIDE]
        )
        light = [sum(int(colour[at : at + 2], 16) for at in (1, 3, 5)) for colour in colours]
        assert (np.diff(np.array(light)[best]) >= -3).all() and light[best[0]] < light[best[-1]]
    best = int(pattern[2, 1, 9].argmax())
    assert f"gives {round(100 * pattern[2, 1, 9, best])} % of its" in point(page, n, 9, best).replace("\u00a0", " ")
    assert "it comes later" in point(page, n, 9, 12)
    expect(page.locator(".panel")).to_contain_text(
        "8 query heads, counted from 0; heads 4 and 5 share keys and values 2"
    )
    # No kernel: other layers are not here, other heads of the layer are.
    assert page.get_by_label("Layer").locator("option:enabled").all_inner_texts() == ["3"]
    expect(page.locator(".panel")).to_contain_text("carries layer 3, all heads")
    page.get_by_label("Keys and values (kv)").select_option("0")
    expect(page.locator(".said")).to_contain_text("head 1:")
    # Another window hides some of what was recorded, and changes none of it.
    page.get_by_label("Window, as a number").fill("4")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_contain_text("What was recorded stays what it was, with the model's window of 128")
    lost = round(100 * pattern[0, 1, 13, :10].sum())
    expect(page.locator(".card")).to_contain_text(f"would hide keys that got {lost}\u00a0%")


def test_reach_and_its_cone(pages, explorer):
    explorer.view, explorer.window, explorer.position = "reach", 3, 22
    page = pages(explorer)
    assert reach(8, 3) == 16
    assert "tokens 6 to 22" in said(page) and "after 11 layers; this model has only 8" in said(page)
    expect(page.locator(".card")).to_contain_text("k × 2: after all 8, 16 tokens")
    expect(page.locator(".card")).to_contain_text("says k × W, here 24")
    # Dots: row r from the top is 8 - r layers deep.
    canvas = page.locator("canvas")
    width = canvas.evaluate("canvas => parseFloat(canvas.style.width)")
    cell = (width - 92 - 204) / 23
    names = page.locator(".mixtral-lab").evaluate(NAMED, ["seen", "rule"])
    at = torch.arange(23)[None]
    mask, held = visible(at, at, 3)[0].float(), torch.eye(23)
    for down in range(9):
        spots = [[92 + (key + 0.5) * cell, 6 + 26 * (down + 0.5)] for key in range(23)]
        found = page.evaluate(SPOTS, [canvas.element_handle(), spots])
        assert [colour == names[0] for colour in found] == (held[22] > 0).tolist(), down
        held = held @ mask
    page.get_by_label("Window, as a number").fill("6")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_contain_text("The first token is within reach after 5 layers.")
    canvas.hover(position={"x": 92 + 20.5 * cell, "y": 6 + 26 * 1.5})
    assert "From here, information can reach token 22" in page.locator(".tip").inner_text().replace("\u00a0", " ")


def test_the_ring_is_the_real_cache(pages, explorer, lab):
    explorer.view, explorer.position = "ring", 0
    page = pages(explorer)
    cache = RollingCache(torch.full((1, 1, 6, 1), -1.0), torch.zeros(1, 1, 6, 1))
    for position in range(16):
        cache.extend(torch.full((1, 1, 1, 1), float(position)), torch.zeros(1, 1, 1, 1))
        expect(page.get_by_label("Position, as a number")).to_have_value(str(position))
        settled(page)
        shown = page.locator(".panel tbody tr").evaluate_all("rows => rows.map(row => row.cells[1].textContent)")
        assert [-1 if text == "–" else int(text) for text in shown] == cache.keys[0, 0, :, 0].int().tolist()
        assert f"slot {position} mod 6 = {position % 6}" in said(page)
        assert ("evicts token " + str(position - 6) in said(page)) == (position >= 6)
        assert page.locator(".wedge.full").count() == min(position + 1, 6)
        page.get_by_label("one token on").click()
    expect(page.get_by_label("Position, as a number")).to_have_value("16")
    settled(page)
    expect(page.locator(".strip .out")).to_have_count(1)
    bars = [text.replace("\u00a0", " ") for text in page.locator(".bar .value").all_inner_texts()]
    token = lab.config.cache_bytes(1, 4)
    assert token == 8192 and bars == ["49.2 kB", "139 kB", "49.2 kB", "16.8 MB"]
    assert 6 * token == 49_152 and 17 * token == 139_264 and lab.config.context * token == 16_777_216
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_label("Position, as a number")).to_have_value("18")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_the_three_kinds_of_blocks(pages, explorer):
    explorer.view = "prefill"
    page, n = pages(explorer), explorer.length
    settled(page)
    colours = grid(page, n)
    at = torch.arange(n)[None]
    mask = visible(at, at, 6)[0].numpy()
    for query in range(10, 15):  # chunk 3: tokens 10 to 14; the cache holds 4 to 9
        expected = ["past"] * 4 + ["seen" if sees else "faint" for sees in mask[query, 4:10]]
        expected += ["now" if sees else "dim" for sees in mask[query, 10:15]] + ["future"] * (n - 15)
        assert colours[query].tolist() == expected
    assert ((colours[:10] == "rule") == mask[:10]).all()
    assert said(page) == "Chunk 3 of 5 reads tokens 10 to 14; the cache holds tokens 4 to 9; tokens 0 to 3 are past."
    card = page.locator(".card").inner_text()
    assert (
        "5 × 11 = 55 scores" in card and f"All chunks: {prefill_pairs(n, 5, 6)} instead of {n} × {n} = {n * n}" in card
    )
    assert "masked zero, and never computed" in point(page, n, 12, 1)
    page.get_by_label("Chunk, as a number").fill("9")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_contain_text("Chunk 2 of 3 reads tokens 9 to 17")
    expect(page.locator(".card")).to_contain_text("longer than the window, so the window hides some of the chunk too")
    expect(page.locator(".card")).to_contain_text(f"All chunks: {prefill_pairs(n, 9, 6)} instead")


def test_a_config_and_no_window(pages):
    page = pages(WindowExplorer(PRESETS["mistral-7b-v0.1"]))
    assert "Token 12,287 sees tokens 8,192 to 12,287: 4,096 keys" in said(page)
    tab(page, "pattern")
    expect(page.locator(".panel .notice")).to_contain_text(
        "A config has no text and no weights, so there is no pattern"
    )
    tab(page, "reach")
    expect(page.locator(".card")).to_contain_text("after all 32, 131,040 tokens")
    expect(page.locator(".card")).to_contain_text("here 131,072")
    tab(page, "ring")
    expect(page.locator(".bar .value").first).to_have_text("537\u00a0MB")
    assert PRESETS["mistral-7b-v0.1"].config.cache_bytes(12288) == 536_870_912
    page.get_by_label("Tokens, as a number").fill("100")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_contain_text("slot 99 mod 4,096 = 99; nothing is evicted yet")
    other = pages(WindowExplorer(PRESETS["mixtral-8x7b"]))
    expect(other.locator(".notice").first).to_contain_text("has no window on record")
    tab(other, "ring")
    expect(other.locator(".said")).to_contain_text("Without a window the cache keeps all")
    tab(other, "reach")
    expect(other.locator(".card")).to_contain_text("one layer reaches everything")


def test_a_long_text_says_what_is_not_there(pages):
    seeds = torch.Generator().manual_seed(1)
    stem, tokens = "layers.0.attention.heads", ("<script>alert(1)</script>", *("שלום" for _ in range(1499)))
    recorded = {
        f"{stem}.query": torch.randn(1, 1, 1500, 8, generator=seeds),
        f"{stem}.key": torch.randn(1, 1500, 8, generator=seeds),
    }
    trace = Trace(torch.arange(1500), tokens, 1500, "random", "float32", n_layers=1, recorded=recorded)
    explorer = WindowExplorer(trace)
    explorer.view = "pattern"
    page = pages(explorer)
    assert "looks most at" in said(page)
    expect(page.locator(".card")).to_contain_text("the largest weight in 6 × 6 tokens")
    row = trace["layers.0.attention.pattern"].numpy()[0, 0, 1499]
    expect(page.locator(".bars .value").first).to_have_text(f"{100 * row.max():.1f}\u00a0%")
    page.get_by_label("how much of the text is shown").select_option("64")
    page.get_by_label("Position", exact=True).focus()
    page.keyboard.press("Home")
    expect(page.locator(".said")).to_contain_text("is not here: this page does not carry it")
    expect(page.locator(".card")).to_contain_text("this page has no others")
    expect(page.locator(".strip")).to_contain_text("<script>alert(1)</script>")


def test_dark_at_900_pixels(pages, lab):
    explorer = WindowExplorer(lab, text=STORY * 9)
    explorer.position = 150
    page = pages(explorer, width=900, dark=True)
    for view in VIEWS:
        tab(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 900
        assert page.locator(".mixtral-lab").get_attribute("data-theme") == "dark"
        for part in page.locator(".panel canvas, .panel svg, .panel .card").all():
            box = part.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 900


def test_in_jupyterlab_both_ways(lab_page):
    page = lab_page(
        "import mixtral_lab\nfrom mixtral_lab.widgets.window_explorer import WindowExplorer\n"
        "lab = mixtral_lab.load('mini-mistral', device='cpu')",
        f"explorer = WindowExplorer(lab, text={STORY * 75!r})\nexplorer",
    )
    widget = page.locator(".mixtral-lab.window-explorer")
    widget.wait_for()
    assert evaluate(page, "print(explorer.length > 1000, explorer.held['whole'])") == "True False"
    # From the browser to Python: a tab, a key, a slider, a choice; rows and heads that were not there come.
    widget.locator("[data-view=pattern]").click()
    page.get_by_label("Window", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_label("Position", exact=True).focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(widget.locator(".said")).to_contain_text("token\u00a02 ")
    widget.get_by_label("Layer").select_option("6")
    expect(widget.locator(".said")).to_contain_text("Layer 6, head 0: token\u00a02 ")
    widget.get_by_label("Keys and values (kv)").select_option("3")
    expect(widget.locator(".said")).to_contain_text("Layer 6, head 6: token\u00a02 ")
    code = (
        "p = explorer._trace['layers.6.attention.pattern'][3, 0, 2]; "
        "print(explorer.view, explorer.window, explorer.position, explorer.layer, explorer.head, f'{100 * p.max():.1f}')"
    )
    *traits, most = evaluate(page, code).split()
    assert traits == ["pattern", "127", "2", "6", "6"]
    expect(widget.locator(".bars .value").first).to_have_text(most + "\u00a0%")
    # From Python to the browser.
    evaluate(page, "explorer.view, explorer.window, explorer.position = 'ring', 8, 17; print('set')")
    expect(widget.locator(".said")).to_contain_text("slot 17 mod 8 = 1; that evicts token\u00a09")
