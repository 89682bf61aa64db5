"""ChatPanel in a real browser: a saved page, and a conversation in JupyterLab."""

from __future__ import annotations

import re

import pytest
from conftest import evaluate
from playwright.sync_api import expect

import mixtral_lab
from mixtral_lab.widgets.chat_panel import ChatPanel

QUESTION = "Was ist <script>alert(1)</script> <b>Wüste</b>? مرحبا"
ANSWER = "Eine naïve Wüste 🙂 kostet €5 日本.\n\n```python\ndef f(x):\n    return x\n```"
CONVERSATION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "كيف حالك؟"},
    {"role": "assistant", "content": "مرحبا كيف حالك"},
]
SET_UP = """import mixtral_lab
from mixtral_lab.widgets.chat_panel import ChatPanel
lab = mixtral_lab.load("mini-mixtral", device="cpu")"""


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


def say(panel, text: str) -> None:
    """Playwright has an event loop of its own, in which nothing would go on: take all steps at once."""
    panel.drive = list
    panel.send_message(text)


def rgb(colour: str) -> str:
    return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


def colours(page, answer: int) -> list[tuple[str, str]]:
    """Text and colour of every span of an answer."""
    found = page.locator(".said.model").nth(answer).locator(".tokens span").all()
    return [
        tuple(span.evaluate("span => [span.textContent, getComputedStyle(span).backgroundColor]")) for span in found
    ]


def expected(panel, answer: int, layer: int) -> list[tuple[str, str]]:
    trace = panel.trace(answer)
    experts = trace.experts[layer, trace.n_prompt :, 0].tolist()
    texts = [turn for turn in panel.turns if turn["role"] == "assistant"][answer]["texts"]
    return [(text, rgb(panel.colours[e][0])) for text, e in zip(texts, experts, strict=True) if text]


def test_a_saved_page_shows_the_conversation_in_colours(pages, lab):
    panel = ChatPanel(lab)
    panel.messages = CONVERSATION
    page = pages(panel)
    assert page.locator(".said.user").first.inner_text() == QUESTION
    assert page.locator(".said.model .tokens").first.inner_text().split() == ANSWER.split()
    for answer in (0, 1):
        assert colours(page, answer) == expected(panel, answer, panel.selected_layer)
    page.locator(".layers input").focus()
    page.keyboard.press("ArrowRight")
    assert colours(page, 0) == expected(panel, 0, panel.selected_layer + 1)
    expect(page.locator(".layers output")).to_have_text(str(panel.selected_layer + 1))
    assert page.locator("script").count() == 2  # the state and the widget's own

    assert page.locator(".log").get_attribute("role") == "log"
    assert page.locator("button.send").count() == 0
    expect(page.locator(".lone")).to_contain_text("no model, so nothing can be sent")
    for closed in page.locator(".sampling input, .system textarea, button.routing").all():
        assert closed.is_disabled()


def test_tokens_are_told_in_words_by_pointer_and_keys(pages, lab):
    panel = ChatPanel(lab)
    panel.messages = CONVERSATION
    page = pages(panel)
    layer = panel.selected_layer
    experts = panel.trace(0).experts[:, panel.trace(0).n_prompt :, 0]
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    text = panel.turns[1]["texts"][0]
    status = page.locator(".status")
    expect(status).to_contain_text(
        f"Token 0 of the answer “{text}”: first choice in layer {layer} is expert {experts[layer, 0]}."
    )
    expect(status).to_contain_text("In layers 0 to 7: " + " ".join(map(str, experts[:, 0].tolist())))
    smile = page.locator(".tokens span", has_text="🙂").first
    smile.hover()
    at = panel.turns[1]["texts"].index(smile.inner_text())
    begun = at
    while panel.turns[1]["texts"][begun - 1] == "":
        begun -= 1
    assert begun < at
    told = ", ".join(str(int(e)) for e in experts[layer, begun : at + 1])
    expect(page.locator(".tip")).to_have_text(
        f"Tokens {begun} to {at} of the answer, together “{smile.inner_text()}”: "
        f"first choice in layer {layer} is experts {told} in turn."
    )
    page.keyboard.press("End")
    expect(page.locator(".tokens span.here")).to_have_text("```")


