"""A widget as one web page: a single file that needs no network and no Jupyter, to look at or to send to someone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from mixtral_lab.config import LabError

MARKER = "mixtral_lab.page.2"  # in a comment of the head: how a page is known again
START = 'start(document.getElementById("widget"), document.getElementById("state").textContent);\n'


class PageError(LabError):
    """A page cannot be written where it was asked for."""


def write_page(path: str | Path, title: str, script: str, style: str, state: Mapping[str, Any], fallback: str) -> Path:
    """Write a widget's script with its state to a file, replacing such a page but never another kind of file.

    Until the script runs, and where none may, the page shows `fallback`. It asks no server for anything, and its
    security policy lets no script run but its own. Raises `PageError` if something else stands at `path` or its
    folder does not exist.
    """
    path = Path(path)
    if path.exists() and not _is_page(path):
        raise PageError(f"{path} exists and is not a page of this package; it was left alone. Choose another name.")
    if not path.parent.is_dir():
        raise PageError(f"There is no folder {path.parent} to write {path.name} into: make it first.")
    template = files("mixtral_lab.widgets").joinpath("page.html").read_text("utf-8")
    script = "\n" + alone(script) + START
    page = Template(template).substitute(
        marker=MARKER,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=html.escape(title),
        style=style,
        fallback=fallback,
        state=as_json(state),
        script=script,
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, "utf-8", newline="\n")
    partial.replace(path)
    return path


def alone(script: str) -> str:
    """A widget's module as plain lines that need no kernel; after them, `start(place, state)` shows it (state as JSON)."""
    start = files("mixtral_lab.widgets").joinpath("page.js").read_text("utf-8")
    return re.sub(r"\bexport default\b", "const widget =", script) + start


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"<!-- mixtral_lab.page." in file.read(1000)


def as_json(state: Mapping[str, Any]) -> str:
    """The state as JSON that is safe inside a script element; bytes as base64."""

    def bytes_too(value: Any) -> Any:
        return {"$bytes": base64.b64encode(value).decode()}

    text = json.dumps(state, ensure_ascii=False, separators=(",", ":"), default=bytes_too)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
