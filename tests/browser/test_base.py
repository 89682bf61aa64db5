"""What all widgets promise: they show, a restarted kernel leaves them readable, and a reopened notebook shows their fallbacks."""

from __future__ import annotations

from conftest import menu
from playwright.sync_api import expect

import mixtral_lab
from mixtral_lab import figures

START = """
import mixtral_lab
from mixtral_lab.study import count
from mixtral_lab.widgets import ChatPanel, ExpertAtlas, InferenceStepper, Intervene, RouterExplorer, WindowExplorer
lab = mixtral_lab.load("mini-mixtral", device="cpu")
text = "Once upon a time"
"""
WIDGETS = {
    "router-explorer": "RouterExplorer(lab.trace(text))",
    "expert-atlas": "ExpertAtlas(count(lab, {'stories': [text], 'sums': ['1 + 1 = 2']}))",
    "window-explorer": "WindowExplorer(mixtral_lab.load('mini-mistral', device='cpu'), text=text)",
    "inference-stepper": "InferenceStepper(lab, text, max_new_tokens=3)",
    "intervene": "Intervene(lab, text, max_new_tokens=3)",
    "chat-panel": "ChatPanel(lab)",
}


def test_a_restarted_kernel_leaves_every_widget_readable(lab_page, new_page, jupyter):
    page = lab_page(START, *WIDGETS.values(), height=6000)
    for name in WIDGETS:
        expect(page.locator(f".mixtral-lab.{name}")).to_be_visible()
        expect(page.locator(f".mixtral-lab.{name} > .notice")).not_to_contain_text("Python no longer answers")
    assert page.locator("[data-mixtral-lab-fallback]").count() == len(WIDGETS)
    for fallback in page.locator("[data-mixtral-lab-fallback]").all():
        expect(fallback).not_to_be_visible()

    page.keyboard.press("Control+s")
    page.wait_for_timeout(1500)
    menu(page, "Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    for name in WIDGETS:
        expect(page.locator(f".mixtral-lab.{name} > .notice")).to_contain_text("Python no longer answers")
    router = page.locator(".mixtral-lab.router-explorer")
    expect(router.locator("[role=status]").last).not_to_have_text("")
    router.get_by_role("button", name="expert 3", exact=True).click()  # what needs no model still answers
    expect(router.get_by_role("button", name="expert 3", exact=True)).to_have_attribute("aria-pressed", "true")

    address = f"{page.url.split('?')[0]}?reset&token={jupyter[1]}"
    page.close()
    again = new_page(height=6000)
    again.said.allow("widget model not found")  # JupyterLab's own word for it
    again.goto(address)
    again.locator(".jp-Notebook").wait_for(timeout=60_000)
    fallbacks = again.locator("[data-mixtral-lab-fallback]")
    expect(fallbacks).to_have_count(len(WIDGETS))
    for fallback in fallbacks.all():
        expect(fallback).to_be_visible()
        assert len(fallback.inner_text()) > 20


def test_a_figure_is_a_page_of_its_own(new_page, tmp_path):
    """plotly's own writing, with its script inside: nothing is fetched."""
    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    path = tmp_path / "figure.html"
    figures.token_layer_map(lab.trace("Once upon a time")).write_html(path, include_plotlyjs=True)
    page = new_page()
    page.goto(path.as_uri())
    expect(page.locator(".gtitle")).to_contain_text("mini-mixtral")
    assert page.locator(".heatmaplayer image, .barlayer path, .imagelayer image, .scatterlayer path").count() > 0
