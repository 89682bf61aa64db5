"""InferenceStepper in a browser: right tokens, bars, experts and slots at every step; steps, branches and sliders answer."""

from __future__ import annotations

import re

import pytest
from conftest import evaluate
from playwright.sync_api import expect

import mixtral_lab
from mixtral_lab.figures import expert_colour
from mixtral_lab.generate import Sampling, probabilities
from mixtral_lab.widgets.inference_stepper import InferenceStepper

STORY = "Once upon a time there was a small dog <script>alert(1)</script> who lived near the river."
LONG = "Once upon a time. The dog ran away. " * 14


@pytest.fixture(scope="module")
def stepper():
    """Eleven steps, and two branches: after step 5 and after step 7."""
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    stepper = InferenceStepper(lab, STORY, chunk=12, max_new_tokens=30, temperature=0.8, seed=2)
    stepper.forward(10)
    for step in (5, 7):
        stepper.step = step
        taken = stepper._made[stepper.path[step + 1]].token
        stepper.choose(next(c.id for c in stepper.candidates[1:] if c.id != taken))
        stepper.forward(2)
    stepper.branch, stepper.step = 0, 6
    stepper.top_p = 0.9
    return stepper


def share(p: float) -> str:
    return "> 99.9 %" if 0.9995 <= p < 1 else "< 0.1 %" if 0 < p < 0.001 else f"{100 * p:.1f} %"


def about(words: str, per_cent: float) -> bool:
    """Whether a share is what the page says, but for what it does not know: the unlikely tokens one by one."""
    if "cut" in words:
        return per_cent < 1
    return abs(float(re.sub(r"[<>%\s]", "", words)) - per_cent) <= 0.1 + 0.02 * per_cent


def rows(page) -> list[list[str]]:
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    return page.locator(".candidates tbody tr").evaluate_all(cells)


def test_a_step_is_shown(pages, stepper):
    page = pages(stepper)
    expect(page.get_by_role("slider", name="Step", exact=True)).to_have_value("6")
    expect(page.locator(".strip [aria-current=step]")).to_have_text(
        "Decode: token 3" if stepper.phase == "decode" else ""
    )
    expect(page.locator(".says")).to_contain_text(f"“{stepper.tokens[-1]}”, drawn")
    tokens = page.locator(".tokens .token")
    assert tokens.all_text_contents() == [token.replace("␣", " ") for token in stepper.tokens]
    assert page.locator(".tokens .flying").all_text_contents() == [stepper.tokens[-1].replace("␣", " ")]
    assert page.locator(".tokens .cached").count() == len(stepper.tokens) - 1
    for row, candidate in zip(rows(page), stepper.candidates[:10], strict=False):
        assert row[1].removesuffix(" ◂ taken") == candidate.token
        assert row[2] == share(candidate.raw)
        assert row[3] == (share(candidate.adjusted) if candidate.adjusted else "cut by top-p")
    taken = page.locator(".candidates button.mine")
    following = stepper._made[stepper.path[7]].token
    expect(taken).to_have_text(stepper._piece(following))
    fills = page.locator(".grid rect[data-expert]").evaluate_all(
        "all => all.map(one => [+one.dataset.expert, one.getAttribute('fill')])"
    )
    assert fills == [[e, expert_colour(e)] for e in stepper.experts.flatten().tolist()]
    slots = int(stepper.frame()["cache_slots"][6])
    expect(page.get_by_role("region", name="Cache").locator("p")).to_contain_text(
        f"{slots} of {stepper.about['ring']} slots filled"
    )
    assert page.locator(".bars g.step").count() == len(stepper.path)
    expect(page.locator(".bars g.here")).to_have_attribute("data-step", "6")


def test_bars_are_as_long_as_they_say(pages, stepper):
    page = pages(stepper)
    widths = page.locator(".candidates .raw i").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    shares = [c.raw for c in stepper.candidates[:10]]
    longest = widths[0] / shares[0]
    for width, p in zip(widths[:10], shares, strict=True):
        assert width == pytest.approx(max(1, longest * p), abs=0.6)


