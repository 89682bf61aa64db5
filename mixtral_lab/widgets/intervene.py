"""Change what a model computes and see at once what becomes of its words: Intervene, the widget of `mixtral_lab.edit`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import traitlets
from jaxtyping import Bool, Float, Int

from mixtral_lab.analysis.causal import questions, score
from mixtral_lab.analysis.routing import assignment_counts
from mixtral_lab.config import LabError
from mixtral_lab.edit import Edits
from mixtral_lab.figures import expert_colour
from mixtral_lab.generate import check_length
from mixtral_lab.lab import Lab
from mixtral_lab.tokenizer import TextStream
from mixtral_lab.trace import Trace
from mixtral_lab.widgets.base import LabWidget, WidgetError
from mixtral_lab.widgets.edit_list import as_python, checked, choices_by_layer, in_words, made, several
from mixtral_lab.widgets.router_explorer import RouterExplorer

if TYPE_CHECKING:
    import pandas as pd

TOP = 10  # so many candidates of each run are shown
MOST_CHARACTERS = 20_000  # of the prompt
MOST_WRITTEN = 256  # tokens
MOST_CELLS, MOST_SHOWN = 50_000, 4_096  # decisions and tokens that the grid draws: of longer prompts the last ones
CHOICES_SHOWN = 4  # of a token in a layer, in the grid's words
SAME, FOLLOWS, FORCED = 0, 1, 2  # a decision: as before; another set of experts; another set because the edit says so


class Run(NamedTuple):
    """What the model made of the prompt: without an edit, or under the edits."""

    log_p: Float[np.ndarray, " vocab"]  # nats, of every next token after the prompt
    loss: float  # nats per token of the prompt; nan for a single token
    trace: Trace  # of the prompt and the greedy continuation


class Intervene(LabWidget, script="intervene.js"):
    """Ablate, reroute, scale, patch: the next token, the continuation, the loss and the routing, beside the unedited run.

    `edits` is a list of small dictionaries, each with the `kind` of change and the arguments of the function of that name in
    `mixtral_lab.edit`:

        widget = Intervene(lab, "Once upon a time")
        widget.edits = [
            {"kind": "top_k", "k": 1, "layer": None},
            {"kind": "ablate", "layer": 2, "expert": 5, "how": "zero"},
            {"kind": "scale", "layer": 0, "expert": 3, "factor": 2.0},
            {"kind": "reroute", "layer": 4, "position": 3, "experts": [1]},
            {"kind": "patch", "site": "layers.3.residual.after", "text": "Once upon a day", "position": 4},
            {"kind": "multiply", "site": "layers.1.attention.output", "factor": 0.5},
        ]

    They are applied in this order; `multiply` stands for `{site: lambda x: factor * x}`. Positions are those of the prompt.
    Assign a new list to change it: `append` is not noticed. What is set from Python is computed at once. Wrong values raise
    `WidgetError`, also those that only a run brings to light; everything is then as it was before. `baseline` and `edited` hold
    the loss (nats per token of the prompt) and the continuation, `comparison` what differs, `code` the same in Python.
    """

    prompt = traitlets.Unicode(help="the text that is read").tag(sync=True)
    max_new_tokens = traitlets.Int(24, help="how many tokens are written after it, greedily").tag(sync=True)
    edits = traitlets.List(traitlets.Dict(), help="the changes in force, in order").tag(sync=True)
    selected_layer = traitlets.Int(0).tag(sync=True)
    selected_expert = traitlets.Int(0).tag(sync=True)
    selected_token = traitlets.Int(0, help="a position in the prompt").tag(sync=True)
    said = traitlets.List(traitlets.Unicode(), help="the changes in words").tag(sync=True)
    code = traitlets.Unicode(help="Python that computes the same").tag(sync=True)
    baseline = traitlets.Dict(help="loss, text, tokens: without any edit").tag(sync=True)
    edited = traitlets.Dict(help="loss, text, tokens: under the edits").tag(sync=True)
    comparison = traitlets.Dict(help="kl, candidates, first_difference, decisions, forced, follows").tag(sync=True)
    tokens = traitlets.List(traitlets.Unicode(), help="the tokens that the grid shows").tag(sync=True)
    about = traitlets.Dict(help="the model, the tokens left out of the grid, choices per layer").tag(sync=True)
    busy = traitlets.Bool(False, help="a run is under way").tag(sync=True)
    turn = traitlets.Int(0, help="counts answers, so that the script knows when to draw").tag(sync=True)

    def __init__(self, lab: Lab, prompt: str, max_new_tokens: int = 24) -> None:
        self.lab = lab
        self._heard_from_page = self._settling = False
        self._steps = None
        self._others: dict[tuple[str, str], Trace] = {}
        self._ids: list[int] = []
        self._plain: Run | None = None  # the run without edits, of `_plain_of`
        self._plain_of: tuple[str, int] | None = None
        self._changed: Run | None = None
        self._good: dict[str, Any] = {}  # prompt, max_new_tokens and edits of what is shown
        config = lab.config
        self._always = (
            f"{lab.name} is a dense model: it has no experts to ablate, reroute or scale, and no router. Its other sites can be "
            "multiplied and patched."
            if config.n_experts is None
            else ""
        )
        super().__init__()
        self.colour(config.n_experts)
        self.notice = self._always
        self.on_msg(self._on_message)
        self._settling = True
        self.max_new_tokens = max_new_tokens
        self._settling = False
        self.prompt = prompt
        self.selected_token = len(self._ids) - 1

    @property
    def title(self) -> str:
        return f"What a change does: {self.lab.name}"

    def frame(self) -> pd.DataFrame:
        """The candidates for the next token: the ten likeliest of either run, most likely first.

        Columns: id, token, baseline and edited (probabilities), difference (percentage points), baseline_log_p and
        edited_log_p (nats), log_p_change.
        """
        import pandas as pd

        self._finish()
        table = pd.DataFrame(self.comparison["candidates"])
        table.insert(4, "difference", 100 * (table["edited"] - table["baseline"]))
        table["log_p_change"] = table["edited_log_p"] - table["baseline_log_p"]
        return table

    def traces(self) -> tuple[Trace, Trace]:
        """The routing of prompt and continuation, without the edits and with them."""
        self._finish()
        assert self._plain is not None and self._changed is not None
        return self._plain.trace, self._changed.trace

    def explore(self) -> RouterExplorer:
        """Both runs side by side, with the decisions marked in which they differ."""
        plain, changed = self.traces()
        return RouterExplorer(plain, other=changed, names=("baseline", "edited"))

    def state(self) -> dict[str, Any]:
        self._finish()
        return super().state()

    def fallback(self) -> str:
        self._finish()
        return _fallback(self)

    # What may be set

    @traitlets.validate("prompt")
    def _a_prompt(self, proposal: Any) -> str:
        text = proposal["value"]
        if not 0 < len(text) <= MOST_CHARACTERS:
            raise WidgetError(
                f"The prompt has {len(text):,} characters: it must have at least one and at most {MOST_CHARACTERS:,}."
            )
        self._check_length(len(self.lab.tokenizer.encode(text)), self.max_new_tokens)
        return text

    @traitlets.validate("max_new_tokens")
    def _a_length(self, proposal: Any) -> int:
        wanted = proposal["value"]
        if not 0 <= wanted <= MOST_WRITTEN:
            raise WidgetError(f"max_new_tokens is {wanted}: it must be 0 to {MOST_WRITTEN}.")
        self._check_length(len(self._ids), wanted)
        return wanted

    def _check_length(self, read: int, written: int) -> None:
        try:
            check_length(self.lab.config, read + written)
        except LabError as error:
            raise WidgetError(str(error)) from None

    @traitlets.validate("selected_layer", "selected_expert", "selected_token")
    def _a_selection(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        config = self.lab.config
        most = {
            "selected_layer": config.n_layers, "selected_expert": config.n_experts or 1, "selected_token": len(self._ids)
        }[name]  # fmt: skip
        if not 0 <= value < max(most, 1):
            what = name.removeprefix("selected_")
            raise WidgetError(f"There is no {what} {value}: they are 0 to {most - 1}.")
        return value

    @traitlets.validate("edits")
    def _some_edits(self, proposal: Any) -> list[dict[str, Any]]:
        edits = checked(proposal["value"], self.lab, len(self._ids))
        self._made(edits)
        return edits

    def _made(self, edits: Sequence[Mapping[str, Any]]) -> list[Edits]:
        return made(edits, self.lab, self._other)

    def _other(self, text: str, site: str) -> Trace:
        """The run that a patch takes from, kept for the next time."""
        if (text, site) not in self._others:
            while len(self._others) >= 20:
                self._others.pop(next(iter(self._others)))
            self._others[text, site] = self.lab.trace(text, sites=site)
        return self._others[text, site]

    # What happens then

    @traitlets.observe("edits", "prompt", "max_new_tokens")
    def _on_change(self, change: Any) -> None:
        if change["name"] == "prompt":
            self._ids = self.lab.tokenizer.encode(self.prompt)
        if self._settling:
            return
        dropped = self._drop_what_lies_beyond() if change["name"] == "prompt" else ""
        self.busy = True
        if self._heard_from_page:
            self.drive(self._answer(dropped))
        else:
            self.halt()
            for _ in self._answer(dropped, alone=True):
                pass

    def _drop_what_lies_beyond(self) -> str:
        """Leave out the edits whose position the new prompt does not have; say so."""
        seq = len(self._ids)
        kept = [edit for edit in self.edits if max(several(edit.get("position")), default=0) < seq]
        dropped = len(self.edits) - len(kept)
        self._settling = True
        self.selected_token = min(self.selected_token, seq - 1)
        self.edits = kept
        self._settling = False
        return f"The new prompt has {seq} tokens: {dropped} edit(s) of later positions were dropped." if dropped else ""

    def _answer(self, remark: str, alone: bool = False) -> Iterator[None]:
        """Run the model, without the edits where that is not known yet, and with them; then show both."""
        yield
        try:
            wanted = (self.prompt, self.max_new_tokens)
            before, of = self._plain, self._plain_of
            if before is None or of != wanted:
                before, of = self._run([]), wanted
                yield
            after = self._run(self._made(self.edits)) if self.edits else before
        except GeneratorExit:
            raise
        except BaseException as error:
            self._go_back(error)
            if not isinstance(error, LabError):
                raise
            if alone:
                raise WidgetError(str(error)) from None
            return
        self._plain, self._plain_of, self._changed = before, of, after
        self._show(before, after, remark)

    def _run(self, edits: Sequence[Edits]) -> Run:
        """What the model makes of the prompt under these edits. They are gone before this returns."""
        with self.lab.edit(*edits):
            log_p = self.lab.logits(torch.tensor([self._ids]))[0, -1].float().log_softmax(-1)
            if not log_p.isfinite().all():
                raise WidgetError(
                    "Under these edits the model computes not-a-number: a token has no expert left, or a value grew beyond "
                    "all bounds. The edits before are in force again."
                )
            loss = score(self.lab, questions(self.lab, self.prompt)).loss
            trace = self.lab.trace(self.prompt, self.max_new_tokens)
        return Run(log_p.double().cpu().numpy(), loss, trace)

    def _go_back(self, error: BaseException) -> None:
        self._settling = True
        if self._good:
            self.prompt = self._good["prompt"]
            self.max_new_tokens = self._good["max_new_tokens"]
            self.selected_token = min(self.selected_token, len(self._ids) - 1)
            self.edits = self._good["edits"]
        self._settling = False
        self.busy = False
        self._say(str(error) or type(error).__name__)
        self.turn += 1

    def _say(self, remark: str) -> None:
        self.notice = " ".join(filter(None, (self._always, remark)))

    def _finish(self) -> None:
        """Take what is under way to its end."""
        while self._steps is not None and self._one_more(self._steps):
            pass

    def _on_message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """The page asks for another prompt, length or list of edits."""
        self._heard_from_page, before = True, (self.prompt, self.max_new_tokens, self.edits)
        try:
            for name in ("max_new_tokens", "prompt", "edits"):
                if name in content:
                    setattr(self, name, content[name])
        except (LabError, traitlets.TraitError) as error:
            self._say(str(error))
        finally:
            self._heard_from_page = False
        if (self.prompt, self.max_new_tokens, self.edits) == before:
            self.turn += 1  # the controls go back to what is in force

    # What is shown

    def _show(self, before: Run, after: Run, remark: str) -> None:
        config, seq = self.lab.config, len(self._ids)
        shown = max(1, min(seq, MOST_SHOWN, MOST_CELLS // config.n_layers))
        first = seq - shown
        texts = [_written(self.lab, run.trace) for run in (before, after)]
        compared: dict[str, Any] = {
            "kl": float(np.maximum((np.exp(before.log_p) * (before.log_p - after.log_p)).sum(), 0)),
            "candidates": _candidates(self.lab, before.log_p, after.log_p),
            "first_difference": _first_difference(*(run.trace.ids[seq:].tolist() for run in (before, after))),
        }
        arrays: dict[str, np.ndarray] = {}
        used = None
        n_choices = [0] * config.n_layers
        if config.n_experts is not None:
            old, new = (_choices(run.trace, config.n_layers)[:, :seq] for run in (before, after))
            n_choices = choices_by_layer(self.edits, config.n_layers, config.n_choices or 0)
            used = assignment_counts(old, config.n_experts)
            changed = _changes(old, new, config.n_experts, self.edits)
            compared |= {
                "decisions": changed.size,
                "forced": int((changed == FORCED).sum()),
                "follows": int((changed == FOLLOWS).sum()),
            }
            arrays = {
                "used": used,
                "before": old[:, first:, :CHOICES_SHOWN],
                "after": new[:, first:, :CHOICES_SHOWN],
                "changed": changed[:, first:],
            }
        self._good = {"prompt": self.prompt, "max_new_tokens": self.max_new_tokens, "edits": self.edits}
        with self.hold_sync():
            self.keep(**arrays)
            self.tokens = list(before.trace.tokens[first:seq])
            self.about = {
                "model": self.lab.name, "layers": config.n_layers, "experts": config.n_experts,
                "choices": config.n_choices, "choices_by_layer": n_choices, "first": first, "seq": seq,
                "most_written": MOST_WRITTEN, "sites": _patchable(self.lab),
            }  # fmt: skip
            self.baseline, self.edited = (
                {
                    "loss": None if math.isnan(run.loss) else run.loss,
                    "text": text,
                    "tokens": list(run.trace.tokens[seq:]),
                }
                for run, text in zip((before, after), texts, strict=True)
            )
            self.comparison = compared
            self.said = [in_words(edit, used, config.n_choices) for edit in self.edits]
            self.code = as_python(self.edits, self.lab, self.prompt, self.max_new_tokens)
            self.busy = False
            self._say(remark)
            self.turn += 1


def _patchable(lab: Lab) -> list[str]:
    """The sites that a patch may write, those of a layer as `layers.*.` something."""
    names = dict.fromkeys(re.sub(r"^layers\.\d+", "layers.*", name) for name in lab.sites)
    return [name for name in names if not name.endswith((".scores", ".pattern"))]


def _written(lab: Lab, trace: Trace) -> str:
    """The continuation as text, as `lab.generate` gives it."""
    stream = TextStream(lab.tokenizer, continues=True)
    return "".join(stream.feed(one) for one in trace.ids[trace.n_prompt :].tolist()) + stream.flush()


def _candidates(lab: Lab, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """The likeliest tokens of either run, by the higher of their two probabilities."""
    likely = {int(token) for log_p in (before, after) for token in np.argsort(-log_p, kind="stable")[:TOP]}
    ordered = sorted(likely, key=lambda token: (-max(before[token], after[token]), token))
    pieces = lab.tokenizer.pieces(token for token in ordered if token < lab.tokenizer.vocab)
    names = iter(pieces)
    return [
        {
            "id": token, "token": next(names) if token < lab.tokenizer.vocab else f"#{token}",
            "baseline": float(np.exp(before[token])), "edited": float(np.exp(after[token])),
            "baseline_log_p": float(before[token]), "edited_log_p": float(after[token]),
        }
        for token in ordered
    ]  # fmt: skip


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Which token of two continuations is the first to differ; None if they are the same."""
    for at in range(max(len(one), len(other))):
        if at >= min(len(one), len(other)) or one[at] != other[at]:
            return at
    return None


