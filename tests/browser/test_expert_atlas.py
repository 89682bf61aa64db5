"""The atlas of experts in a browser: the numbers it shows, and what clicks and keys choose."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import evaluate
from playwright.sync_api import Page, expect

import mixtral_lab
from mixtral_lab import analysis, study
from mixtral_lab.study import Counts
from mixtral_lab.widgets.expert_atlas import ExpertAtlas

DOMAINS = ("code", "french", "prose")
COUNT = f"""import mixtral_lab
from mixtral_lab import study
from mixtral_lab.widgets.expert_atlas import ExpertAtlas
study.counting.OFFLOADED = 0
texts = study.bundled_texts()
counts = study.count(mixtral_lab.load("mini-mixtral", device="cpu"), {{one: texts[one][:3] for one in {DOMAINS}}})"""


@pytest.fixture(scope="module")
def counts():
    whole = study.bundled_texts()
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.counting, "OFFLOADED", 0)
        return study.count(lab, {domain: whole[domain][:3] for domain in DOMAINS})


def made_up(
    layers: int, experts: int, choices: int, domains: tuple[str, ...], names: list[str], seq: int = 200
) -> Counts:
    random = np.random.default_rng(0)
    found = Counts("made up", "float32", domains, layers, experts, choices, names)
    for domain in range(len(domains)):
        ids = (random.zipf(1.3, seq) - 1) % len(names)
        chosen = np.argsort(random.random((layers, seq, experts)) + random.random((layers, 1, experts)), -1)[
            ..., :choices
        ]
        found.texts[domain] += 1
        found.tokens[domain] += seq
        found.ranks[domain] += analysis.rank_counts(chosen, experts)
        found.together += analysis.coactivation_counts(chosen, experts)
        if layers > 1:
            found.moved += analysis.transition_counts(chosen, experts)
        found.vocabulary += analysis.vocabulary_counts(chosen, experts, ids, len(names))
        found.places.add(domain, ids, chosen, random.random(seq))
    return found


def said(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def status(page: Page) -> str:
    return page.locator(".now").inner_text()


def cell(page: Page, part: str, row: int, column: int):
    return page.locator(f".{part} .cells > .line:has(.cell)").nth(row).locator(".cell").nth(column)


def number(page: Page, block: str, line: int) -> tuple[str, str]:
    """A line of a block of the card: its name and its number."""
    found = page.locator(".about .block", has=page.locator("h4", has_text=block)).locator(".bars > .line").nth(line)
    return found.locator(".label").inner_text(), found.locator(".number").inner_text()


def test_shows_what_was_counted(pages, counts):
    atlas = ExpertAtlas(counts)
    atlas.selected_layer, atlas.selected_expert = 3, 6
    page = pages(atlas)
    shares = analysis.as_shares(counts.by_domain.sum(0))
    for expert in range(8):
        for layer in range(8):
            assert cell(page, "used", expert, layer).inner_text() == str(int(100 * shares[layer, expert] + 0.5))
    assert (
        status(page)
        == f"Layer 3, expert 6, all domains: {said(shares[3, 6])} of all choices; even use would be {said(1 / 8)}."
    )
    first, second = analysis.as_shares(counts.ranks.sum(0))[3, :, 6]
    assert number(page, "First and second choice", 1) == ("first", said(first))
    assert number(page, "First and second choice", 2) == ("second", said(second))
    by_domain = analysis.as_shares(counts.by_domain)[:, 3, 6]
    best = int(by_domain.argmax())
    assert number(page, "By domain", 0) == (DOMAINS[best], said(by_domain[best]))
    together = analysis.coactivation(counts.together)[3]
    for other in (0, 1, 7):
        assert cell(page, "company", 6, other).inner_text() == str(int(100 * together[6, other] + 0.5))
    together[6, 6] = -1
    other = int(together[6].argmax())
    assert number(page, "In company of", 0) == (f"expert\N{NO-BREAK SPACE}{other}", said(together[6, other]))
    moved = counts.moved
    to = int(moved[3, 6].argmax())
    assert number(page, "Goes to layer 4", 0) == (
        f"expert\N{NO-BREAK SPACE}{to}",
        said(moved[3, 6, to] / moved[3, 6].sum()),
    )
    from_ = int(moved[2, :, 6].argmax())
    share = said(moved[2, from_, 6] / moved[2, :, 6].sum())
    assert number(page, "Comes from layer 2", 0) == (f"expert\N{NO-BREAK SPACE}{from_}", share)
    words = page.locator(".words").inner_text()
    for part in (
        f"{counts.together[3, 6, 6]:,} of {sum(counts.tokens):,} tokens chose it",
        f"Its share is largest in {DOMAINS[best]} ({said(by_domain[best])})",
        f"Its most frequent company is expert {other}",
        f"comes most often from expert {from_} of layer 2",
        f"goes on most often to expert {to} of layer 4",
    ):
        assert part in words


def test_favourites_and_their_places(pages, counts):
    atlas = ExpertAtlas(counts)
    atlas.selected_layer, atlas.selected_expert = 5, 2
    page = pages(atlas)
    table = (
        analysis.vocabulary(counts.vocabulary, 2, counts.vocab)
        .query("layer == 5 and expert == 2 and lift > 1")
        .head(10)
    )
    shown = page.locator(".liked")
    expect(shown).to_have_count(len(table))
    for at, row in enumerate(table.itertuples()):
        expect(shown.nth(at)).to_have_attribute(
            "aria-label",
            f"“{row.token}”: {row.lift:.1f} times its share of all tokens; it reads {row.count} of {row.occurrences}",
        )
    for at, row in enumerate(table.itertuples()):
        shown.nth(at).click()
        kept = counts.places.experts[row.id, : min(counts.places.seen[row.id], 6), 5]
        ranks, slots = np.nonzero(kept.T == 2)  # first choices first
        slots = slots[:3]
        places = page.locator(".place")
        expect(places).to_have_count(len(slots))
        for nth, slot in enumerate(slots):
            words = [counts.vocab[n] for n in counts.places.ids[row.id, slot] if n >= 0]
            assert places.nth(nth).locator(".tokens").text_content() == "".join(words).replace("␣", " ")
            assert places.nth(nth).locator(".chip").text_content() == row.token.replace("␣", " ")
            where = f"{DOMAINS[counts.places.domains[row.id, slot]]}, {['first', 'second'][ranks[nth]]} choice"
            assert places.nth(nth).locator(".soft").inner_text() == where
    page.locator(".list").press("ArrowUp")
    expect(shown.nth(len(table) - 2)).to_have_attribute("aria-selected", "true")


def test_anything_of_its_colour_chooses_an_expert(pages, counts):
    page = pages(ExpertAtlas(counts))
    now = page.locator(".now")
    page.locator(".experts button").nth(5).click()
    expect(now).to_contain_text("Layer 0, expert 5, all domains")
    cell(page, "used", 2, 6).click()
    expect(now).to_contain_text("Layer 6, expert 2, all domains")
    share = analysis.as_shares(counts.by_domain)[1, 6, 7]
    cell(page, "reads", 2, 7).click()
    expect(now).to_contain_text(f"Layer 6, expert 7, french: {said(share)} of all choices")
    page.locator(".reads button.name", has_text="all domains").click()
    expect(now).to_contain_text("Layer 6, expert 7, all domains")
    cell(page, "company", 7, 1).click()
    expect(now).to_contain_text("Layer 6, expert 1")
    page.locator(".flow .node", has_text="3").nth(2).click()  # of the layer above
    expect(now).to_contain_text("Layer 7, expert 3")
    page.locator(".about .block", has_text="Comes from layer 6").locator("button").first.click()
    expect(now).to_contain_text("Layer 6, expert")


def test_keys_choose_too(pages, counts):
    page = pages(ExpertAtlas(counts))
    now = page.locator(".now")
    page.locator(".experts button").first.press("ArrowRight")
    expect(now).to_contain_text("Layer 0, expert 1")
    expect(page.locator(".experts button").nth(1)).to_be_focused()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(now).to_contain_text("Layer 0, expert 7")
    used = page.get_by_role("grid", name="by expert (rows) and layer (columns)")
    used.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    expect(now).to_contain_text("Layer 2, expert 6")
    expect(used).to_be_focused()
    chosen = page.locator(f"#{used.get_attribute('aria-activedescendant')}")
    assert "Expert 6 in layer 2: " in chosen.get_attribute("aria-label")
    reads = page.get_by_role("grid", name="by domain (rows)")
    reads.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    expect(now).to_contain_text("Layer 2, expert 7, french")
    own = page.locator(".about [role=grid]")
    own.press("ArrowRight")
    expect(now).to_contain_text("Layer 3, expert 7, french")
    expect(own).to_be_focused()  # although the card was drawn anew
    page.get_by_label("Layer", exact=True).press("End")
    expect(now).to_contain_text("Layer 7, expert 7, french")


def test_ranks_domains_and_hovering(pages, counts):
    atlas = ExpertAtlas(counts)
    atlas.selected_layer = 4
    page = pages(atlas)
    page.get_by_label("Domain").first.select_option("prose")
    page.get_by_role("button", name="second choices").click()
    shares = analysis.as_shares(counts.ranks)[2, :, 1]
    assert status(page).startswith(f"Layer 4, expert 0, prose: {said(shares[4, 0])} of the second choices")
    assert cell(page, "used", 3, 1).inner_text() == str(int(100 * shares[1, 3] + 0.5))
    cell(page, "reads", 3, 5).hover()
    expect(page.locator(".tip")).to_have_text(
        f"prose, layer 4: expert 5 has {said(shares[4, 5])} of the second choices. The line is even use, 12.5\N{NO-BREAK SPACE}%"
    )
    styled = cell(page, "reads", 3, 5).get_attribute("style")
    high = float(re.search(r"to top,#ED3112 ([\d.]+)%", styled)[1])
    all_shares = analysis.as_shares(counts.ranks)[:, 4, 1]
    most = max(all_shares.max(), analysis.as_shares(counts.ranks.sum(0))[4, 1].max()) * 1.04
    assert abs(high - 100 * shares[4, 5] / most) < 0.02


def test_ribbons_are_as_wide_as_what_goes(pages, counts):
    atlas = ExpertAtlas(counts)
    atlas.selected_layer, atlas.selected_expert = 3, 1
    page = pages(atlas)
    ribbons = page.locator(".ribbon.mine")
    expect(ribbons).to_have_count(16 - int((counts.moved[2, :, 1] == 0).sum() + (counts.moved[3, 1] == 0).sum()))
    gone = counts.moved[3, 1] / counts.moved[3, 1].sum()
    words = [one.get_attribute("aria-label") for one in ribbons.all()]
    for to in np.flatnonzero(gone):
        assert any(
            f"expert 1 reads in layer 3, {said(gone[to])} goes to expert {to} in layer 4" in one for one in words
        )
    ribbons.first.dispatch_event("click")
    expect(page.locator(".now")).to_contain_text("Layer 2, expert 0")


def test_dark_with_many_experts_and_domains(pages):
    domains = tuple(f"a domain with a long name, number {n}" for n in range(57))
    atlas = ExpertAtlas(made_up(32, 64, 4, domains, [f"token{n}" for n in range(500)], seq=60))
    atlas.selected_layer = 9
    page = pages(atlas, width=900, dark=True)
    assert page.locator(".mixtral-lab").get_attribute("data-theme") == "dark"
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    first, end = atlas.held
    assert end < 32
    expect(page.locator(".company .cell.more").first).to_be_visible()
    cell(page, "used", 3, 31).click()
    expect(page.locator(".now")).to_contain_text("Layer 31, expert 3, all domains: ")
    expect(page.locator(".company")).to_contain_text(f"This page holds layers {first} to {end - 1} in full")
    page.get_by_label("Domain").first.select_option(domains[5])
    expect(page.locator(".now")).to_contain_text("In a notebook all answer")


def test_dark(pages, counts):
    atlas = ExpertAtlas(counts)
    atlas.selected_layer, atlas.selected_expert, atlas.selected_domain = 2, 4, "french"
    page = pages(atlas, width=900, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_small_studies_and_strange_texts(pages):
    evil = "<img src=x onerror=alert(1)>"
    names = [evil, "שלום", *(f"token{n}" for n in range(20))]
    page = pages(ExpertAtlas(made_up(1, 4, 1, (evil,), names)))
    assert page.locator("img").count() == 0
    assert evil in page.get_by_label("Domain").first.inner_text()
    expect(page.locator(".flow")).to_contain_text("The model has one layer")
    expect(page.locator(".company")).to_contain_text("Every token has one choice only")
    assert page.get_by_role("button", name="first choices").count() == 0
    assert any(evil in page.locator(".list").inner_text() for _ in _every_expert(page))
    assert any("שלום" in page.locator(".list").inner_text() for _ in _every_expert(page))


def _every_expert(page: Page):
    for button in page.locator(".experts button").all():
        button.click()
        yield button


def test_in_jupyterlab(lab_page, counts):
    page = lab_page(COUNT, "atlas = ExpertAtlas(counts)\natlas")
    root = page.locator(".mixtral-lab.expert-atlas")
    root.wait_for()
    now = root.locator(".now")
    cell(page, "used", 4, 2).click()
    expect(now).to_contain_text("Layer 2, expert 4")
    page.keyboard.press("Escape")
    page.get_by_role("grid", name="by expert (rows)").press("ArrowDown")
    expect(now).to_contain_text("Layer 2, expert 5")
    root.get_by_label("Domain").first.select_option("french")
    chosen = evaluate(page, "print(atlas.selected_layer, atlas.selected_expert, atlas.selected_domain)")
    assert chosen == "2 5 french"
    evaluate(page, "atlas.selected_layer, atlas.selected_expert, atlas.selected_domain = 6, 1, 'prose'; print('set')")
    share = analysis.as_shares(counts.by_domain)[2, 6, 1]
    expect(now).to_contain_text(f"Layer 6, expert 1, prose: {said(share)}")
    expect(root.locator(".title")).to_have_text("expert\N{NO-BREAK SPACE}1 in layer 6, prose")
    root.get_by_label("Layer", exact=True).fill("0")
    expect(now).to_contain_text("Layer 0, expert 1, prose")
    assert evaluate(page, "print(atlas.selected_layer)") == "0"


def test_in_jupyterlab_more_layers_are_fetched(lab_page):
    page = lab_page(
        "import numpy as np\nfrom mixtral_lab.study import Counts\nfrom mixtral_lab.widgets.expert_atlas import ExpertAtlas",
        "counts = Counts('wide', 'float32', ('a', 'b'), 20, 128, 2, ['x', 'y'])\n"
        "counts.tokens, counts.texts = [10, 10], [1, 1]\n"
        "counts.ranks[:] = np.arange(1, 129)\ncounts.together[:] = 1\ncounts.moved[:] = 1\ncounts.vocabulary[:] = 2",
        "atlas = ExpertAtlas(counts)\natlas",
    )
    root = page.locator(".mixtral-lab.expert-atlas")
    root.wait_for()
    first, end = map(int, evaluate(page, "print(*atlas.held)").split())
    assert first == 0 and end < 20
    root.get_by_label("Layer", exact=True).fill("19")
    expect(root.locator(".reads h3")).to_have_text("Which domain goes to whom in layer 19")
    expect(root.locator(".reads .cell").first).to_be_visible()
    expect(root.locator(".company")).to_contain_text("A table of 128 by 128 cells could not be read")
    first, end = map(int, evaluate(page, "print(*atlas.held)").split())
    assert first > 0 and end == 20