def test_walking_without_a_model(pages, stepper):
    """Every recorded step of every branch, from the page's own numbers alone."""
    page = pages(stepper)
    for name in ("Draw with these settings", "Take it"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()
    expect(page.locator(".candidates button").first).to_be_disabled()
    expect(page.locator(".alone")).to_contain_text("need the model")
    page.get_by_role("button", name="Back").click()
    for branch, step in ((0, 5), (0, 1), (1, 7), (2, 8), (0, 10)):
        stepper.branch, stepper.step = branch, step
        page.locator(f".branches [data-branch='{branch}']").click()
        page.locator(f".bars [data-step='{step}'] .back").dispatch_event("click")
        expect(page.get_by_role("slider", name="Step", exact=True)).to_have_value(str(step))
        shown = page.locator(".tokens .flying").all_text_contents()
        assert shown == [stepper._piece(i).replace("␣", " ") for i in stepper._at.ids]
        assert [row[2] for row in rows(page)[:10]] == [share(c.raw) for c in stepper.candidates[:10]]
        for row, candidate in zip(rows(page)[:10], stepper.candidates, strict=False):
            assert about(row[3], 100 * candidate.adjusted)
        experts = page.locator(".grid rect[data-expert]").evaluate_all("all => all.map(one => +one.dataset.expert)")
        assert experts == stepper.experts.flatten().tolist()
    page.locator(".bars [data-step='0'] .back").dispatch_event("click")
    expect(page.get_by_role("button", name="Back")).to_be_disabled()
    expect(page.get_by_role("region", name="Next token")).to_contain_text("Nothing yet")
    page.get_by_role("button", name="Step ▶").click()
    expect(page.get_by_role("slider", name="Step", exact=True)).to_have_value("1")
    expect(page.locator(".strip [aria-current=step]")).to_contain_text("Prefill: chunk 1")
    stepper.branch, stepper.step = 0, 6


def test_sliders_work_without_a_model(pages, stepper):
    """What the page computes from the likeliest tokens is what `generate.probabilities` gives, where they are enough."""
    page = pages(stepper)
    raw = {c.id: c.raw for c in stepper.candidates}
    settings = ((0.5, 8, 1.0), (2.0, 5, 0.7), (1.0, None, 0.6), (1.3, None, 1.0), (2.0, None, 0.9), (0.0, None, 1.0))
    for temperature, top_k, top_p in settings:
        for label, value in (("Temperature", temperature), ("Top-k", top_k or 41), ("Top-p", top_p)):
            page.get_by_role("slider", name=label).fill(str(value))
        expected = probabilities(stepper.logits[None], Sampling(temperature, top_p, top_k))[0]
        for row, token in zip(rows(page)[:10], raw, strict=False):
            p, place = float(expected[token]), int(row[0])
            by = "cut: greedy" if not temperature else "cut by top-k" if top_k and place > top_k else "cut by top-p"
            assert about(row[3], 100 * p) if p else row[3] == by
    page.get_by_role("slider", name="Temperature").fill("1.5")
    expect(page.locator(".effect")).to_contain_text("knows the 40 likeliest tokens one by one")


def test_playing_a_saved_page(pages, stepper):
    stepper.step, stepper.speed = 7, 30.0
    page = pages(stepper)
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("slider", name="Step", exact=True)).to_have_value("10")
    expect(page.get_by_role("button", name="Play")).to_be_disabled()
    stepper.step, stepper.speed = 6, 4.0


def test_keys(pages, stepper):
    stepper.step = 2
    page = pages(stepper)
    grid = page.locator(".grid")
    grid.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    read = stepper.frame()["first"][2]
    token = stepper.tokens[read + 1]
    first, second = stepper.experts[2, 1].tolist()
    shares = [round(100 * w) for w in stepper._at.weights[2, 1].tolist()]
    words = f"Layer 2, “{token}” at {read + 1}: expert {first} ({shares[0]} %), expert {second} ({shares[1]} %)."
    expect(page.get_by_role("region", name="Experts").locator("p[role=status]")).to_have_text(words)
    page.get_by_role("slider", name="Step", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".bars g.here")).to_have_attribute("data-step", "3")
    stepper.step = 6