def _choices(trace: Trace, n_layers: int) -> Int[np.ndarray, "layer seq choice"]:
    """The chosen experts; a layer that takes fewer than another repeats its first."""
    found = [trace[f"layers.{layer}.router.experts"].cpu().numpy() for layer in range(n_layers)]
    most = max(one.shape[1] for one in found)
    return np.stack([np.concatenate([one, one[:, :1].repeat(most - one.shape[1], 1)], 1) for one in found])


def _changes(
    old: Int[np.ndarray, "layer seq choice"],
    new: Int[np.ndarray, "layer seq new_choice"],
    n_experts: int,
    edits: Sequence[Mapping[str, Any]],
) -> Int[np.ndarray, "layer seq"]:
    """Which decisions took another set of experts, and of which an edit of the choice itself is the reason."""
    sets = [_sets(experts, n_experts) for experts in (old, new)]
    named = np.zeros(old.shape[:2], bool)
    for edit in edits:
        layers: Any = slice(None) if edit.get("layer") is None else edit["layer"]
        if edit["kind"] == "patch":
            if not edit["site"].endswith(("router.logits", "router.experts")):
                continue
            inner = edit["site"].split(".")[1]
            layers = slice(None) if not inner.isdigit() else int(inner)
        if edit["kind"] == "top_k":
            named[layers] = True
        elif edit["kind"] == "ablate" and edit["how"] == "next_best":
            named[layers] |= sets[0][layers][..., edit["expert"]]
        elif edit["kind"] in ("reroute", "patch"):
            at = several(edit["position"])
            named[layers, at if at else slice(None)] = True
    other = (sets[0] != sets[1]).any(-1)
    return np.where(other, np.where(named, FORCED, FOLLOWS), SAME)


