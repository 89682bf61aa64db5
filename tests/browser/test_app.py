"""`mixtral-lab app` in a real browser: a conversation, the routing beside it, nothing from other machines."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from playwright.sync_api import expect
from test_chat_panel import colours, rgb

import mixtral_lab
from mixtral_lab.figures import expert_colour

STORY, WHO = "Tell me a story about a cat.", "Who are you?"


class Server:
    def __init__(self, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.words = f"http://127.0.0.1:{self.port}", words
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mixtral_lab.cli",
            "app",
            *self.words,
            "--port",
            str(self.port),
            "--no-open",
            "--device",
            "cpu",
        ]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert self.address in self.process.stderr.readline()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def started(*words: str) -> Server:
            server = Server(*words)
            stack.callback(lambda: (server.process.kill(), server.process.wait()))
            return server

        yield started


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


def visit(page, server: Server):
    page.goto(server.address)
    page.locator(".chat-panel").wait_for()
    return page


def ask(page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def at_most(page, tokens: int) -> None:
    page.locator(".sampling input[type=number]").last.fill(str(tokens))
    page.keyboard.press("Tab")


def test_an_answer_streams_and_its_routing_stands_beside_it(new_page, serve, lab):
    page = visit(new_page(width=1400, height=900), serve())
    expect(page).to_have_title("A conversation with mini-mixtral")
    assert page.locator("link[rel=icon]").get_attribute("href").startswith("data:")
    expect(page.get_by_label("Your message")).to_be_focused()
    page.evaluate(
        """() => { window.lengths = []; new MutationObserver(() => {
            const live = document.querySelector(".writing .tokens");
            if (live) window.lengths.push(live.children.length);
        }).observe(document.querySelector(".log"), { childList: true, subtree: true }); }"""
    )
    at_most(page, 40)
    ask(page, STORY)
    page.locator(".router-explorer").wait_for()
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 20 and lengths == sorted(lengths)  # token by token

    question = {"role": "user", "content": STORY}
    answer = lab.chat([question], max_new_tokens=40)
    trace = lab.trace_ids(lab.tokenizer.chat([question]), 40)
    shown = page.locator(".said.model .tokens")
    assert shown.inner_text().split() == answer.split()
    middle = lab.config.n_layers // 2
    experts = trace.experts[middle, trace.n_prompt :, 0].tolist()
    assert [colour for _, colour in colours(page, 0)] == [rgb(expert_colour(e)) for e in experts]

    at = trace.n_prompt + 5
    page.locator(".router-explorer .tokens span").nth(at).click()
    first = int(trace.experts[middle, at, 0])
    expect(page.locator(".router-explorer")).to_contain_text(
        f"Token {at}, “{trace.tokens[at]}” (id {trace.ids[at]}), written by the model. Layer {middle}: expert {first} takes"
    )
    left, right = (page.locator(name).bounding_box() for name in (".log", ".router-explorer"))
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 120  # side by side
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400

    ask(page, WHO)
    expect(page.locator(".line")).to_have_count(2)
    expect(page.locator(".router-explorer")).to_contain_text("11 written by the model")
    page.locator("button.routing").first.click()
    expect(page.locator(".router-explorer")).to_contain_text(f"{len(trace) - trace.n_prompt} written by the model")


def test_narrow_and_dark_and_a_second_page_sees_the_same(new_page, serve):
    server = serve()
    page = visit(new_page(width=900, dark=True), server)
    ask(page, WHO)
    page.locator(".router-explorer").wait_for()
    assert page.locator(".chat-panel").get_attribute("data-theme") == "dark"
    assert page.locator(".router-explorer").get_attribute("data-theme") == "dark"
    assert page.evaluate("document.documentElement.scrollWidth") <= 900
    above, below = (page.locator(name).bounding_box() for name in (".log", ".router-explorer"))
    assert above["y"] + above["height"] <= below["y"]
    assert page.evaluate("scrollY") == 0  # a new answer does not take the reader away from the conversation

    other = visit(new_page(width=1400), server)
    assert other.locator(".said.model .tokens").inner_text() == page.locator(".said.model .tokens").inner_text()
    other.locator(".router-explorer").wait_for()
    other.locator(".layers input").focus()
    other.keyboard.press("ArrowRight")
    expect(page.locator(".layers output")).to_have_text("5")
    assert colours(page, 0) == colours(other, 0)
    page.get_by_role("button", name="Clear").click()
    for one in (page, other):
        expect(one.locator(".said")).to_have_count(0)
        expect(one.locator(".router-explorer")).to_have_count(0)


def test_stop_and_restart(new_page, serve):
    server = serve()
    page = visit(new_page(), server)
    at_most(page, 1900)
    page.get_by_label("temperature").focus()
    page.keyboard.press("End")
    ask(page, STORY)
    page.locator(".writing .tokens span").nth(8).wait_for()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".line")).to_contain_text("stopped")
    page.locator(".router-explorer").wait_for()

    kept = page.locator(".said.model .tokens").inner_text()
    page.reload()
    expect(page.locator(".said.model .tokens")).to_have_text(kept, use_inner_text=True)

    ask(page, STORY)
    page.locator(".writing .tokens span").nth(8).wait_for()
    page.said.allow("Failed to load resource: net::ERR_")  # whatever it asks while nobody is there
    server.stop()  # in the middle of an answer
    expect(page.locator(".chat-panel > .notice")).to_contain_text("The server has stopped. What is shown stays")
    server.start()
    page.reload()
    expect(page.locator(".log")).to_contain_text("Nothing has been said yet")
    ask(page, WHO)
    expect(page.locator(".line")).to_contain_text("ended by itself")


def test_a_dense_model(new_page, serve):
    page = visit(new_page(), serve("mini-mistral"))
    expect(page.locator(".notice")).to_contain_text("dense model")
    ask(page, WHO)
    expect(page.locator(".line")).to_contain_text("wrote")
    assert page.locator(".router-explorer").count() == 0