def test_dark_and_narrow_and_dense(pages):
    """A dense model past its window, in the dark, 900 pixels wide."""
    lab = mixtral_lab.load("mini-mistral", device="cpu")
    stepper = InferenceStepper(lab, LONG, chunk=64, max_new_tokens=40, temperature=1.0, top_k=12)
    stepper.forward(3)
    page = pages(stepper, width=900, dark=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    assert page.locator(".mixtral-lab").get_attribute("data-theme") == "dark"
    expect(page.locator(".notice")).to_contain_text("dense model")
    expect(page.get_by_role("region", name="Experts")).to_contain_text("no router chooses")
    end, ring = stepper._at.end, stepper.about["ring"]
    assert page.locator(".tokens .gone").count() == end - ring
    assert page.locator(".tokens .flying").count() == end - stepper._at.start
    assert page.locator(".tokens .waiting").count() == len(stepper.ids) - end
    lost = f"overwrote positions {max(0, stepper._at.start - ring)} to {end - ring - 1}"
    expect(page.get_by_role("region", name="Cache")).to_contain_text(lost)


def test_light_prefill_of_a_mixture(pages, stepper):
    stepper.step = 1
    page = pages(stepper, width=900)
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    expect(page.get_by_role("region", name="Time and memory")).to_contain_text("Why a given token is cheap")
    stepper.step = 6


def test_odd_text_is_text(pages):
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    stepper = InferenceStepper(lab, "<img src=x onerror=alert(1)> שלום 🙂", chunk=9)
    stepper.forward(4)
    page = pages(stepper)
    assert page.locator(".tokens img, .branches img").count() == 0
    assert "".join(page.locator(".tokens .token").all_text_contents()).startswith("<s><img src=x")


def test_in_jupyterlab(lab_page):
    """Buttons, sliders and candidates move the model; Python moves the picture; play can be paused."""
    page = lab_page(
        "import mixtral_lab\nfrom mixtral_lab.widgets.inference_stepper import InferenceStepper\n"
        "lab = mixtral_lab.load('mini-mixtral', device='cpu')\n"
        "w = InferenceStepper(lab, 'Once upon a time there was', chunk=4, max_new_tokens=40)\nw",
        width=1300,
        height=1500,
    )
    step = page.get_by_role("slider", name="Step", exact=True)
    forward = page.get_by_role("button", name="Step ▶")
    for number in ("1", "2", "3"):
        forward.click()
        expect(step).to_have_value(number)
    assert evaluate(page, "print(w.step, w.phase, w.tokens[-1])").split()[:2] == ["3", "decode"]
    page.get_by_role("slider", name="Temperature").fill("0.7")
    third = page.locator(".candidates tbody button").nth(2)
    name = third.inner_text()
    third.click()
    expect(step).to_have_value("4")
    expect(page.locator(".tokens .flying")).to_have_text(name.replace("␣", " "))
    assert evaluate(page, "print(w.temperature, w.tokens[-1])") == f"0.7 {name}"

    page.get_by_role("button", name="Back").click()
    other = page.locator(".candidates tbody button").nth(1)
    expect(other).to_be_enabled()
    expect(page.locator(".candidates button.mine")).to_have_text(name)
    other.click()
    expect(page.locator(".branches button")).to_have_count(2)
    expect(page.locator(".branches button").nth(1)).to_have_attribute("aria-pressed", "true")
    assert evaluate(page, "print(w.branch, w.step, len(w.branches))") == "1 4 2"
    page.get_by_label("Another token to take next").fill("nonsense words")
    page.get_by_role("button", name="Take it").click()
    expect(page.locator(".notice")).to_contain_text("is not one token")

    page.get_by_role("button", name="Play").click()
    expect(step).to_have_value(re.compile("[6-9]|1."))
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    assert evaluate(page, "print(w.playing, w.step == len(w.path) - 1)") == "False True"
    page.wait_for_timeout(600)
    reached = int(step.input_value())
    assert evaluate(page, "print(w.step)") == str(reached)

    assert evaluate(page, "w.branch = 0; w.step = 2; w.top_k = 3; print(w.step)") == "2"
    expect(step).to_have_value("2")
    expect(page.locator(".candidates .cut")).to_have_count(7)
    wanted = evaluate(page, "print([c.token for c in w.candidates[:10]])")
    assert str(page.locator(".candidates tbody button").all_inner_texts()) == wanted
    fresh = (
        "import torch; w.forward(); w.choose(w.candidates[5].id)\n"
        "d = lab.logits(torch.tensor([w.ids]))[0, -1] - w.logits\nprint(float(d.abs().max()) < 1e-4)"
    )
    assert evaluate(page, fresh) == "True"