def _sets(experts: Int[np.ndarray, "layer seq choice"], n_experts: int) -> Bool[np.ndarray, "layer seq expert"]:
    found = np.zeros((*experts.shape[:2], n_experts), bool)
    np.put_along_axis(found, experts, True, -1)
    return found


def _fallback(widget: Intervene) -> str:
    """What the last run showed, as plain HTML."""
    compared, before, after = widget.comparison, widget.baseline, widget.edited

    def safe(text: str, most: int = 2_000) -> str:
        return html.escape(text if len(text) <= most else text[:most] + f" … ({len(text):,} characters)", quote=False)

    bar = "display:inline-block;height:9px;vertical-align:middle;background:"
    cell = 'style="text-align:right;padding:1px 8px"'
    rows = "".join(
        f'<tr><td style="text-align:left;padding:1px 8px"><code>{safe(one["token"], 40)}</code></td>'
        f'<td style="text-align:left"><span style="{bar}#8c959f;width:{120 * one["baseline"]:.0f}px"></span><br>'
        f'<span style="{bar}#8250df;width:{120 * one["edited"]:.0f}px"></span></td>'
        f"<td {cell}>{one['baseline']:.2%}</td><td {cell}>{one['edited']:.2%}</td>"
        f"<td {cell}>{100 * (one['edited'] - one['baseline']):+.2f}</td>"
        f"<td {cell}>{one['edited_log_p'] - one['baseline_log_p']:+.3f}</td></tr>"
        for one in compared["candidates"]
    )
    edits = "".join(f"<li>{safe(one, 300)}</li>" for one in widget.said) or "<li>none: both runs are the same</li>"
    numbers = [f"KL divergence from the baseline to the edited run: {compared['kl']:.4g} nats."]
    if before["loss"] is not None:
        numbers.append(f"Loss on the prompt: {before['loss']:.4f}, edited {after['loss']:.4f} nats per token.")
    if "decisions" in compared:
        other = compared["forced"] + compared["follows"]
        numbers.append(
            f"{other:,} of {compared['decisions']:,} routing decisions on the prompt took other experts, "
            f"{compared['forced']:,} of them by the edit itself."
        )
    dots = ""
    if "used" in widget.arrays:
        dots = _board(widget)
    text = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;font-family:monospace;margin:2px 0 8px"
    return (
        '<div style="font:14px/1.5 sans-serif;max-width:900px">'
        f"<p><b>{safe(widget.title)}</b></p><p style='{text}'>{safe(widget.prompt)}</p>"
        f"<p>Edits in force:</p><ol>{edits}</ol><p>{' '.join(numbers)}</p>{dots}"
        "<table style='border-collapse:collapse;font-size:13px'><tr><th>next token</th><th>grey: baseline, purple: edited</th>"
        f"<th>baseline</th><th>edited</th><th>points</th><th>nats</th></tr>{rows}</table>"
        f"<p><b>Baseline writes</b></p><p style='{text}'>{safe(before['text']) or '(nothing)'}</p>"
        f"<p><b>Edited writes</b></p><p style='{text}'>{safe(after['text']) or '(nothing)'}</p>"
        "<details><summary>The same in Python</summary>"
        f"<pre style='white-space:pre-wrap'>{safe(widget.code, 8_000)}</pre></details></div>"
    )


def _board(widget: Intervene) -> str:
    """How often each expert was used on the prompt, as an SVG of dots; nothing where there are too many to draw."""
    layers, n_experts = widget.arrays["used"]["shape"]
    if layers * n_experts > 600:
        return ""
    about = widget.arrays["used"]
    end = about["start"] + layers * n_experts * np.dtype(about["kind"]).itemsize
    used = np.frombuffer(widget.data[about["start"] : end], "<" + about["kind"]).reshape(layers, n_experts)
    dots = "".join(
        f'<circle cx="{60 + 22 * expert}" cy="{22 * (layers - layer) - 10}" '
        f'r="{max(10 * math.sqrt(n / max(used.max(), 1)), 1):.1f}" fill="{expert_colour(expert)}"/>'
        for (layer, expert), n in np.ndenumerate(used)
    )
    names = "".join(
        f'<text x="44" y="{22 * (layers - layer) - 6}" text-anchor="end" font-size="11" fill="#8c959f">layer {layer}</text>'
        for layer in range(layers)
    )
    return (
        f'<svg width="{80 + 22 * n_experts}" height="{22 * layers + 4}" role="img" aria-label="How often the prompt used each '
        f'expert of each layer">{names}{dots}</svg>'
    )
