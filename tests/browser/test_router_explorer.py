"""RouterExplorer in a real browser: what it shows and answers is what the trace holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import SCREENSHOTS, evaluate
from playwright.sync_api import expect

import mixtral_lab
from mixtral_lab.analysis import near_tie_margin, router_probabilities
from mixtral_lab.edit import ablate
from mixtral_lab.figures import expert_colour
from mixtral_lab.model.moe import route
from mixtral_lab.trace import Trace
from mixtral_lab.widgets import router_explorer
from mixtral_lab.widgets.router_explorer import RouterExplorer

PROMPT = "Once upon a time there was a little dog"
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def trace(lab):
    return lab.trace(PROMPT, max_new_tokens=40)


@pytest.fixture(scope="module")
def after(lab, trace):
    with lab.edit(ablate(2, int(trace.experts[2, 5, 0]), how="next_best")):
        return lab.trace(PROMPT, max_new_tokens=40)


def made_up(tokens=40, layers=4, experts=8, choices=2, words=("␣the", "␣dog", "s", "␣ran", "⏎")) -> Trace:
    generator = torch.Generator().manual_seed(1)
    routing = route(torch.randn(layers, tokens, experts, generator=generator) * 1.5, choices)
    texts = [words[at % len(words)] for at in range(tokens)]
    return Trace.from_arrays(texts, routing.experts, routing.weights, routing.logits, model="made-up", dtype="float32")


def said(page) -> str:
    return page.locator(".said").inner_text().replace("\u00a0", " ")


def decision(trace: Trace, layer: int, token: int) -> str:
    pairs = zip(trace.experts[layer, token].tolist(), trace.routing.weights[layer, token].tolist(), strict=True)
    shares = [f"expert {expert} takes {int(100 * weight + 0.5)} %" for expert, weight in pairs]
    return " and ".join([", ".join(shares[:-1]), shares[-1]] if len(shares) > 1 else shares)


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


def colours(page, pane: int = 0) -> list[str]:
    spans = page.locator(".text").nth(pane).locator(".tokens span")
    return spans.evaluate_all("spans => spans.map(span => span.style.backgroundColor)")


def click_cell(page, layers: int, n: int, layer: int, token: int, pane: int = 0) -> None:
    """Click into a cell of the grid, of which all columns are in view."""
    canvas = page.locator("canvas").nth(pane)
    rows = page.locator(".map ol").nth(pane).bounding_box()
    box = canvas.bounding_box()
    canvas.click(
        position={"x": (token + 0.5) * box["width"] / n, "y": (layers - layer - 0.5) * rows["height"] / layers}
    )


def test_clicks_keys_and_chips(pages, trace):
    layers, seq = trace.experts.shape[:2]
    page = pages(RouterExplorer(trace), width=1200)
    layer = (layers - 1) // 2
    assert colours(page) == [rgb(expert_colour(e)) for e in trace.experts[layer, :, 0].tolist()]
    assert decision(trace, layer, 1) in said(page) and "given in the prompt" in said(page)

    click_cell(page, layers, seq, 5, 20)
    expect(page.locator(".said")).to_contain_text("Token 20, ")
    assert f"“{trace.tokens[20]}” (id {trace.ids[20]}), written by the model" in said(page)
    assert f"Layer 5: {decision(trace, 5, 20)}." in said(page)
    assert colours(page) == [rgb(expert_colour(e)) for e in trace.experts[5, :, 0].tolist()]
    expect(page.locator(".tokens .at")).to_have_text(trace.tokens[20].replace("␣", " "), use_inner_text=False)

    # The bars: logit, probability and weight of every expert.
    logits = trace.routing.logits[5, 20].numpy()
    chances = router_probabilities(logits[None, None])[0, 0]
    chosen = trace.experts[5, 20].tolist()
    for expert, row in enumerate(page.locator(".bars tbody tr").all()):
        logit, chance, weight = row.locator("b").all_inner_texts()
        assert float(logit.replace(MINUS, "-")) == pytest.approx(float(logits[expert]), abs=0.0056)
        assert chance.replace("\u00a0", " ") in (f"{int(100 * chances[expert] + 0.5)} %", "< 1 %")
        width = float(row.locator("i").nth(1).evaluate("bar => parseFloat(bar.style.width)"))
        assert width == pytest.approx(100 * chances[expert], abs=0.1)
        won = row.evaluate("row => row.classList.contains('won')")
        assert won == (expert in chosen) and bool(weight) == won
        assert row.locator(".chip").evaluate("chip => chip.style.backgroundColor") == rgb(expert_colour(expert))

    # Keys on the grid, then in the text.
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    expect(page.locator(".said")).to_contain_text("Token 21, ")
    assert f"Layer 6: {decision(trace, 6, 21)}." in said(page)
    page.keyboard.press("End")
    expect(page.locator(".said")).to_contain_text(f"Token {seq - 1}, ")
    page.locator(".tokens span").nth(3).click()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".said")).to_contain_text("Token 2, ")
    assert f"Layer 5: {decision(trace, 5, 2)}." in said(page)
    assert page.evaluate("document.activeElement.classList.contains('at')")

    # An expert stands out; Escape lets go.
    expert = int(trace.experts[5, 2, 1])
    page.get_by_role("button", name=f"expert {expert}", exact=True).click()
    first, second = trace.experts[5, :, 0].numpy() == expert, trace.experts[5, :, 1].numpy() == expert
    spans = page.locator(".tokens span")
    faded = spans.evaluate_all("spans => spans.map(span => span.classList.contains('faded'))")
    np.testing.assert_array_equal(faded, ~(first | second))
    firsts, all_ = (trace.experts[..., 0] == expert).sum(), layers * seq
    expect(page.locator(".share")).to_contain_text(f"first choice in {firsts} of {all_} decisions")
    page.keyboard.press("Escape")
    expect(page.locator(".tokens .faded")).to_have_count(0)


def test_the_grid_has_the_experts_colours(pages, trace):
    """A cell's upper part is its first choice, its lower part the second; the fainter, the less weight."""
    layers, seq = trace.experts.shape[:2]
    page = pages(RouterExplorer(trace), width=1400)
    pixel = """([token, layer, part, n, layers]) => {
      const canvas = document.querySelector("canvas"), rows = document.querySelector(".map ol").offsetHeight;
      const x = (token + 0.2) * canvas.clientWidth / n, y = (layers - 1 - layer + part) * rows / layers;
      const ratio = canvas.width / canvas.clientWidth;
      return [...canvas.getContext("2d").getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data].slice(0, 3);
    }"""
    for layer, token in ((0, 20), (3, 30), (7, 11), (layers - 1, seq - 2)):
        for choice, part in ((0, 0.3), (1, 0.85)):
            found = page.evaluate(pixel, [token, layer, part, seq, layers])
            colour = expert_colour(int(trace.experts[layer, token, choice]))
            share = 0.25 + 0.75 * float(trace.routing.weights[layer, token, choice])
            wanted = [share * int(colour[at : at + 2], 16) + (1 - share) * 255 for at in (1, 3, 5)]
            assert found == pytest.approx(wanted, abs=1.5), (layer, token, choice)


