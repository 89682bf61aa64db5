"""A real browser, and a real JupyterLab on loopback, for the widgets. Both watch for errors and for requests that leave.

`pages(widget)` opens what `widget.save_html` wrote, from file:// with no kernel. `lab_page(code, ...)` runs cells of a new
notebook in JupyterLab and waits until they are done. Screenshots go to tests/browser/screenshots (not kept in git).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).parent
SCREENSHOTS = HERE / "screenshots"
CANDIDATES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# What JupyterLab itself says on the console, whatever the notebook.
HARMLESS = ("favicon", "Download the React DevTools", "ResizeObserver loop")

expect.set_options(timeout=20_000)


@pytest.fixture(scope="session")
def browser():
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, CANDIDATES)), None)
    if found is None:
        pytest.fail(
            "No Chromium found. On Debian: apt-get install chromium. Elsewhere install Chrome or Chromium, and name it: "
            "BROWSER_PATH=/path/to/chrome make test-browser"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


class Watched:
    """What a page said on its console and asked of the network."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.allowed: list[str] = list(HARMLESS)
        self.outside: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "file://", "data:", "blob:", "about:")):
            self.outside.append(url)

    def allow(self, words: str) -> None:
        self.allowed.append(words)

    def check(self) -> None:
        assert not self.outside, f"asked other machines: {self.outside}"
        errors = [error for error in self.errors if not any(known in error for known in self.allowed)]
        assert not errors, f"on the console: {errors}"


@pytest.fixture
def new_page(browser, request):
    """Make pages; at the end each is photographed, and must have been quiet."""
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Page, Watched]] = []

        def make(width: int = 1200, height: int = 900, dark: bool = False) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.said = Watched(page)
            opened.append((page, page.said))
            return page

        yield make
        SCREENSHOTS.mkdir(exist_ok=True)
        name = "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in request.node.name)
        for number, (page, _) in enumerate(opened):
            if page.is_closed():
                continue
            page.screenshot(path=SCREENSHOTS / f"{request.node.path.stem}-{name}-{number}.png", full_page=True)
        for _, watched in opened:
            watched.check()


@pytest.fixture
def pages(new_page, tmp_path):
    """Open a widget's own page from file://, as someone would whom it was sent to."""
    made = 0

    def opened(widget, **kwargs) -> Page:
        nonlocal made
        made += 1
        path = widget.save_html(tmp_path / f"page{made}.html")
        page = new_page(**kwargs)
        page.goto(path.as_uri())
        page.locator(".mixtral-lab").first.wait_for()
        return page

    return opened


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    """JupyterLab on a free port of loopback, with an empty folder of its own: (address, token, folder)."""
    home = tmp_path_factory.mktemp("jupyter")
    folder = home / "notebooks"
    folder.mkdir()
    news = home / "settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    news.joinpath("notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "OMP_NUM_THREADS": "1",
        "MIXTRAL_LAB_SHAPES": "off",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--allow-root", "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                    break
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.25)
            else:
                pytest.fail("JupyterLab did not start within a minute: " + (home / "log").read_text())
            yield address, token, folder
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def lab_page(new_page, jupyter):
    """Open a new notebook with these cells in JupyterLab and run them all.

    `evaluate(page, "code")` of this module runs one more line and gives what it printed.
    """
    address, token, folder = jupyter

    def opened(*cells: str, **kwargs) -> Page:
        name = f"{secrets.token_hex(4)}.ipynb"
        notebook = {
            "cells": [
                {"cell_type": "code", "id": f"c{at}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
                for at, source in enumerate(cells)
            ],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }  # fmt: skip
        (folder / name).write_text(json.dumps(notebook))
        page = new_page(**kwargs)
        page.goto(f"{address}/lab/tree/{name}?reset&token={token}")
        page.locator(".jp-Notebook").wait_for(timeout=60_000)
        page.get_by_text("| Idle").wait_for(timeout=60_000)
        menu(page, "Run", "Run All Cells")
        done(page, len(cells))
        return page

    return opened


def menu(page: Page, *path: str) -> None:
    """Choose from JupyterLab's menus."""
    for at, name in enumerate(path):
        if at == 0:
            page.locator(".lm-MenuBar-item", has_text=name).first.click()
        else:
            page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()


def done(page: Page, cells: int) -> None:
    """Wait until the first so many cells have run."""
    page.wait_for_function(
        """n => {
            const prompts = [...document.querySelectorAll(".jp-Notebook .jp-CodeCell .jp-InputPrompt")].slice(0, n);
            return prompts.length === n && prompts.every(prompt => /\\[\\d+\\]/.test(prompt.textContent));
        }""",
        arg=cells,
        timeout=90_000,
    )


def evaluate(page: Page, code: str) -> str:
    """Run a line of Python in the notebook's kernel, in a new last cell, and give what it printed."""
    page.wait_for_timeout(200)  # a widget's own messages first
    page.locator(".jp-Notebook").click(position={"x": 3, "y": 3})
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    before = cells.count()
    page.keyboard.press("Escape")
    cells.nth(before - 1).locator(".jp-InputPrompt").click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    expect(cells).to_have_count(before + 1)
    page.keyboard.press("Enter")
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")
    cell = cells.nth(before)
    page.wait_for_function(
        "cell => /\\[\\d+\\]/.test(cell.querySelector('.jp-InputPrompt').textContent)", arg=cell.element_handle()
    )
    return cell.locator(".jp-OutputArea-output").inner_text(timeout=5_000).strip()
