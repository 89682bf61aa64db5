"""A conversation with a model: every token of an answer takes the colour of its expert as it is written."""

from __future__ import annotations

import html
import json
from collections.abc import Generator, Sequence
from inspect import GEN_SUSPENDED, getgeneratorstate
from typing import Any

import numpy as np
import traitlets

from mixtral_lab.chat import Conversation, Turn, check_conversation
from mixtral_lab.config import LabError
from mixtral_lab.generate import PromptError, Sampling
from mixtral_lab.lab import Lab
from mixtral_lab.tokenizer import TextStream, Tokenizer
from mixtral_lab.trace import Trace
from mixtral_lab.widgets.base import LabWidget, WidgetError, coloured_tokens
from mixtral_lab.widgets.router_explorer import RouterExplorer

MOST_TEXT, MOST_COLOURS = 500_000, 250_000  # bytes of the newest messages that the notebook's file keeps
MOST_READ = 60_000  # characters of what the model read
MOST_IN_FALLBACK = 300  # coloured tokens


class ChatPanel(LabWidget, script="chat_panel.js"):
    """A conversation with `lab`'s model, streamed, every token on the colour of its first-choice expert.

    `system` sets the tone; it applies from the next message on, as the model reads the whole conversation anew for every
    answer. `temperature`, `top_p`, `seed` and `max_new_tokens` are those of `lab.chat`. `messages` can be read and set,
    `send_message`, `stop` and `clear` do what the buttons do, `selected_layer` says whose choices the colours show, and
    `trace(answer)` is the whole routing behind an answer, recorded while it was written; `opened` is the explorer of it that is
    open in the panel, if one is.

    A token is shown once the model has read it, which is when its experts are known.
    """

    system = traitlets.Unicode(None, allow_none=True, help="said before the first question").tag(sync=True)
    temperature = traitlets.Float(0.0, max=100.0, help="0 takes the most likely token").tag(sync=True)
    top_p = traitlets.Float(1.0, help="draw from the likeliest tokens that together have this probability").tag(
        sync=True
    )
    seed = traitlets.Int(None, allow_none=True, min=0, max=2**53 - 1, help="makes draws repeatable").tag(sync=True)
    max_new_tokens = traitlets.Int(256, min=1, help="the longest answer").tag(sync=True)
    selected_layer = traitlets.Int(0, help="whose first choices the colours show").tag(sync=True)
    busy = traitlets.Bool(False, help="whether an answer is being written").tag(sync=True)
    about: traitlets.Dict = traitlets.Dict(help="the model, for the script").tag(sync=True)
    turns: traitlets.List = traitlets.List(help="the messages, for the script").tag(sync=True)
    left_out = traitlets.Int(0, help="messages too old to be shown").tag(sync=True)
    reads: traitlets.List = traitlets.List(help="what the model read last: texts, and which are markup").tag(sync=True)
    room = traitlets.Unicode(help="how full the model's context or window is").tag(sync=True)
    explorer = traitlets.Unicode(help="the RouterExplorer that is open below").tag(sync=True)

    def __init__(
        self,
        lab: Lab,
        system: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        self.lab, self.conversation = lab, Conversation(lab)
        self._writing: Generator[None, None, None] | None = None
        self._lacking = ""
        self.opened: RouterExplorer | None = None
        super().__init__(
            system=system or None, temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens
        )
        config = lab.config
        if config.n_experts is None:
            self._lacking = (
                f"{lab.name} is a dense model: every token takes the same way, so there are no experts to colour."
            )
        cannot = self.conversation.cannot
        self._lacking = cannot or self._lacking
        self.about = {"model": lab.name, "layers": config.n_layers, "experts": config.n_experts, "chat": not cannot}
        if config.n_experts is not None:
            self.selected_layer = config.n_layers // 2
        self.colour(config.n_experts)
        self.notice = self._lacking
        self._show()
        self.on_msg(self._hear)

    @property
    def title(self) -> str:
        return f"A conversation with {self.lab.name}"

    @traitlets.validate("selected_layer")
    def _check_layer(self, proposal: Any) -> int:
        layer, config = proposal["value"], self.lab.config
        if config.n_experts is None and layer:
            raise WidgetError(f"{self.lab.name} is a dense model: no layer chooses experts that could be shown.")
        if not 0 <= layer < config.n_layers:
            raise WidgetError(f"selected_layer is {layer}: the layers are 0 to {config.n_layers - 1}.")
        return int(layer)

    @traitlets.validate("system")
    def _check_system(self, proposal: Any) -> str | None:
        return proposal["value"] or None

    @traitlets.observe("system")
    def _tell_system(self, change: Any) -> None:
        self.conversation.system = change["new"]

    @traitlets.validate("temperature", "top_p")
    def _check_sampling(self, proposal: Any) -> float:
        try:
            Sampling(**{proposal["trait"].name: proposal["value"]})
        except PromptError as error:
            raise WidgetError(str(error)) from None
        return float(proposal["value"])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as `lab.chat` takes it: `{"role", "content"}`, with the system message first if there is one.

        Can be set to a whole one: its system message, or none, becomes `system`, the last message is an answer, and the
        model reads every answer to colour it. Raises `ChatError` for other values.
        """
        return self.conversation.messages

    @messages.setter
    def messages(self, messages: Any) -> None:
        check_conversation(messages)
        self.stop()
        self.conversation.messages = messages
        self.system = self.conversation.system
        self._close()
        self.notice = self._lacking
        turns = self.conversation.turns
        self.reads = self._reading(turns[-1].trace) if turns else []
        self._show()

    def send_message(self, text: str) -> None:
        """Say something and let the model answer; nothing is sent if `text` is blank.

        In Jupyter this returns at once and the answer is written while the kernel is free (`busy` says how long); in a
        script it returns with the answer. Raises `ChatError` during an answer, and for a conversation that the
        model cannot read.
        """
        if not text.strip():
            return
        sampling = Sampling(self.temperature, self.top_p, None, self.seed)
        steps = self.conversation.ask(text, sampling, self.max_new_tokens)
        self.notice = self._lacking
        with self.hold_sync():
            self.reads = _runs(self.lab.tokenizer, self.conversation.prompt)
            self.busy = True
            self._show()
        self._writing = self._answer(steps)
        next(self._writing)  # from here on, closing it keeps what is there
        self.drive(self._writing)

    def stop(self) -> None:
        """End the answer that is being written; what is there of it stays."""
        self.halt()
        if self._writing is not None and getgeneratorstate(self._writing) == GEN_SUSPENDED:
            self._writing.close()

    def clear(self) -> None:
        """Forget the conversation; the system prompt and the settings stay."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def trace(self, answer: int = -1) -> Trace:
        """What was recorded while the model read the conversation and wrote an answer: the first is 0, the last -1.

        As in `lab.trace`, the token that ended the answer is not in it: it was never read.
        """
        return self.conversation.trace(answer)

    def explore(self, answer: int = -1) -> RouterExplorer:
        """The routing of an answer, and of all that the model read for it, to look into."""
        trace = self.trace(answer)
        explorer = RouterExplorer(trace)
        explorer.selected_token = min(trace.n_prompt, len(trace) - 1)
        if self.about["experts"]:
            explorer.selected_layer = self.selected_layer
        return explorer

    def open_routing(self, answer: int = -1) -> RouterExplorer:
        """Show the routing of an answer in the panel itself, in place of another's, as its button does."""
        opened, before = self.explore(answer), self.opened
        self.opened, self.explorer = opened, opened.model_id or ""
        if before is not None:
            before.close()
        return opened

    def fallback(self) -> str:
        parts = []
        coloured = MOST_IN_FALLBACK
        for turn in reversed(self.conversation.turns):
            shown = min(len(turn.texts), coloured)
            if not turn.coloured or shown < len(turn.texts):
                text = turn.content[:2000] + ("…" if len(turn.content) > 2000 else "")
                body = f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(text)}</div>'
            else:
                coloured -= shown
                body = coloured_tokens(*self._merged(turn))
            who = "You" if turn.role == "user" else self.lab.name
            parts.append(f'<div style="margin:0 0 10px"><b>{html.escape(who)}</b>{body}</div>')
            if len(parts) == 10:
                break
        left = len(self.conversation.turns) - len(parts)
        first = f"<p>{left} earlier messages are left out.</p>" if left else ""
        experts = self.about["experts"] and self.conversation.turns
        about = f" Colours: the first-choice expert of every token in layer {self.selected_layer}." if experts else ""
        nothing = (
            "" if self.conversation.turns else "<p>Nothing has been said yet. Run this cell to talk with the model.</p>"
        )
        heading = f"<p><b>{html.escape(self.title)}.</b>{about}</p>"
        return f'<div style="font:14px/1.5 sans-serif">{heading}{nothing}{first}{"".join(reversed(parts))}</div>'

    def _merged(self, turn: Turn) -> tuple[list[str], list[int | None]]:
        """Texts and experts of an answer, without the tokens that only begin a character."""
        both = [(text, first[self.selected_layer]) for text, first in zip(turn.texts, turn.first, strict=True) if text]
        return [text for text, _ in both], [expert for _, expert in both]

    def _answer(self, steps: Generator[str, None, None]) -> Generator[None, None, None]:
        """Hand the script every token of an answer as it is written."""
        turn, told = self.conversation.writing, 0
        try:
            yield
            for _ in steps:
                if len(turn.texts) > told:
                    self._tell(told)
                    told = len(turn.texts)
                yield
        finally:
            steps.close()
            with self.hold_sync():
                self.busy = False
                self._show()

    def _reading(self, trace: Trace | None) -> list[tuple[str, bool]]:
        return [] if trace is None else _runs(self.lab.tokenizer, trace.ids[: trace.n_prompt].tolist())

    def _tell(self, start: int) -> None:
        """Send the script the tokens written since `start`."""
        turn = self.conversation.writing
        self.send({"from": start, "tokens": list(zip(turn.texts[start:], turn.first[start:], strict=True))})

    def _hear(self, _widget: Any, said: Any, _buffers: Any) -> None:
        """A message from the script: a button, or a view that came late and asks for what was written so far."""
        do = said.get("do")
        try:
            if do == "send":
                self.send_message(said["text"])
            elif do == "stop":
                self.stop()
            elif do == "clear":
                self.clear()
            elif do == "catch up" and self.busy:
                self._tell(0)
            elif do == "explore":
                self.open_routing(said["answer"])
            elif do == "close":
                self._close()
        except LabError as error:
            self.notice = str(error)

    def _close(self) -> None:
        """Take away the RouterExplorer that a click has opened."""
        self.explorer = ""
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    def _show(self) -> None:
        """Hand the script the newest messages, as many as the notebook's file can bear."""
        shown: list[dict[str, Any]] = []
        colours: list[list[list[int]]] = []
        text_left, colours_left, wide = MOST_TEXT, MOST_COLOURS, 1 + ((self.lab.config.n_experts or 0) > 256)
        answer = sum(turn.role == "assistant" for turn in self.conversation.turns)
        for turn in reversed(self.conversation.turns):
            answer -= turn.role == "assistant"
            size = len(turn.first) * self.lab.config.n_layers * wide
            coloured = turn.coloured and size <= colours_left
            entry = {
                "role": turn.role, "answer": answer, "line": turn.line, "coloured": len(turn.first) if coloured else 0,
                "texts": turn.texts if coloured else [turn.content],
            }  # fmt: skip
            if _bytes(entry) > text_left:
                short = turn.content[: text_left // 12] + "… (cut here; panel.messages has the whole text)"
                shown.append(entry | {"texts": [short], "coloured": 0})
                break
            text_left -= _bytes(entry)
            if coloured:
                colours_left -= size
                colours.append(turn.first)
            shown.append(entry)
        first = [token for turn in reversed(colours) for token in turn]
        with self.hold_sync():
            self.turns, self.left_out = shown[::-1], len(self.conversation.turns) - len(shown)
            self.keep(first=np.array(first, dtype=np.int32).reshape(len(first), self.lab.config.n_layers))
            self.room = self.conversation.room(self.max_new_tokens)


def _runs(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """Ids as texts and markup in turns; of a long text the end."""
    runs: list[tuple[str, bool]] = []
    stream = TextStream(tokenizer, continues=True)
    text = ""
    for token, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        if tokenizer.is_control(token):
            runs += [(text, False)] * bool(text) + [(piece, True)]
            text = ""
        else:
            text += stream.feed(token)
    runs += [(text, False)] * bool(text)
    left = MOST_READ
    kept: list[tuple[str, bool]] = []
    for text, markup in reversed(runs):
        if len(text) > left:
            return [("… ", False), (text[len(text) - left :], markup), *reversed(kept)]
        left -= len(text)
        kept.append((text, markup))
    return kept[::-1]


def _bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())
