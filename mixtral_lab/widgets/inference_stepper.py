"""Inference one step at a time: tokenise, read the prompt in chunks, write; go back, and take another token."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import traitlets
from jaxtyping import Float, Int
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.generate import PromptError, Sampling, check_ids, pick, prefill, probabilities
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.tokenizer import TextStream, readable
from mixtral_lab.widgets.base import LabWidget, WidgetError, coloured_tokens

if TYPE_CHECKING:
    import pandas as pd

PHASES = ("tokenise", "prefill", "decode", "end")
HOW = ("", "greedy", "drawn", "chosen")  # how a written token was picked
KEPT = 40  # likeliest candidates of a step that the script knows
GROUPS, GROUP = 48, 0.5  # the others, counted by how far (in log probability) they lie below these
MOST_STEPS = 4_000
MOST_CELLS = 4_096  # choices of experts that are drawn for one step: layers x tokens x choices
MOST_TOKENS = 128  # tokens of a chunk whose experts are drawn
HISTORY = 450_000  # bytes for the candidates and experts of steps gone by
PROMPT = 150_000  # bytes for the pieces of the prompt
PIECE = 40  # characters of a token that are shown


class Candidate(NamedTuple):
    """A possible next token: its probability as the model gives it, and after temperature, top-k and top-p."""

    id: int
    token: str
    raw: float
    adjusted: float


class Branch(NamedTuple):
    """A way the text went. It left an earlier branch after step `after` (None: it is the first) by taking `token`."""

    number: int
    after: int | None
    token: str
    steps: int
    text: str


@dataclass
class _Step:
    """What one step did: it fed positions `start` to `end` - 1. The last of all feeds nothing: its token is never read."""

    phase: str
    parent: int | None = None
    start: int = 0
    end: int = 0
    ids: list[int] = field(default_factory=list)
    how: str = ""
    chance: float | None = None  # of its token, as the model gave it before
    milliseconds: float = 0.0
    activations: int = 0
    weights_read: int = 0
    logits: Tensor | None = None  # vocab
    best: np.ndarray | None = None  # the ids of the likeliest tokens
    below: np.ndarray | None = None  # minus the logs of their probabilities
    tail: np.ndarray | None = None  # how many of the others lie in each `GROUP` below the last of them
    experts: Tensor | None = None  # layer seq choice
    weights: Tensor | None = None  # layer seq choice
    written: Tensor | None = None  # layer 2 kv seq head_dim: the keys and values that it left in the cache

    @property
    def token(self) -> int:
        return self.ids[-1]

    def know(self, logits: Float[Tensor, " vocab"]) -> None:
        """Keep the scores of the next token, and what the script shall know of them."""
        below = -logits.log_softmax(-1)
        best = below.topk(min(KEPT, len(below)), largest=False)
        others = torch.ones(len(below), dtype=torch.bool).index_fill(0, best.indices, False)
        groups = ((below[others] - best.values[-1]) / GROUP).clamp(0, GROUPS - 1).long()
        self.logits, self.best, self.below = logits, best.indices.numpy(), best.values.numpy()
        self.tail = groups.bincount(minlength=GROUPS).numpy()


class InferenceStepper(LabWidget, script="inference_stepper.js"):
    """Step through inference: tokenise, prefill by chunks, then one token at a time, on a CPU or a GPU.

    Step 0 tokenises; each chunk of the prompt is a step, then each written token; where the text ends, a last step takes
    the last token, which is never read. `step` and `branch` say what is shown and can be set; `forward()`, `back()`,
    `choose(token)` and `draw()` move; `temperature`, `top_p`, `top_k` and `seed` decide how the next token is drawn, and
    what they do to the candidates of every step. Draw number n of a seed is the same wherever it is made, and the same as
    in `lab.generate`, so that a text stepped to its end is `lab.generate(prompt, max_new_tokens, ...)`.

    The rolling cache overwrites what it kept, so going back cannot just count down. Every step keeps, on the CPU, the keys and
    values that it wrote; to compute on after any step of any branch, the last `ring` of them are put back into their slots,
    bit by bit as they were. Nothing is computed twice. Raises `PromptError` for a prompt that the model cannot read.
    """

    step = traitlets.Int(0, help="the step shown, counted along the branch").tag(sync=True)
    branch = traitlets.Int(0, help="the branch shown").tag(sync=True)
    temperature = traitlets.Float(0.0, help="0: always the likeliest token").tag(sync=True)
    top_p = traitlets.Float(1.0, help="keep the fewest tokens that hold so much probability").tag(sync=True)
    top_k = traitlets.Int(None, allow_none=True, help="keep so many tokens; None: all").tag(sync=True)
    seed = traitlets.Int(0, help="makes draws repeatable").tag(sync=True)
    playing = traitlets.Bool(False, help="whether the script asks for one step after another").tag(sync=True)
    speed = traitlets.Float(4.0, help="steps per second at most, while playing").tag(sync=True)
    about = traitlets.Dict(help="of model and machine, what never changes").tag(sync=True)
    prompt: traitlets.List = traitlets.List(help="the prompt's tokens, or the last of them").tag(sync=True)
    tree = traitlets.Dict(help="every step of every branch, by column").tag(sync=True)
    leaves: traitlets.List = traitlets.List(help="the last step of each branch").tag(sync=True)
    now = traitlets.Dict(help="candidates and experts of the step shown").tag(sync=True)
    words = traitlets.Dict(help="tokens by id, of all candidates in `data`").tag(sync=True)

    def __init__(
        self,
        lab: Lab,
        prompt: str,
        chunk: int = 16,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("chunk", chunk), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise WidgetError(f"{name} is {value}: it must be at least 1.")
        if not prompt:
            raise PromptError("The prompt is empty: write at least one character.")
        super().__init__()
        self.lab, self.chunk, self._config = lab, chunk, lab.config
        start = time.perf_counter()
        ids = lab.tokenizer.encode(prompt)
        milliseconds = 1e3 * (time.perf_counter() - start)
        check_ids(self._config, torch.tensor([ids]))
        context = self._config.context
        self._most_new = max_new_tokens if self._config.window else min(max_new_tokens, context - len(ids) + 1)
        self._cache = lab.model.new_cache(1, len(ids) + self._most_new - 1)
        self._in_cache: int | None = 0  # the step after which the cache is what it is
        self._prompt = ids
        self._made = [_Step("tokenise", ids=ids, milliseconds=milliseconds)]
        self._drawn: dict[int, list[Tensor]] = {}  # by seed: the generator's state before each draw
        self._pieces: dict[int, str] = {}
        self._packed_for: object = None
        self._moving = False
        self._usual_notice = (
            ""
            if self._config.n_experts
            else f"{lab.name} is a dense model: it has no experts to show. Everything else works."
        )
        with self.hold_sync():
            self.temperature, self.top_p, self.top_k, self.seed = temperature, top_p, top_k, seed
            self.notice = self._usual_notice
            self.colour(self._config.n_experts)
            pieces = [_short(piece) for piece in lab.tokenizer.pieces(ids)]
            sizes = np.cumsum([len(piece.encode()) + 4 for piece in reversed(pieces)])
            self.prompt = pieces[len(pieces) - int((sizes <= PROMPT).sum()) :]
            self.about = self._about()
            self.leaves = [0]
            self._tell_tree()
            self._show()
        self.observe(lambda _: self._show(), ["step", "temperature", "top_p", "top_k"])
        self.observe(self._branch_chosen, "branch")
        self.observe(lambda _: self._show(), "playing")
        self.on_msg(self._asked)

    # What can be read

    @property
    def title(self) -> str:
        return f"Inference, step by step: {self.lab.name}"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    @property
    def path(self) -> list[int]:
        """The steps of the branch shown, by their numbers among all steps ever made."""
        return self._path(self.leaves[self.branch])

    @property
    def phase(self) -> str:
        """What the step shown does: "tokenise", "prefill", "decode" or "end"."""
        return self._at.phase

    @property
    def ids(self) -> list[int]:
        """The prompt and what was written up to the step shown."""
        steps = [self._made[number] for number in self.path[: self.step + 1]]
        return self._prompt + [one.token for one in steps if one.phase in ("decode", "end")]

    @property
    def tokens(self) -> list[str]:
        """The same, as readable pieces."""
        return [self._piece(token) for token in self.ids]

    @property
    def text(self) -> str:
        """What was written after the prompt, up to the step shown: at the end, what `lab.generate` gives."""
        stream = TextStream(self.lab.tokenizer, continues=True)
        return "".join([stream.feed(token) for token in self.ids[len(self._prompt) :]]) + stream.flush()

    @property
    def logits(self) -> Float[Tensor, " vocab"] | None:
        """The scores of every possible next token after the step shown; None where nothing went through the model."""
        return self._at.logits

    @property
    def experts(self) -> Int[Tensor, "layer seq choice"] | None:
        """The chosen experts of the tokens in flight, best first; None for a dense model or where nothing is in flight."""
        return self._at.experts

    @property
    def candidates(self) -> list[Candidate]:
        """The likeliest next tokens after the step shown, at most 40, with their probabilities."""
        now = self.now
        rows = zip(now["ids"], now["raw"], now["adjusted"], strict=True)
        return [Candidate(token, self._piece(token), raw, adjusted) for token, raw, adjusted in rows]

    @property
    def branches(self) -> list[Branch]:
        """All ways the text went, the first one first."""
        found = []
        taken: set[int] = set()
        for number, leaf in enumerate(self.leaves):
            path = self._path(leaf)
            shared = sum(step in taken for step in path)
            own = self._made[path[min(shared, len(path) - 1)]]
            token = self._piece(own.token) if shared and own.phase in ("decode", "end") else ""
            written = [self._made[at].token for at in path if self._made[at].phase in ("decode", "end")]
            text = "".join(self._piece(one) for one in written)
            found.append(Branch(number, shared - 1 if number else None, token, len(path), text))
            taken.update(path)
        return found

    def frame(self) -> pd.DataFrame:
        """A tidy table of the branch shown, one row per step.

        Columns: step, phase, first (position in flight), tokens (how many are in flight), text (theirs), how (the token was
        picked), probability (the model gave it), milliseconds, activation_bytes (on a GPU measured, else a lower bound
        computed from shapes), cache_slots and cache_bytes (filled after the step), weight_bytes (read at least).
        """
        import pandas as pd

        rows = []
        for at, number in enumerate(self.path):
            one = self._made[number]
            slots = min(one.end, self.about["ring"])
            rows.append(
                {
                    "step": at,
                    "phase": one.phase,
                    "first": one.start,
                    "tokens": one.end - one.start,
                    "text": "".join(self._piece(token) for token in one.ids),
                    "how": one.how,
                    "probability": float("nan") if one.chance is None else one.chance,
                    "milliseconds": one.milliseconds,
                    "activation_bytes": one.activations,
                    "cache_slots": slots,
                    "cache_bytes": slots * self.about["slot_bytes"],
                    "weight_bytes": one.weights_read,
                }
            )
        return pd.DataFrame(rows)

    # What moves

    def forward(self, steps: int = 1) -> None:
        """Go on by so many steps: along the branch as far as it was made, then by drawing a token and reading it.

        Raises `WidgetError` where the text has ended.
        """
        for _ in range(steps):
            if self.step + 1 < len(self.path):
                self.step += 1
            elif self._at.phase in ("tokenise", "prefill") and self._at.end < len(self._prompt):
                self._append(self._read_chunk())
            else:
                token = self._draw()
                self._append(self._read_token(token, "drawn" if self.temperature else "greedy"))

    def back(self) -> None:
        """Go back by one step; what was made stays. Raises `WidgetError` at the first step."""
        if not self.step:
            raise WidgetError("This is the first step: there is nothing before it.")
        self.step -= 1

    def choose(self, token: str | int) -> None:
        """Take this token next, by its id, its readable piece (`"␣cat"`) or its text (`" cat"`).

        Where the branch already went on otherwise, this makes a new branch, or goes to the one that took this token.
        Raises `WidgetError` if there is no such token, or the prompt is not read to its end, or the text has ended.
        """
        self._take(self._token_id(token), "chosen")

    def draw(self) -> None:
        """Draw the token after the step shown under the present sampling: a new branch if the branch went on otherwise."""
        self._take(self._draw(), "drawn" if self.temperature else "greedy")

    def _take(self, token: int, how: str) -> None:
        self._check_open()
        here, path = self.path[self.step], self.path
        children = [n for n, one in enumerate(self._made) if one.parent == here and one.token == token]
        if not children:
            made = self._read_token(token, how)
            self._append(made, new_branch=self.step + 1 < len(path))
            return
        ways = [number for number, leaf in enumerate(self.leaves) if children[0] in self._path(leaf)]
        self._go(self.branch if self.branch in ways else ways[0], self.step + 1)

    def _check_open(self) -> None:
        """Raise `WidgetError` unless a token can be taken after the step shown."""
        if self._at.phase == "end":
            why = "the model's end token" if self._is_stop(self._at.token) else f"{self._most_new} tokens written"
            raise WidgetError(f"The text has ended ({why}): go back a step to take another token.")
        if self._at.end < len(self._prompt):
            raise WidgetError(
                f"Only {self._at.end} of the prompt's {len(self._prompt)} tokens are read: what comes next is given. "
                "Step on to the end of the prompt first."
            )

    def _draw(self) -> int:
        """The token that the present sampling draws after the step shown."""
        self._check_open()
        assert self._at.logits is not None
        generator = torch.Generator(self.lab.device)
        if self.temperature:
            self._wind(generator, self._at.end - len(self._prompt))
        return int(pick(self._at.logits[None].to(self.lab.device), self.sampling, [generator]))

    def _wind(self, generator: torch.Generator, n: int) -> None:
        """Bring a generator to where `generate` has it after drawing n tokens with this seed: a draw takes as many random
        numbers whatever the probabilities.
        """
        states = self._drawn.setdefault(self.seed, [generator.manual_seed(self.seed).get_state()])
        while len(states) <= n:
            generator.set_state(states[-1])
            even = torch.full((self._config.vocab,), 1 / self._config.vocab, device=self.lab.device)
            torch.multinomial(even, 1, generator=generator)
            states.append(generator.get_state())
        generator.set_state(states[n])

    # What goes through the model

    def _read_chunk(self) -> _Step:
        start = self._at.end
        ids = self._prompt[start : start + self.chunk]
        return self._fed(_Step("prefill", self.path[self.step], start, start + len(ids), ids))

    def _read_token(self, token: int, how: str) -> _Step:
        """Read one token more, unless the text ends with it."""
        at, parent = self._at.end, self.path[self.step]
        assert self._at.logits is not None
        chance = float(self._at.logits.softmax(-1)[token])
        if self._is_stop(token) or at - len(self._prompt) + 1 >= self._most_new:
            return _Step("end", parent, at, at, [token], how, chance)
        return self._fed(_Step("decode", parent, at, at + 1, [token], how, chance))

    def _fed(self, one: _Step) -> _Step:
        """Let the tokens of a step go through the model, and keep what it did."""
        if len(self._made) >= MOST_STEPS:
            raise WidgetError(f"{MOST_STEPS:,} steps are recorded, and no more fit: make a new stepper.")
        assert one.parent is not None
        model, device = self.lab.model, self.lab.device
        self._restore(one.parent)
        self._in_cache = None  # until the step is whole
        ids = torch.tensor([one.ids], device=device)
        looked_at = min(one.start, self._cache[0].ring) + len(one.ids)
        with _choices(model) as (experts, weights):
            logits, one.milliseconds, peak = _measured(
                device, lambda: prefill(model, ids, self._cache, chunk=len(one.ids))
            )
        one.know(logits[0].float().cpu())
        if experts:
            one.experts = torch.stack([layer[0] for layer in experts]).cpu()
            one.weights = torch.stack([layer[0] for layer in weights]).float().cpu()
        one.weights_read = self._sizes.read(len(one.ids), one.experts)
        one.activations = self._sizes.activations(len(one.ids), looked_at, one.experts) if peak is None else peak
        slots = self._slots(one.end, len(one.ids))
        one.written = torch.stack(
            [torch.stack((c.keys[0][:, slots], c.values[0][:, slots])) for c in self._cache]
        ).cpu()
        self._in_cache = len(self._made)  # where `_append` puts it
        return one

    def _slots(self, end: int, most: int) -> Int[Tensor, " slot"]:
        """Where the last keys and values before position `end` lie, at most so many as the ring holds."""
        ring = self._cache[0].ring
        return torch.arange(end - min(end, most, ring), end, device=self.lab.device) % ring

    def _restore(self, number: int) -> None:
        """Make the cache what it was after a step: every slot gets what the steps up to it wrote there last."""
        if self._in_cache == number:
            return
        end, ring = self._made[number].end, self._cache[0].ring
        slots = self._slots(end, ring)
        parts: list[Tensor] = []
        found = 0
        for earlier in reversed(self._path(number)):
            written = self._made[earlier].written
            if written is not None and found < len(slots):
                parts.insert(0, written)
                found += written.shape[3]
        if parts:
            whole = torch.cat(parts, dim=3)[:, :, :, -len(slots) :].to(self.lab.device)
            for one, (keys, values) in zip(self._cache, whole, strict=True):
                one.keys[0][:, slots], one.values[0][:, slots] = keys, values
        for one in self._cache:
            one.seen = end
        self._in_cache = number

    # Bookkeeping

    @property
    def _at(self) -> _Step:
        """The step shown."""
        return self._made[self.path[self.step]]

    def _path(self, number: int | None) -> list[int]:
        """The steps from the first to this one."""
        path = []
        while number is not None:
            path.append(number)
            number = self._made[number].parent
        return path[::-1]

    def _append(self, one: _Step, new_branch: bool = False) -> None:
        self._made.append(one)
        leaf = len(self._made) - 1
        with self.hold_sync():
            self._tell_tree()
            if new_branch:
                self.leaves = [*self.leaves, leaf]
                self._go(len(self.leaves) - 1, self.step + 1)
            else:
                self.leaves = [leaf if number == self.branch else old for number, old in enumerate(self.leaves)]
                self.step += 1

    def _go(self, branch: int, step: int) -> None:
        """Show a step of a branch."""
        with self.hold_sync():
            self._moving = True
            try:
                if step >= len(self.path):
                    self.branch, self.step = branch, step
                else:
                    self.step = step
                    self.branch = branch
            finally:
                self._moving = False
            self._show()

    def _branch_chosen(self, change: Any) -> None:
        if not self._moving:
            self._go(change["new"], len(self.path) - 1)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            known = token < self.lab.tokenizer.vocab
            self._pieces[token] = self.lab.tokenizer.pieces([token])[0] if known else f"#{token}"
        return self._pieces[token]

    def _is_stop(self, token: int) -> bool:
        return token in self.lab.tokenizer.stop_ids

    @cached_property
    def _by_piece(self) -> dict[str, int]:
        pieces = self.lab.tokenizer.pieces(range(self.lab.tokenizer.vocab))
        return {piece: token for token, piece in reversed(list(enumerate(pieces)))}

    def _token_id(self, token: str | int) -> int:
        if isinstance(token, int):
            if not 0 <= token < self._config.vocab:
                raise WidgetError(
                    f"Token id {token} does not exist: this model's ids are 0 to {self._config.vocab - 1}."
                )
            return token
        if not token:
            raise WidgetError("No token was given: write one, such as ␣the, where ␣ stands for a space.")
        found = self._by_piece.get(token, self._by_piece.get(readable(token.encode("utf-8", "replace"))))
        if found is None:
            text = token.replace("␣", " ").replace("⏎", "\n").replace("⇥", "\t")
            parts = self.lab.tokenizer.pieces(self.lab.tokenizer.encode(text, bos=False))
            raise WidgetError(
                f"“{_short(token)}” is not one token of this model but {len(parts)}: {_short(' '.join(parts))}. Take one at a time."
            )
        return found

    @traitlets.validate("step")
    def _check_step(self, proposal: Any) -> int:
        last = len(self.path) - 1
        if not self._moving and not 0 <= proposal["value"] <= last:
            raise WidgetError(
                f"step is {proposal['value']}: branch {self.branch} has steps 0 to {last}; forward() makes the next one."
            )
        return int(proposal["value"])

    @traitlets.validate("branch")
    def _check_branch(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < len(self.leaves):
            raise WidgetError(f"branch is {proposal['value']}: there are branches 0 to {len(self.leaves) - 1}.")
        return int(proposal["value"])

    @traitlets.validate("temperature", "top_p", "top_k")
    def _check_sampling(self, proposal: Any) -> Any:
        try:
            Sampling(**{proposal["trait"].name: proposal["value"]})
        except PromptError as error:
            raise WidgetError(str(error)) from None
        return proposal["value"]

    @traitlets.validate("seed")
    def _check_seed(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < 2**53:
            raise WidgetError(
                f"seed is {proposal['value']}: it must be a whole number from 0 to 9,007,199,254,740,991."
            )
        return int(proposal["value"])

    @traitlets.validate("speed")
    def _check_speed(self, proposal: Any) -> float:
        if not 0.1 <= proposal["value"] <= 100:
            raise WidgetError(f"speed is {proposal['value']}: it must be 0.1 to 100 steps per second.")
        return float(proposal["value"])

    def _asked(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        """What the script asks for. A request made at another step than the one shown came twice, or too late."""
        kind = content.get("kind")
        if content.get("at") != self.path[self.step]:
            return
        try:
            with self.hold_sync():
                self.notice = self._usual_notice
                if kind == "forward":
                    self.forward()
                elif kind == "choose":
                    self.choose(content["token"])
                elif kind == "draw":
                    self.draw()
                if self._at.phase == "end":
                    self.playing = False
        except LabError as error:
            with self.hold_sync():
                self.notice, self.playing = str(error), False

    # What the script sees

    def _about(self) -> dict[str, Any]:
        config, one = self._config, self._cache[0]
        store = sum(part.keys.nbytes + part.values.nbytes for part in self._cache)
        on_gpu = self.lab.device.type == "cuda"
        return {
            "model": self.lab.name,
            "dtype": self.lab.dtype,
            "device": torch.cuda.get_device_name(self.lab.device) if on_gpu else "CPU",
            "n_prompt": len(self._prompt),
            "most_new": self._most_new,
            "chunk": self.chunk,
            "vocab": config.vocab,
            "n_layers": config.n_layers,
            "n_experts": config.n_experts,
            "n_choices": config.n_choices,
            "window": config.window,
            "ring": one.ring,
            "slot_bytes": store // one.ring,
            "model_bytes": sum(_bytes(part) for part in self.lab.model.parameters()),
            "on_gpu": on_gpu,
            "group": GROUP,
        }

    @cached_property
    def _sizes(self) -> _Sizes:
        return _Sizes(self.lab.model)

    def _tell_tree(self) -> None:
        steps = self._made
        self.tree = {
            "parent": [one.parent for one in steps],
            "phase": [PHASES.index(one.phase) for one in steps],
            "start": [one.start for one in steps],
            "end": [one.end for one in steps],
            "token": [_short(self._piece(one.token)) if one.how else "" for one in steps],
            "id": [one.token if one.how else -1 for one in steps],
            "how": [HOW.index(one.how) for one in steps],
            "chance": [None if one.chance is None else _rounded(one.chance) for one in steps],
            "ms": [round(one.milliseconds, 3) for one in steps],
            "activations": [one.activations for one in steps],
            "read": [one.weights_read for one in steps],
        }

    def _show(self) -> None:
        """Tell the script what it needs to draw the step shown; the steps gone by, unless it is playing."""
        if self._moving:
            return
        number, one = self.path[self.step], self._at
        shown = self._experts_shown(one)
        now: dict[str, Any] = {
            "node": number,
            "sampling": [self.temperature, self.top_p, self.top_k],
            "ids": [],
            "raw": [],
            "adjusted": [],
            "tail": [],
            "words": [],
            "experts": [] if shown is None else shown[0].flatten().tolist(),
            "shares": [] if shown is None else shown[1].flatten().tolist(),
            "shown": 0 if shown is None else shown[0].shape[1],
        }
        if one.logits is not None:
            best = torch.from_numpy(one.best)
            now["ids"], now["tail"] = best.tolist(), [] if one.tail is None else one.tail.tolist()
            now["raw"] = [_rounded(p) for p in one.logits.softmax(-1)[best].tolist()]
            now["adjusted"] = [_rounded(p) for p in probabilities(one.logits[None], self.sampling)[0, best].tolist()]
            now["words"] = [_short(self._piece(token)) for token in now["ids"]]
        with self.hold_sync():
            self.now = now
            if not self.playing:
                self._tell_history()

    def _experts_shown(self, one: _Step) -> tuple[np.ndarray, np.ndarray] | None:
        """Experts and their weights in per cent, `layer seq choice`, of the last tokens of a step that are drawn."""
        if one.experts is None or one.weights is None:
            return None
        layers, seq, choices = one.experts.shape
        last = max(1, min(seq, MOST_TOKENS, MOST_CELLS // (layers * choices)))
        return one.experts[:, -last:].numpy(), (100 * one.weights[:, -last:]).round().byte().numpy()

    def _tell_history(self) -> None:
        """Hand over candidates and experts of as many steps as fit: those of this branch first, the latest first."""
        if self._packed_for == (len(self._made), self.branch):
            return
        self._packed_for = len(self._made), self.branch
        order = list(dict.fromkeys([*reversed(self.path), *reversed(range(len(self._made)))]))
        room, kept, experts, shares = HISTORY, [], [], []
        for number in order:
            one = self._made[number]
            shown = self._experts_shown(one)
            room -= 0 if one.logits is None else 8 * KEPT + 2 * GROUPS
            room -= 0 if shown is None else 2 * shown[0].size
            if room < 0:
                break
            kept.append(number)
            experts.append(np.zeros(0, int) if shown is None else shown[0].flatten())
            shares.append(np.zeros(0, int) if shown is None else shown[1].flatten())
        top = min(KEPT, self._config.vocab)
        nothing = np.zeros(top, int), np.full(top, np.nan, np.float32), np.zeros(GROUPS, int)
        best = [self._made[number].best for number in kept]
        below = [self._made[number].below for number in kept]
        tail = [self._made[number].tail for number in kept]
        ids = np.stack([nothing[0] if one is None else one for one in best])
        arrays = {
            "kept": np.array(kept),
            "ids": ids,
            "below": np.stack([nothing[1] if one is None else one for one in below]),
            "tail": np.stack([nothing[2] if one is None else one for one in tail]),
            "experts": np.concatenate(experts),
            "shares": np.concatenate(shares),
            "from": np.cumsum([0, *map(len, experts)]),
        }
        with self.hold_sync():
            self.keep(**arrays)
            self.words = {str(token): _short(self._piece(token)) for token in np.unique(ids).tolist()}

    def state(self) -> dict[str, Any]:
        self._tell_history()
        return super().state() | {"playing": False}

    def fallback(self) -> str:
        one, ring, tokens = self._at, self.about["ring"], self.tokens
        seen = one.end
        first = max(0, len(tokens) - 200)
        fade = "opacity:.45;text-decoration:line-through"
        spans = []
        for position in range(first, len(tokens)):
            flying = one.start <= position < one.end
            style = "background:#542788;color:#fff" if flying else fade if position < seen - ring else ""
            piece = html.escape(_short(tokens[position]).replace("␣", " "), quote=False)
            spans.append(f'<span style="padding:2px 0;border-left:1px solid #ccc;{style}">{piece}</span>')
        cut = f"<p>The first {first:,} tokens are not shown.</p>" if first else ""
        rows = "".join(
            f"<tr><td>{html.escape(_short(c.token))}</td><td>{c.raw:.1%}</td><td>{c.adjusted:.1%}</td></tr>"
            for c in self.candidates[:10]
        )
        table = "<tr><th>next token</th><th>as the model says</th><th>after sampling</th></tr>" + rows
        steps = "".join(
            f"<tr><td>{row['step']}</td><td>{row['phase']}</td><td>{html.escape(_short(row['text']))}</td>"
            f"<td>{row['milliseconds']:.2f}</td><td>{row['cache_slots']} of {ring}</td></tr>"
            for row in self.frame().tail(12).to_dict("records")
        )
        heads = "<tr><th>step</th><th>phase</th><th>tokens in flight</th><th>milliseconds</th><th>cache slots</th></tr>"
        experts = ""
        if one.experts is not None:
            chosen = one.experts[:, -1, 0].tolist()
            labels = [f" {layer}: {expert} " for layer, expert in enumerate(chosen)]
            experts = "<p>First expert of the last token in flight, by layer:</p>" + coloured_tokens(labels, chosen)
        box = "font:14px/1.9 monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext"
        return (
            f'<div style="font:14px/1.5 sans-serif"><p><b>{html.escape(self.title)}</b>, step {self.step} of '
            f"{len(self.path) - 1} so far: {one.phase}. {html.escape(self._usual_notice)}</p>{cut}"
            f'<div style="{box}">{"".join(spans)}</div><p>Purple: in flight. Struck through: gone from the cache.</p>'
            f"{experts}<table>{table if rows else ''}</table><table>{heads}{steps}</table></div>"
        )


class _Sizes:
    """How many bytes the weights are that a step reads, and the values of its tokens, computed from shapes."""

    def __init__(self, model: Transformer) -> None:
        self.config, self.number = model.config, model.embed.weight.element_size()
        embed = _bytes(model.embed.weight)
        experts = 0
        self.one_expert: list[int] = []
        for block in model.blocks:
            if block.router is not None:
                experts += sum(_bytes(part) for part in block.experts.parameters())
                self.one_expert.append(sum(_bytes(part) for part in block.experts.ffn[0].parameters()))
        whole = sum(_bytes(part) for part in model.parameters())
        self.always = whole - experts - (0 if model.unembed is None else embed)

    def read(self, seq: int, experts: Tensor | None) -> int:
        """Bytes of weights that so many tokens need, each weight once: of the experts, those that any of them chose."""
        chosen = 0
        if experts is not None:
            chosen = sum(size * len(layer.unique()) for size, layer in zip(self.one_expert, experts, strict=True))
        return self.always + chosen + seq * self.config.dim * self.number

    def activations(self, seq: int, keys: int, experts: Tensor | None) -> int:
        """Bytes that must be held at once where a layer is widest: residual stream, normed input, and queries with the keys
        and values they look at, or the inside of the busiest expert. A lower bound.
        """
        config = self.config
        attention = seq * config.n_heads * config.head_dim + 2 * keys * config.n_kv_heads * config.head_dim
        busiest = seq if experts is None else max(int(layer.flatten().bincount().max()) for layer in experts)
        return self.number * (2 * seq * config.dim + max(attention, 2 * busiest * config.hidden))


@contextmanager
def _choices(model: Transformer) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """While open, keep what routers choose and how they weigh it. Unlike `sites.recording`, nothing moves to the CPU
    meanwhile: that would be timed too.
    """
    experts: list[Tensor] = []
    weights: list[Tensor] = []
    hooks = []
    for router in (block.router for block in model.blocks):
        if router is not None:
            hooks.append(router.experts.register_forward_hook(lambda _site, _args, value: experts.append(value)))
            hooks.append(router.weights.register_forward_hook(lambda _site, _args, value: weights.append(value)))
    try:
        yield experts, weights
    finally:
        for hook in hooks:
            hook.remove()


def _measured(device: torch.device, work: Callable[[], Tensor]) -> tuple[Tensor, float, int | None]:
    """What the work gives, its milliseconds, and on a GPU the bytes that it had more at its peak than before."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = work()
        return result, 1e3 * (time.perf_counter() - start), None
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return result, begin.elapsed_time(end), torch.cuda.max_memory_allocated(device) - before


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rounded(share: float) -> float:
    return float(f"{share:.4g}")


def _short(piece: str) -> str:
    return piece if len(piece) <= PIECE else piece[: PIECE - 1] + "…"