def test_neighbours_near_ties_and_search(pages, trace):
    layers, seq = trace.experts.shape[:2]
    margins = near_tie_margin(trace.routing.logits.numpy(), 2)
    explorer = RouterExplorer(trace)
    layer, token = np.argwhere(margins < 0.01)[3].tolist()
    explorer.selected_layer, explorer.selected_token, explorer.search = layer, token, "a"
    page = pages(explorer, width=1200)
    expect(page.locator(".tie")).to_contain_text(f"with only {100 * margins[layer, token]:.1f} points")
    layer, token = np.argwhere(margins > 0.05)[0].tolist()
    page.locator("fieldset label").nth(layer).click()
    page.locator(".tokens span").nth(token).click()
    expect(page.locator(".tie")).to_have_count(0)
    expect(page.get_by_text("No near-tie:")).to_contain_text(f"{100 * margins[layer, token]:.1f} points")

    # The longest row of tokens with one first choice.
    first = trace.experts[:, :, 0].numpy()
    rows = [
        (end - start, layer, start)
        for layer in range(layers)
        for start in range(seq)
        for end in range(start + 1, seq + 1)
        if (first[layer, start:end] == first[layer, start]).all()
    ]
    length, layer, start = max(rows)
    page.locator("fieldset label").nth(layer).click()
    page.locator(".tokens span").nth(start + 1).click()
    expect(page.locator(".tokens .run")).to_have_count(length)
    here, beyond = int(first[layer, start]), f"{length - 2} token{'' if length == 3 else 's'}"
    assert (
        f"Expert {here} is also first choice of 1 token just before and {beyond} just after"
        in page.locator("section.card").inner_text()
    )
    same = (first[:, start + 1] == here).sum()
    expect(page.locator(".strip .same")).to_have_count(int(same))

    field = page.get_by_role("searchbox")
    field.fill("THE")
    hits = [at for at, token in enumerate(trace.tokens) if "the" in token.lower()]
    expect(page.locator("output.soft")).to_contain_text("matches")
    assert len(hits) > 1
    for _ in hits:
        field.press("Enter")
        token = int(page.locator(".said").inner_text().split(",")[0].removeprefix("Token "))
        assert token in [at for hit in hits for at in (hit - 1, hit)]
    field.fill("no such word")
    expect(page.locator("output.soft")).to_have_text("no match")