def test_an_answer_can_be_copied(pages, lab):
    panel = ChatPanel(lab)
    panel.messages = CONVERSATION
    page = pages(panel)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="copy").first.click()
    expect(page.locator(".status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER
    page.locator("details summary").last.click()
    assert page.locator(".reads").inner_text().startswith("<s>[INST] You are brief.")
    assert page.locator(".reads .markup").all_inner_texts()[:3] == ["<s>", "[INST]", "[/INST]"]


def test_dark_and_narrow(pages, lab):
    panel = ChatPanel(lab, max_new_tokens=40)
    panel.messages = CONVERSATION[:3]
    say(panel, "Tell me a story about a cat.")
    say(panel, "x" * 150)
    page = pages(panel, width=900, dark=True)
    assert page.locator(".chat-panel").get_attribute("data-theme") == "dark"
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    assert colours(page, 1) == expected(panel, 1, panel.selected_layer)
    log = page.locator(".log")
    high, whole, top = log.evaluate("log => [log.clientHeight, log.scrollHeight, log.scrollTop]")
    assert whole > high and abs(top + high - whole) < 3  # scrolls inside, at its end


def test_a_dense_model_has_no_colours(pages):
    panel = ChatPanel(mixtral_lab.load("mini-mistral", device="cpu"), max_new_tokens=20)
    say(panel, "Hello! Who are you?")
    page = pages(panel)
    expect(page.locator(".notice")).to_contain_text("dense model")
    assert page.locator(".said.model .tokens").inner_text().strip() == panel.messages[1]["content"]
    assert page.locator(".layers *").count() == 0 and page.locator("button.routing").count() == 0


def test_a_conversation_in_jupyterlab(lab_page, lab):
    page = lab_page(SET_UP, "panel = ChatPanel(lab, max_new_tokens=24)\npanel", height=1300)
    assert page.locator("[data-mixtral-lab-fallback]").is_hidden()
    box = page.get_by_label("Your message")
    box.click()
    page.keyboard.press("Enter")  # nothing written: nothing sent
    page.keyboard.type("Tell me a story")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("about a cat.")
    expect(page.locator(".said")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".line")).to_contain_text("wrote 24 tokens")
    expect(box).to_have_value("")
    expect(box).to_be_focused()
    question = {"role": "user", "content": "Tell me a story\nabout a cat."}
    panel = ChatPanel(lab)
    panel.messages = [question, {"role": "assistant", "content": lab.chat([question], max_new_tokens=24)}]
    assert evaluate(page, "print(panel.messages)") == str(panel.messages)
    assert colours(page, 0) == expected(panel, 0, panel.selected_layer)

    page.locator(".layers input").focus()
    page.keyboard.press("ArrowLeft")
    assert colours(page, 0) == expected(panel, 0, panel.selected_layer - 1)
    page.get_by_text("System prompt: none").click()
    page.get_by_label("System prompt").fill("You are brief.")
    page.get_by_label("temperature").focus()
    page.keyboard.press("End")
    said = evaluate(page, "print(panel.selected_layer, panel.system, panel.temperature)")
    assert said == f"{panel.selected_layer - 1} You are brief. 2.0"

    page.get_by_role("button", name="routing").click()
    expect(page.locator(".explorer .router-explorer")).to_be_visible()
    page.locator(".explorer button", has_text="Close").click()
    expect(page.locator(".explorer")).to_be_hidden()

    panel.messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Nice to meet you."}]
    evaluate(page, f"panel.messages = {panel.messages}; panel.selected_layer = 0; print()")
    assert colours(page, 0) == expected(panel, 0, 0)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".said")).to_have_count(0)
    assert evaluate(page, "print(panel.messages)") == "[]"


def test_an_answer_can_be_stopped_while_it_is_written(lab_page):
    page = lab_page(SET_UP, "panel = ChatPanel(lab, max_new_tokens=1900)\npanel")
    box = page.get_by_label("Your message")
    box.fill("Was ist die Hauptstadt von Frankreich?")
    box.press("Enter")
    page.wait_for_function("document.querySelectorAll('.writing .tokens span').length > 8")
    assert (
        page.locator(".writing .tokens span")
        .first.evaluate("span => getComputedStyle(span).backgroundColor")
        .startswith("rgb(")
    )
    assert page.locator(".log").get_attribute("aria-busy") == "true"
    assert evaluate(page, "print(panel.busy, 1 + 1)") == "True 2"  # the kernel does other things meanwhile
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".line")).to_contain_text("stopped")
    expect(box).to_be_focused()
    written = int(re.search(r"wrote ([\d,]+)", page.locator(".line").inner_text())[1].replace(",", ""))
    assert 8 < written < 1900
    said = evaluate(page, "print(panel.busy, len(panel.trace()) - panel.trace().n_prompt, len(panel.messages))")
    assert said == f"False {written} 2"
    shown = page.locator(".said.model .tokens").inner_text()
    assert evaluate(page, "print(panel.messages[-1]['content'])").split() == shown.split()
