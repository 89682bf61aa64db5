"""Intervene in a real browser: as a page of its own, and with a kernel behind it in JupyterLab."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import SCREENSHOTS, evaluate
from playwright.sync_api import expect

import mixtral_lab
from mixtral_lab.widgets.intervene import Intervene

PROMPT = "Once upon a time there was a little robot who lived in a house."
EDITS = [
    {"kind": "temperature", "t": 2.0},
    {"kind": "ablate", "layer": 2, "expert": 5, "how": "zero"},
    {"kind": "ablate", "layer": 4, "expert": 1, "how": "next_best"},
    {"kind": "scale", "layer": 6, "expert": 3, "factor": 2.5},
    {"kind": "reroute", "layer": 3, "position": 6, "experts": [1, 7]},
    {"kind": "patch", "site": "layers.3.residual.after", "text": "Once upon a day there was a", "position": 4},
]


@pytest.fixture(scope="module")
def widget() -> Intervene:
    made = Intervene(mixtral_lab.load("mini-mixtral", device="cpu"), PROMPT, 16)
    made.edits = EDITS
    made.selected_layer, made.selected_expert, made.selected_token = 3, 5, 6
    return made


def cell(page, layer: int, expert: int):
    return page.locator(f'.cell[data-layer="{layer}"][data-expert="{expert}"]')


def test_a_saved_page_shows_the_state_and_its_controls_are_off(pages, widget):
    page = pages(widget)
    assert page.locator(".edits li span").all_inner_texts() == widget.said
    rows = page.locator(".candidates tbody tr").all()
    table = widget.frame()
    assert len(rows) == len(table)
    for row, one in zip(rows, table.itertuples(), strict=True):
        texts = [text.replace("\u00a0", " ").replace("−", "-") for text in row.locator("td").all_inner_texts()]
        assert texts[1:3] == [f"{100 * one.baseline:.2f} %", f"{100 * one.edited:.2f} %"]
        assert float(texts[3]) == pytest.approx(one.difference, abs=0.006)
        assert float(texts[4]) == pytest.approx(one.log_p_change, abs=0.0006)
        bars = [bar.bounding_box()["width"] for bar in row.locator(".bar").all()]
        assert max(bars) < 3 or bars[1] / bars[0] == pytest.approx(one.edited / one.baseline, rel=0.15, abs=0.1)
    expect(page.locator(".numbers")).to_contain_text(f"{widget.comparison['kl']:.3f} nats")
    changed = widget.comparison["forced"] + widget.comparison["follows"]
    expect(page.locator(".numbers")).to_contain_text(f"{changed} of {widget.comparison['decisions']}")
    expect(page.locator("pre code")).to_have_text(widget.code)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text(re.compile("Copied|Selected: copy it"))).to_be_visible()
    assert page.evaluate("getSelection().toString()").strip() == widget.code.strip()
    for name in ("baseline", "edited"):
        text = page.locator(f".text.{name} p").evaluate("node => node.textContent")
        assert text.replace("⏎", "") == getattr(widget, name)["text"]
    expect(page.locator(".alone")).to_contain_text("its controls are off")
    assert page.locator("input:enabled, select:enabled, .remove:enabled, .pick:enabled").count() == 0
    expect(page.get_by_label("prompt", exact=True)).to_have_value(PROMPT)


def test_the_board_of_a_saved_page_still_answers(pages, widget):
    page = pages(widget)
    used = widget.traces()[0].experts[:, : len(widget.tokens)].numpy()
    counts = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in used])
    expect(cell(page, 2, 5).locator(".dot")).to_have_text("0")
    expect(cell(page, 4, 1).locator(".dot")).to_have_text("→")
    expect(cell(page, 6, 3).locator(".dot")).to_have_text("×2.5")
    widths = {
        at: cell(page, *at).locator(".dot").bounding_box()["width"] for at in np.ndindex(8, 8)
        if at not in [(2, 5), (4, 1), (6, 3)]
    }  # fmt: skip
    for at, width in widths.items():
        assert width == pytest.approx(max(3, 24 * np.sqrt(counts[at] / counts.max())), abs=0.6)
    assert (
        cell(page, 0, 2).locator(".dot").evaluate("dot => getComputedStyle(dot).backgroundColor") == "rgb(0, 142, 115)"
    )
    cell(page, 1, 4).click()
    expect(page.locator(".menu")).to_contain_text(
        f"Chosen by {counts[1, 4]} of the prompt's {len(widget.tokens)} tokens"
    )
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    expect(cell(page, 2, 5)).to_be_focused()
    expect(page.locator(".menu h3")).to_have_text(re.compile("expert.5 in layer 2"))
    expect(page.locator('input[value="zero"]')).to_be_checked()
    expect(page.locator(".sr")).to_contain_text(f"Layer 2, expert 5: chosen by {counts[2, 5]} of")
    page.keyboard.press("Enter")  # no model: nothing happens
    expect(page.locator('input[value="zero"]')).to_be_checked()
    cell(page, 2, 4).hover()
    expect(page.locator(".tip")).to_contain_text(f"Layer 2, expert 4: chosen by {counts[2, 4]} of")


def test_the_grid_of_a_saved_page_still_answers(pages, widget):
    page = pages(widget)
    before, after = (trace.experts for trace in widget.traces())
    expect(page.locator(".token h4")).to_have_text("Token 6 “␣there” in layer 3")
    expect(page.locator(".takes")).to_have_text(
        re.compile(
            r"takes expert.{} expert.{} +before, +expert.1 expert.7 +under the edits".format(*before[3, 6].tolist())
        )
    )
    page.locator(".tokengrid").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Home", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator(".token h4")).to_have_text("Token 1 “On” in layer 2")
    page.keyboard.press("End")
    last = len(widget.tokens) - 1
    names = [sorted(trace[2, last].tolist()) for trace in (before, after)]
    found = [int(number) for number in re.findall(r"expert.(\d)", page.locator(".takes").inner_text())]
    assert sorted(found[:2]) == names[0] and (names[0] == names[1] or sorted(found[2:]) == names[1])
    box = page.locator(".tokengrid canvas").bounding_box()
    column = max(24, min(44, (page.locator(".tokengrid").bounding_box()["width"] - 50) // len(widget.tokens)))
    at = {"x": 42 + column * 5.5, "y": 92 + 22 * (7 - 6) + 10}
    page.locator(".tokengrid canvas").click(position=at)
    expect(page.locator(".token h4")).to_have_text(f"Token 5 “{widget.tokens[5]}” in layer 6")
    for trace, half in ((before, 0.2), (after, 0.8)):  # the choice before on the left, the choice now on the right
        colour = page.locator(".tokengrid canvas").evaluate(
            "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)",
            [42 + column * (6 + half), 92 + 22 * (7 - 3) + 4],
        )
        assert "#{:02X}{:02X}{:02X}".format(*colour) == widget.colours[int(trace[3, 6, 0])][0].upper()
    page.mouse.move(box["x"] + 42 + column * 6.5, box["y"] + 92 + 22 * 4 + 10)
    expect(page.locator(".tip")).to_contain_text("experts 1 and 7 under the edits, because an edit says so")


def test_dark_at_900_pixels(pages, widget):
    page = pages(widget, width=900, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    expect(page.locator(".mixtral-lab")).to_have_attribute("data-theme", "dark")
    for part in page.locator(".card").all():
        assert part.evaluate("node => node.scrollWidth <= node.clientWidth + 1")


def test_a_dense_model(pages):
    dense = Intervene(mixtral_lab.load("mini-mistral", device="cpu"), "<script>alert(1)</script> def main():", 6)
    dense.edits = [{"kind": "multiply", "site": "layers.2.feed_forward", "factor": 0.0}]
    page = pages(dense, width=900)
    expect(page.locator(".notice")).to_contain_text("is a dense model: it has no experts")
    assert page.locator(".board").count() == 0 and page.locator(".pick").count() == 0
    expect(page.locator(".edits")).to_contain_text("layers.2.feed_forward × 0")
    expect(page.get_by_label("prompt", exact=True)).to_have_value("<script>alert(1)</script> def main():")


def test_a_long_prompt_scrolls_inside(pages):
    long = Intervene(mixtral_lab.load("mini-mixtral", device="cpu"), "a small dog. " * 120, 1)
    long.edits = [EDITS[1]]
    page = pages(long, width=900)
    page.locator(".tokengrid").focus()
    page.keyboard.press("End")
    last = len(long.tokens) - 1
    expect(page.locator(".token h4")).to_contain_text(f"Token {last} ")
    assert page.locator(".tokengrid").evaluate("box => box.scrollLeft") > 5_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_in_jupyterlab(lab_page):
    page = lab_page(
        "import mixtral_lab\nfrom mixtral_lab.widgets.intervene import Intervene\n"
        f"lab = mixtral_lab.load('mini-mixtral', device='cpu')\nw = Intervene(lab, {PROMPT!r}, 6)\nw",
        height=2500,
    )
    widget = page.locator(".mixtral-lab.intervene")
    expect(widget.locator(".inforce")).to_contain_text("No edit is in force")
    # A click and a choice from the menu.
    cell(page, 2, 5).click()
    widget.locator('input[value="next_best"]').check()
    expect(widget.locator(".edits li")).to_have_count(1)
    expect(cell(page, 2, 5).locator(".dot")).to_have_text("→")
    shown = json.loads(
        evaluate(
            page, "import json; print(json.dumps([w.edits, w.selected_layer, w.selected_expert, w.comparison['kl']]))"
        )
    )
    assert shown[:3] == [[{"kind": "ablate", "layer": 2, "expert": 5, "how": "next_best"}], 2, 5]
    # The keyboard, without JupyterLab hearing it.
    cell(page, 2, 5).click()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(widget.locator(".edits li")).to_have_count(2)
    expect(cell(page, 2, 4).locator(".dot")).to_have_text("0")
    # A slider.
    widget.get_by_label("experts per token").focus()
    page.keyboard.press("ArrowRight")
    expect(widget.locator(".edits li").first).to_contain_text("every token takes 3 experts, not 2")
    # A token sent elsewhere: three experts, because each takes three.
    box = widget.locator(".tokengrid")
    box.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    for expert in (6, 0, 3):
        widget.locator(".pick").nth(expert).click()
    widget.get_by_role("button", name="Send it there").click()
    expect(widget.locator(".edits li").last).to_contain_text("Layer 2, position 1: sent to experts 6, 0 and 3")
    # A patch that has no such position is refused, in words; then one that has.
    page.keyboard.press("Escape")
    other = widget.get_by_label("text of the other run")
    box.focus()
    page.keyboard.press("End")
    other.fill("Two")
    other.press("Enter")
    expect(widget.locator(".notice")).to_contain_text("is not in the trace")
    expect(widget.locator(".edits li")).to_have_count(4)
    numbers = "[w.edits, w.comparison['candidates'][0]['edited'], w.edited['text'], w.comparison['kl']]"
    edits, likeliest, text, kl = json.loads(evaluate(page, f"print(json.dumps({numbers}))"))
    assert [edit["kind"] for edit in edits] == ["top_k", "ablate", "ablate", "reroute"] and edits[0]["k"] == 3
    expect(widget.locator(".candidates tbody tr").first).to_contain_text(f"{100 * likeliest:.2f}")
    expect(widget.locator(".numbers")).to_contain_text(f"{kl:.3f} nats")
    assert widget.locator(".text.edited p").evaluate("node => node.textContent").replace("⏎", "") == text
    widget.screenshot(path=SCREENSHOTS / "test_intervene-in_jupyterlab-edited.png")
    own = Intervene(mixtral_lab.load("mini-mixtral", device="cpu"), PROMPT, 6)
    own.edits = edits
    assert own.comparison["kl"] == pytest.approx(kl, rel=1e-3) and own.edited["text"] == text
    # Python sets, the picture follows.
    evaluate(
        page,
        "w.edits = [{'kind': 'scale', 'layer': 7, 'expert': 1, 'factor': 0.5}]\n"
        "w.selected_layer, w.selected_expert = 7, 1\nprint(1)",
    )
    expect(cell(page, 7, 1).locator(".dot")).to_have_text("×0.5")
    expect(cell(page, 7, 1)).to_have_attribute("aria-selected", "true")
    expect(widget.locator(".edits li")).to_have_count(1)
    widget.get_by_role("button", name=re.compile("^remove: Expert 1")).click()
    expect(widget.locator(".inforce")).to_contain_text("No edit is in force")
    # Another prompt.
    text = widget.get_by_label("prompt", exact=True)
    text.fill("def main():")
    text.press("Enter")
    expect(widget.locator(".token h4")).to_contain_text("Token 4")
    assert evaluate(page, "print(w.prompt, len(w.tokens))") == "def main(): 5"