def test_before_and_after_an_edit_dark_and_narrow(pages, trace, after):
    seq = min(len(trace), len(after))
    explorer = RouterExplorer(trace, after, names=("before", "after"))
    explorer.selected_layer = 3
    page = pages(explorer, width=900, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    assert page.locator(".mixtral-lab").get_attribute("data-theme") == "dark"
    changed = (trace.experts[:, :seq].sort(-1).values != after.experts[:, :seq].sort(-1).values).any(-1).numpy()
    expect(page.locator(".compared")).to_contain_text(
        f"take other experts in {changed.sum()} of {changed.size} decisions"
    )
    for pane in range(2):
        spans = page.locator(".text").nth(pane).locator(".tokens span")
        marked = spans.evaluate_all("spans => spans.map(span => span.classList.contains('differs'))")
        np.testing.assert_array_equal(marked[:seq], changed[3])
    page.get_by_role("button", name="Next difference").click()
    token = int(np.flatnonzero(changed[3])[np.flatnonzero(changed[3]) > 1][0])
    expect(page.locator(".said")).to_contain_text("Other experts.")
    assert said(page).startswith(f"Token {token}, layer 3.")
    assert decision(trace, 3, token) in said(page) and decision(after, 3, token) in said(page)
    expect(page.locator(".tokens .at")).to_have_count(2)


def test_two_texts_side_by_side(pages, lab):
    one, other = lab.trace("The cat sat on the mat."), lab.trace("Un chat.")
    page = pages(RouterExplorer(one, other, ("English", "French")), width=1300)
    boxes = [page.locator(".map").nth(pane).bounding_box() for pane in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    expect(page.locator(".compared")).to_contain_text("compared by position")
    page.locator(".text").first.locator(".tokens span").last.click()
    expect(page.locator("section.card").nth(1)).to_contain_text(f"only {len(other)} tokens")


@pytest.mark.parametrize(
    "kind", ["dense", "no numbers", "one token", "64 experts", "300 experts", "markup", "right to left"]
)
def test_odd_traces(pages, kind):
    few = made_up(12)
    made = {
        "dense": lambda: mixtral_lab.load("mini-mistral", device="cpu").trace("Once upon a time"),
        "no numbers": lambda: Trace.from_arrays(few.tokens, few.experts),
        "one token": lambda: made_up(1, 1, 4, 1),
        "64 experts": lambda: made_up(120, 6, 64, 8),
        "300 experts": lambda: made_up(60, 3, 300),
        "markup": lambda: made_up(words=("<script>window.hacked = 1</script>", "<img src=x onerror=alert(1)>")),
        "right to left": lambda: made_up(words=("<s>", "שלום", "␣עולם", "⏎", "␣مرحبا", "🙂")),
    }[kind]()
    page = pages(RouterExplorer(made), width=900)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    spans = page.locator(".tokens span")
    assert spans.all_text_contents() == [token.replace("␣", " ") for token in made.tokens]
    if kind == "dense":
        expect(page.locator(".notice")).to_contain_text("dense model")
        expect(page.locator("canvas")).to_have_count(0)
        return
    spans.last.click()
    expect(page.locator(".said")).to_contain_text(f"Token {len(made) - 1}, ")
    chosen = made.experts[(made.n_layers - 1) // 2, -1].tolist()
    if kind == "no numbers":
        expect(page.locator(".notice")).to_contain_text("weights were not recorded")
        assert f"experts {chosen[0]} and {chosen[1]} take the token" in said(page)
    else:
        assert decision(made, (made.n_layers - 1) // 2, len(made) - 1) in said(page)
    if "experts" in kind:  # the chosen ones stand first; the others scroll inside the card
        chips = page.locator(".bars tbody tr:visible .chip")
        assert list(map(int, chips.all_inner_texts()))[: len(chosen)] == chosen
        assert page.locator(".bars").bounding_box()["height"] < 400
        before = chips.count()
        page.locator(".bars").evaluate("box => { box.scrollTop = box.scrollHeight; }")
        page.wait_for_function(
            "n => [...document.querySelectorAll('.bars tbody tr')].filter(row => !row.hidden).length > n", arg=before
        )
    if kind == "markup":
        assert page.evaluate("window.hacked") is None and page.locator(".mixtral-lab img").count() == 0


def test_a_large_grid_answers(pages):
    """512 tokens x 32 layers x 8 experts: how many ms a click takes is printed, not asserted."""
    made = made_up(512, 32)
    page = pages(RouterExplorer(made), width=1200)
    watch = page.context.new_cdp_session(page)
    watch.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        metrics = watch.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    before = busy()
    times = page.evaluate("""async () => {
      const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect(), times = [];
      for (let at = 0; at < 30; at++) {
        const event = { clientX: box.left + box.width * (at * 37 % 100) / 100, clientY: box.top + 350 * (at * 53 % 100) / 100 };
        const start = performance.now();
        canvas.dispatchEvent(new MouseEvent("click", { ...event, bubbles: true }));
        await Promise.resolve();
        document.body.offsetHeight;  // laid out
        times.push(performance.now() - start);
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
      }
      return times.sort((a, b) => a - b);
    }""")
    cpu = 1000 * (busy() - before) / 30
    print(
        f"\na click of 512 x 32 x 8: laid out after {times[15]:.1f} ms (median; {times[0]:.1f} to {times[-1]:.1f}); "
        f"{cpu:.1f} ms of the page's processor time, painting included"
    )
    scroller = page.locator(".scroller")
    assert scroller.evaluate("box => box.scrollWidth > box.clientWidth")
    page.locator(".tokens span").last.click()
    expect(page.locator(".said")).to_contain_text("Token 511, ")
    layer = int(page.locator(".said").inner_text().split("Layer ")[1].split(":")[0])
    assert decision(made, layer, 511) in said(page)
    assert scroller.evaluate("box => box.scrollLeft > 0")


def test_a_page_says_what_was_too_much_for_it(pages, monkeypatch):
    monkeypatch.setattr(router_explorer, "MOST_IN_PAGE", 20_000)
    made = made_up(300, 8)
    page = pages(RouterExplorer(made), width=900)
    expect(page.get_by_text("Logits and probabilities were left out of this page")).to_be_visible()
    assert decision(made, 3, 1) in said(page)
    monkeypatch.setattr(router_explorer, "MOST_IN_PAGE", 5_000)
    page = pages(RouterExplorer(made), width=900)
    expect(page.locator(".parts")).to_contain_text("of 300. The others were left out of this page")
    expect(page.get_by_role("button", name="Later")).to_be_disabled()


def test_without_javascript(browser, trace, tmp_path):
    path = RouterExplorer(trace).save_html(tmp_path / "page.html")
    context = browser.new_context(java_script_enabled=False, viewport={"width": 900, "height": 900})
    page = context.new_page()
    page.goto(path.as_uri())
    page.screenshot(path=SCREENSHOTS / "test_router_explorer-without-javascript.png", full_page=True)
    expect(page.locator("svg")).to_be_visible()
    texts = [token.replace("␣", " ") for token in trace.tokens]
    assert page.locator("main div > span").all_text_contents() == texts
    context.close()


def test_in_jupyterlab(lab_page, trace):
    """Two cells: a story, and a trace too large for a notebook, whose numbers come from Python when a token is chosen."""
    page = lab_page(
        "import mixtral_lab, torch\nfrom mixtral_lab.model.moe import route\nfrom mixtral_lab.trace import Trace\n"
        "from mixtral_lab.widgets import RouterExplorer\n"
        f"trace = mixtral_lab.load('mini-mixtral', device='cpu').trace({PROMPT!r}, max_new_tokens=40)\n"
        "explorer = RouterExplorer(trace)\nexplorer",
        "r = route(torch.randn(16, 12000, 8), 2)\n"
        "long = RouterExplorer(Trace.from_arrays([f'␣{n}' for n in range(12000)], *r[1:], r.logits))\nlong",
        width=1300,
        height=1000,
    )
    first, second = (page.locator(".mixtral-lab").nth(at) for at in range(2))
    first.locator(".tokens span").nth(9).click()
    page.keyboard.press("ArrowUp")
    first.get_by_role("button", name="expert 3", exact=True).click()
    first.get_by_role("searchbox").fill("dog")
    line = "print(explorer.selected_token, explorer.selected_layer, explorer.selected_expert, explorer.search)"
    layer = (trace.n_layers - 1) // 2 + 1
    assert evaluate(page, line) == f"9 {layer} 3 dog"

    second.get_by_role("button", name="Later").click()
    expect(second.locator(".said")).not_to_contain_text("Token 1,")
    line = """explorer.selected_token, explorer.selected_layer, explorer.selected_expert = 12, 6, None
print([long.part["start"], *(round(float(x), 2) for x in r.logits[long.selected_layer, long.selected_token])])"""
    start, *logits = json.loads(evaluate(page, line))
    assert 1000 < start <= 8192
    expect(second.locator(".said")).to_contain_text(f"Token {start}, “␣{start}”")
    expect(second.locator(".bars tbody b").first).not_to_have_text("–")
    shown = [row.locator("b").first.inner_text() for row in second.locator(".bars tbody tr").all()]
    assert [float(text.replace(MINUS, "-")) for text in shown] == pytest.approx(logits, abs=0.011)

    expect(first.locator(".said")).to_contain_text("Token 12, ")
    assert decision(trace, 6, 12) in said(first)
    expect(first.locator(".tokens .faded")).to_have_count(0)
    first.scroll_into_view_if_needed()
