"""Edits as a list of small dictionaries: checked, made into those of `mixtral_lab.edit`, said in words, written as Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from mixtral_lab import bundled
from mixtral_lab.config import LabError
from mixtral_lab.edit import HOW, Edits, ablate, patch, reroute, scale, temperature, top_k
from mixtral_lab.lab import Lab
from mixtral_lab.sites import resolve
from mixtral_lab.trace import Trace
from mixtral_lab.widgets.base import WidgetError

MOST_EDITS = 300
MOST_CHARACTERS = 20_000  # of all texts that are patched from

MISSING = object()
FIELDS: dict[str, dict[str, Any]] = {  # of each kind of edit: its fields, in the order of its function's arguments
    "ablate": {"layer": MISSING, "expert": MISSING, "how": "renormalise"},
    "scale": {"layer": MISSING, "expert": MISSING, "factor": MISSING, "position": None},
    "reroute": {"layer": MISSING, "position": MISSING, "experts": MISSING},
    "top_k": {"k": MISSING, "layer": None},
    "temperature": {"t": MISSING, "layer": None},
    "patch": {"site": MISSING, "text": MISSING, "position": MISSING},
    "multiply": {"site": MISSING, "factor": MISSING},
}
MAKERS: dict[str, Callable[..., Edits]] = {
    "ablate": ablate, "scale": scale, "reroute": reroute, "top_k": top_k, "temperature": temperature,
}  # fmt: skip
DONE = {
    "zero": "its answer is taken away",
    "renormalise": "its weight goes to the others chosen",
    "next_best": "tokens take the next best in its place",
}

Listed = Mapping[str, Any]  # {"kind": "ablate", "layer": 2, "expert": 5, "how": "zero"}


def checked(given: Sequence[Listed], lab: Lab, seq: int) -> list[dict[str, Any]]:
    """The edits with all their fields, each of the right kind and in range for a text of `seq` tokens.

    Raises `WidgetError`, also where a later edit would silently undo an earlier one.
    """
    edits = [_checked(edit, lab, seq) for edit in given]
    if len(edits) > MOST_EDITS:
        raise WidgetError(f"There are {len(edits)} edits: {MOST_EDITS} at most.")
    if sum(len(edit["text"]) for edit in edits if edit["kind"] == "patch") > MOST_CHARACTERS:
        raise WidgetError(f"The texts to patch from have more than {MOST_CHARACTERS:,} characters together.")
    _check_order(edits, lab)
    return edits


def _checked(given: Listed, lab: Lab, seq: int) -> dict[str, Any]:
    kind = given.get("kind")
    if kind not in FIELDS:
        raise WidgetError(f"An edit has the kind {kind!r}: it must be one of {', '.join(FIELDS)}.")
    fields, config = FIELDS[kind], lab.config
    unknown = set(given) - {"kind"} - set(fields)
    lacks = [name for name, default in fields.items() if default is MISSING and name not in given]
    if unknown or lacks:
        what = f"has no field {min(unknown)!r}" if unknown else f"needs {lacks[0]!r}"
        raise WidgetError(f"An edit of kind {kind!r} {what}: its fields are {', '.join(fields)}.")
    if kind in MAKERS and config.n_experts is None:
        raise WidgetError(f"{kind} changes experts, but {lab.name} is a dense model: it has none.")
    last_expert = (config.n_experts or 0) - 1

    def field(name: str, value: Any) -> Any:
        if value is None and name in ("layer", "position"):
            return None  # all of them
        if name == "layer":
            return _whole(name, value, 0, config.n_layers - 1)
        if name == "expert":
            return _whole(name, value, 0, last_expert)
        if name == "k":
            return _whole(name, value, 1, last_expert + 1)
        if name == "position":
            places = [_whole(name, one, 0, seq - 1) for one in several(value)]
            return places if isinstance(value, list | tuple) else places[0]
        if name == "experts":
            if not isinstance(value, list | tuple):
                raise WidgetError(f"experts are {value!r}: give a list, the first choice first.")
            return [_whole("expert", one, 0, last_expert) for one in value]
        if name == "how" and value not in HOW:
            raise WidgetError(f"how is {value!r}: it must be one of {', '.join(HOW)}.")
        if name in ("factor", "t"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise WidgetError(f"{name} is {value!r}: it must be a finite number.")
            return float(value)
        if name in ("site", "text") and not (isinstance(value, str) and value):
            raise WidgetError(f"{name} is {value!r}: it must be a text of one character or more.")
        return value

    return {"kind": kind} | {name: field(name, given.get(name, default)) for name, default in fields.items()}


def _whole(what: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WidgetError(f"{what} is {value!r}: it must be a whole number, {low} to {high}.")
    return value


def _check_order(edits: Sequence[Listed], lab: Lab) -> None:
    """Raise `WidgetError` for what a later edit would undo, or for which an earlier one leaves no room."""
    config = lab.config
    for at, edit in enumerate(edits):
        rerouted = edit["kind"] == "reroute"
        if not rerouted and not (edit["kind"] == "patch" and edit["site"].endswith("router.experts")):
            continue
        anew = [later["layer"] for later in edits[at + 1 :] if later["kind"] == "top_k"]
        if any(layer is None or not rerouted or edit["layer"] in (None, layer) for layer in anew):
            raise WidgetError(f"A top_k after a {edit['kind']} of the choice would choose anew: put it before.")
        if not rerouted:
            continue
        now = choices_by_layer(edits[:at], config.n_layers, config.n_choices or 0)
        for layer in _layers(edit, config.n_layers):
            if now[layer] != len(edit["experts"]):
                raise WidgetError(
                    f"A token takes {now[layer]} expert(s) in layer {layer}, but {len(edit['experts'])} are named to reroute "
                    f"it: {edit['experts']}."
                )


def _layers(edit: Listed, n_layers: int) -> Sequence[int]:
    return range(n_layers) if edit["layer"] is None else [edit["layer"]]


def several(position: Any) -> list[int]:
    """A position, several, or None (no one in particular) as a list."""
    if position is None:
        return []
    return list(position) if isinstance(position, list | tuple) else [position]


def choices_by_layer(edits: Sequence[Listed], n_layers: int, usual: int) -> list[int]:
    """How many experts a token takes in each layer under these edits."""
    found = [usual] * n_layers
    for edit in edits:
        if edit["kind"] == "top_k":
            for layer in _layers(edit, n_layers):
                found[layer] = edit["k"]
    return found


def made(edits: Sequence[Listed], lab: Lab, other: Callable[[str, str], Trace]) -> list[Edits]:
    """The same as `mixtral_lab.edit` knows them; `other(text, site)` is the run that a patch takes from.

    Raises `WidgetError` where `mixtral_lab.edit` refuses.
    """

    def make(edit: Listed) -> Edits:
        if edit["kind"] == "patch":
            return patch(edit["site"], other(edit["text"], edit["site"]), edit["position"])
        if edit["kind"] == "multiply":
            resolve(lab.config, edit["site"])
            return {edit["site"]: lambda x: edit["factor"] * x}
        return MAKERS[edit["kind"]](**{name: edit[name] for name in FIELDS[edit["kind"]]})

    try:
        return [make(edit) for edit in edits]
    except LabError as error:
        raise WidgetError(str(error)) from None


def in_words(edit: Listed, used: Integer[np.ndarray, "layer expert"] | None, n_choices: int | None) -> str:
    """An edit as a sentence; `used` is how many tokens of the prompt chose each expert."""
    kind, at = edit["kind"], several(edit.get("position"))
    where = "" if "site" in edit else "every layer" if edit["layer"] is None else f"layer {edit['layer']}"
    places = f"position{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}" if at else "every position"
    if kind in ("ablate", "scale"):
        assert used is not None
        chosen = used[slice(None) if edit["layer"] is None else edit["layer"], edit["expert"]].sum()
        idle = "" if chosen else " (no token of the prompt chose it)"
        what = DONE[edit["how"]] if kind == "ablate" else f"its weight × {edit['factor']:g}"
        return f"Expert {edit['expert']}, {where}{', ' + places if at else ''}: {what}{idle}"
    if kind == "reroute":
        return f"{where.capitalize()}, {places}: sent to {_experts(edit['experts'])}"
    if kind == "top_k":
        number = f"{edit['k']} expert{'s' if edit['k'] > 1 else ''}"
        return f"{where.capitalize()}: every token takes {number}, not {n_choices}"
    if kind == "temperature":
        return f"{where.capitalize()}: router temperature {edit['t']:g}"
    if kind == "multiply":
        return f"{edit['site']} × {edit['factor']:g}"
    text = edit["text"] if len(edit["text"]) <= 60 else edit["text"][:59] + "…"
    return f"{edit['site']}, {places}: from “{text}”"


def _experts(experts: Sequence[int]) -> str:
    first, last = ", ".join(map(str, experts[:-1])), str(experts[-1])
    return f"experts {first} and {last}" if first else f"expert {last}"


def as_python(edits: Sequence[Listed], lab: Lab, prompt: str, max_new_tokens: int) -> str:
    """Python that reads the prompt under the edits: `log_p` of every next token, `loss`, `text`, `trace`."""
    known = lab.name in (*bundled.MODELS, *bundled.UPCYCLED)
    names = sorted({edit["kind"] for edit in edits} - {"multiply"})
    before: list[str] = []
    calls: list[str] = []
    for edit in edits:
        kind = edit["kind"]
        if kind == "multiply":
            calls.append(f"{{{edit['site']!r}: lambda x: {edit['factor']!r} * x}}")
        elif kind == "patch":
            source = f"other_{len(before) + 1}"
            before.append(f"{source} = lab.trace({edit['text']!r}, sites={edit['site']!r})")
            calls.append(f"patch({edit['site']!r}, {source}, position={edit['position']!r})")
        else:
            given = {
                name: edit[name] for name, default in FIELDS[kind].items() if (edit[name], default) != (None, None)
            }
            calls.append(f"{kind}({', '.join(f'{name}={value!r}' for name, value in given.items())})")
    opened = f"with lab.edit({''.join(calls)}):"
    if len(calls) > 1:
        opened = "\n".join(["with lab.edit(", *(f"    {call}," for call in calls), "):"])
    lines = [
        "import torch\n",
        "import mixtral_lab" if known else None,
        "from mixtral_lab.analysis.causal import questions, score",
        f"from mixtral_lab.edit import {', '.join(names)}" if names else None,
        f"\nlab = mixtral_lab.load({lab.name!r}, device={str(lab.device)!r}, dtype={lab.dtype!r})"
        if known
        else "\n# lab is the one that the widget was made with",
        f"prompt = {prompt!r}",
        *before,
        opened,
        "    ids = torch.tensor([lab.tokenizer.encode(prompt)])",
        "    log_p = lab.logits(ids)[0, -1].float().log_softmax(-1)  # of every next token",
        "    loss = score(lab, questions(lab, prompt)).loss  # nats per token of the prompt",
        f"    text = lab.generate(prompt, max_new_tokens={max_new_tokens})",
        f"    trace = lab.trace(prompt, max_new_tokens={max_new_tokens})",
    ]
    return "\n".join(line for line in lines if line is not None) + "\n"
