"""What comes in the box: the trained mini models and the held-out excerpts, wherever the package was installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mixtral_lab.config import LabError

PLACES = (Path(__file__).resolve().parents[1] / "data", Path(sys.prefix) / "share" / "mixtral-lab" / "data")
MODELS = ("mini-mixtral", "mini-mistral")
UPCYCLED = {"smolmixtral": "smolmixtral-adapter"}  # a name, and the folder of what turns its installed parent into it


def folder(name: str) -> Path:
    """The folder of a bundled model, or of the excerpts. Raises `LabError` if the box lacks it."""
    for place in PLACES:
        if (place / name).is_dir():
            return place / name
    raise LabError(f"{name!r} was not found in {' or '.join(map(str, PLACES))}: was the package installed whole?")


def has(name: str) -> bool:
    """Whether this installation holds it: the shapes of the mini models are known even where their weights are not."""
    return any((place / name).is_dir() for place in PLACES)


def excerpts() -> dict[str, list[dict]]:
    """Held-out passages by domain, none of which the mini models were trained on.

    Each is a record with `id`, `source`, `licence`, and `text` (of the chat domain: `messages`). Passages of
    different languages with the same `id` say the same thing.
    """
    found = {}
    for path in sorted(folder("excerpts").glob("*.jsonl")):
        found[path.stem] = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return found
