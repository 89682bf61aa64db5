"""A conversation with a model: every token of an answer takes the colour of its expert as it is written."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import GEN_SUSPENDED, getgeneratorstate
from typing import Any

import numpy as np
import torch
import traitlets
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.generate import PromptError, Sampling, generate_ids
from mixtral_lab.lab import Lab, Message
from mixtral_lab.sites import recording
from mixtral_lab.tokenizer import BPETokenizer, TextStream, Tokenizer, check_messages
from mixtral_lab.trace import Trace
from mixtral_lab.widgets.base import LabWidget, WidgetError, coloured_tokens
from mixtral_lab.widgets.router_explorer import RouterExplorer

MOST_TEXT, MOST_COLOURS = 500_000, 250_000  # bytes of the newest messages that the notebook's file keeps
MOST_READ = 60_000  # characters of what the model read
MOST_IN_FALLBACK = 300  # coloured tokens


@dataclass
class Turn:
    """A message as it is shown. Of an answer, `texts` are what each token adds ("" while a character is unfinished,
    None for markup), `first` is `token layer`: the expert that weighs most; both are empty for a question.
    """

    role: str
    content: str = ""
    texts: list[str | None] = field(default_factory=list)
    first: list[list[int]] = field(default_factory=list)
    line: str = ""
    trace: Trace | None = None

    @property
    def coloured(self) -> bool:
        return bool(self.first and self.first[0])


class ChatPanel(LabWidget, script="chat_panel.js"):
    """A conversation with `lab`'s model, streamed, every token on the colour of its first-choice expert.

    `system` sets the tone; it applies from the next message on, as the model reads the whole conversation anew for every
    answer. `temperature`, `top_p`, `seed` and `max_new_tokens` are those of `lab.chat`. `messages` can be read and set,
    `send_message`, `stop` and `clear` do what the buttons do, `selected_layer` says whose choices the colours show, and
    `trace(answer)` is the whole routing behind an answer, recorded while it was written.

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
        self.lab = lab
        self._turns: list[Turn] = []
        self._writing: Generator[None, None, None] | None = None
        self._lacking = ""
        self._open: RouterExplorer | None = None
        super().__init__(
            system=system or None, temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens
        )
        config, can_chat = lab.config, True
        if config.n_experts is None:
            self._lacking = (
                f"{lab.name} is a dense model: every token takes the same way, so there are no experts to colour."
            )
        try:
            lab.tokenizer.chat([{"role": "user", "content": "Hello"}])
        except LabError as error:
            can_chat, self._lacking = False, f"{lab.name} cannot hold a conversation. {error}"
        self.about = {"model": lab.name, "layers": config.n_layers, "experts": config.n_experts, "chat": can_chat}
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
        model reads every answer to colour it. Raises `WidgetError` for other values.
        """
        said = [{"role": turn.role, "content": turn.content} for turn in self._turns]
        return self._after_system(said)

    @messages.setter
    def messages(self, messages: Any) -> None:
        system, said = _checked(messages)
        self.stop()
        turns: list[Turn] = []
        for message in said:
            self.lab.tokenizer.encode(message["content"])  # raises where it is no text
            turns.append(Turn(message["role"], message["content"]))
            if message["role"] == "assistant":
                self._read(turns, system)
        self._turns, self.system = turns, system
        self._close()
        self.notice = self._lacking
        self.reads = self._reading(turns[-1].trace) if turns else []
        self._show()

    def send_message(self, text: str) -> None:
        """Say something and let the model answer; nothing is sent if `text` is blank.

        In Jupyter this returns at once and the answer is written while the kernel is free (`busy` says how long); in a
        script it returns with the answer. Raises `WidgetError` during an answer, and for a conversation that the
        model cannot read.
        """
        if not text.strip():
            return
        if self.busy:
            raise WidgetError("An answer is still being written: wait for its end or stop it.")
        if not self.about["chat"]:
            raise WidgetError(self._lacking)
        tokenizer, config = self.lab.tokenizer, self.lab.config
        tokenizer.encode(text)  # raises where it is no text
        question = Turn("user", text.strip())
        ids = tokenizer.chat(self._history([*self._turns, question], self.system))
        if config.window is None and len(ids) >= config.context:
            raise WidgetError(
                f"With this message the conversation has {len(ids):,} tokens, and {self.lab.name} reads at most "
                f"{config.context:,}: send a shorter one, or clear the conversation."
            )
        self.notice = self._lacking
        with self.hold_sync():
            self._turns.append(question)
            self.reads = _runs(tokenizer, ids)
            self.busy = True
            self._show()
        self._writing = self._answer(ids)
        next(self._writing)  # from here on, closing it keeps what is there
        self.drive(self._writing)

    def stop(self) -> None:
        """End the answer that is being written; what is there of it stays."""
        self.halt()
        if self._writing is not None and getgeneratorstate(self._writing) == GEN_SUSPENDED:
            self._writing.close()

    def clear(self) -> None:
        """Forget the conversation; the system prompt and the settings stay."""
        self.messages = self._after_system([])

    def trace(self, answer: int = -1) -> Trace:
        """What was recorded while the model read the conversation and wrote an answer: the first is 0, the last -1.

        As in `lab.trace`, the token that ended the answer is not in it: it was never read.
        """
        answers = [turn for turn in self._turns if turn.role == "assistant"]
        if not -len(answers) <= answer < len(answers):
            there = f"the answers are 0 to {len(answers) - 1}" if answers else "nothing has been answered yet"
            raise WidgetError(f"There is no answer {answer}: {there}.")
        found = answers[answer].trace
        if found is None:
            raise WidgetError(f"Answer {answer} is empty, and nothing was recorded for it.")
        return found

    def explore(self, answer: int = -1) -> RouterExplorer:
        """The routing of an answer, and of all that the model read for it, to look into."""
        trace = self.trace(answer)
        explorer = RouterExplorer(trace)
        explorer.selected_token = min(trace.n_prompt, len(trace) - 1)
        if self.about["experts"]:
            explorer.selected_layer = self.selected_layer
        return explorer

    def fallback(self) -> str:
        parts = []
        coloured = MOST_IN_FALLBACK
        for turn in reversed(self._turns):
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
        left = len(self._turns) - len(parts)
        first = f"<p>{left} earlier messages are left out.</p>" if left else ""
        experts = self.about["experts"] and self._turns
        about = f" Colours: the first-choice expert of every token in layer {self.selected_layer}." if experts else ""
        nothing = "" if self._turns else "<p>Nothing has been said yet. Run this cell to talk with the model.</p>"
        heading = f"<p><b>{html.escape(self.title)}.</b>{about}</p>"
        return f'<div style="font:14px/1.5 sans-serif">{heading}{nothing}{first}{"".join(reversed(parts))}</div>'

    def _merged(self, turn: Turn) -> tuple[list[str], list[int | None]]:
        """Texts and experts of an answer, without the tokens that only begin a character."""
        both = [(text, first[self.selected_layer]) for text, first in zip(turn.texts, turn.first, strict=True) if text]
        return [text for text, _ in both], [expert for _, expert in both]

    def _after_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _history(self, turns: Sequence[Turn], system: str | None) -> list[Message]:
        """What the model reads: questions that were left without any answer are skipped."""
        empty = {at for at, turn in enumerate(turns) if turn.role == "assistant" and not turn.content}
        kept = [turn for at, turn in enumerate(turns) if at not in empty and at + 1 not in empty]
        said: list[Message] = [{"role": turn.role, "content": turn.content} for turn in kept]
        return [{"role": "system", "content": system}, *said] if system else said

    def _answer(self, ids: list[int]) -> Generator[None, None, None]:
        """Write an answer, a step for every token: text and routing come from the same run."""
        lab, began = self.lab, len(ids)
        writer, whole = _Writer(lab.tokenizer, lab.config.n_layers), list(ids)
        turn = Turn("assistant", texts=writer.texts, first=writer.first)
        self._turn = turn
        recorded: dict[str, list[Tensor]] = {}
        sampling = Sampling(self.temperature, self.top_p, None, self.seed)
        most = self.max_new_tokens
        # One token more than asked for, as in lab.trace_ids: the last one written is never read.
        steps = generate_ids(lab.model, [ids], most + 1, sampling, lab.tokenizer.stop_ids)
        written: int | None = None
        seconds = [0.0, 0.0]  # for reading the prompt, for the tokens
        ended = "stopped"
        try:
            yield
            while True:
                start = time.perf_counter()
                with recording(lab.model) as recorder:  # closed between steps: nothing else of the kernel's gets in
                    new = next(steps, None)
                seconds[written is not None] += time.perf_counter() - start
                if new is None:
                    break
                here = recorder.values()
                for site, values in here.items():
                    recorded.setdefault(site, []).append(values)
                if written is not None:
                    whole.append(written)
                    writer.add(written, here)
                    self._tell(len(writer.texts) - 1)
                written = new[0]
                yield
            if written in lab.tokenizer.stop_ids:
                ended = "ended by itself"
            elif len(writer.texts) == most:
                ended = f"cut at the longest answer, {most:,} tokens"
            else:
                ended = f"cut at the model's limit of {lab.config.context:,} tokens"
        except LabError:
            ended = "broke off"
            raise
        except RuntimeError as error:  # such as too little memory
            ended = "broke off"
            raise WidgetError(f"The model could not go on: {error}") from error
        finally:
            writer.flush()
            turn.content = writer.content
            count = len(writer.texts)
            rate = f" at {count / seconds[1]:,.0f} tokens/s" if count and seconds[1] else ""
            turn.line = f"read {_tokens(began)} in {seconds[0]:.2f} s, wrote {_tokens(count)}{rate}, {ended}"
            if not turn.content:
                turn.line += "; an empty answer, which the model will not be shown"
            if recorded or lab.config.n_experts is None:
                parts = {site: torch.cat(values) for site, values in recorded.items()}
                turn.trace = self._trace(whole, began, parts)
            with self.hold_sync():
                self._turns.append(turn)
                self.busy = False
                self._show()

    def _read(self, turns: list[Turn], system: str | None) -> None:
        """Record how the model reads the last of these turns, an answer that was set."""
        turn, tokenizer = turns[-1], self.lab.tokenizer
        turn.line = "set from Python"
        if not turn.content:
            return
        prompt = tokenizer.chat(self._history(turns[:-1], system))
        if isinstance(tokenizer, BPETokenizer):
            whole, by_model = tokenizer.chat_training_ids(self._history(turns, system))
            both = list(zip(whole, by_model, strict=True))[len(prompt) :]
            answer = [token for token, ours in both if ours and not tokenizer.is_control(token)]
        else:
            answer = tokenizer.encode(turn.content, bos=False)
        read = self.lab.trace_ids(prompt + answer)
        turn.trace = replace(read, n_prompt=len(prompt))
        writer = _Writer(tokenizer, self.lab.config.n_layers)
        for at, token in enumerate(answer, start=len(prompt)):
            writer.add(token, {site: values[at:] for site, values in read.recorded.items()}, step=0)
        writer.flush()
        turn.texts, turn.first = writer.texts, writer.first
        turn.line += f", read as {_tokens(len(answer))}"

    def _trace(self, ids: list[int], n_prompt: int, recorded: Mapping[str, Tensor]) -> Trace:
        lab = self.lab
        return Trace(
            ids=torch.tensor(ids),
            tokens=tuple(lab.tokenizer.pieces(ids)),
            n_prompt=n_prompt,
            model=lab.name,
            dtype=lab.dtype,
            n_layers=lab.config.n_layers,
            n_experts=lab.config.n_experts,
            window=lab.config.window,
            recorded=recorded,
        )

    def _reading(self, trace: Trace | None) -> list[tuple[str, bool]]:
        return [] if trace is None else _runs(self.lab.tokenizer, trace.ids[: trace.n_prompt].tolist())

    def _tell(self, start: int) -> None:
        """Send the script the tokens written since `start`."""
        turn = self._turn
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
                opened = self.explore(said["answer"])
                self._close()
                self._open, self.explorer = opened, opened.model_id or ""
            elif do == "close":
                self._close()
        except LabError as error:
            self.notice = str(error)

    def _close(self) -> None:
        """Take away the RouterExplorer that a click has opened."""
        self.explorer = ""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _show(self) -> None:
        """Hand the script the newest messages, as many as the notebook's file can bear."""
        shown: list[dict[str, Any]] = []
        colours: list[list[list[int]]] = []
        text_left, colours_left, wide = MOST_TEXT, MOST_COLOURS, 1 + ((self.lab.config.n_experts or 0) > 256)
        answer = sum(turn.role == "assistant" for turn in self._turns)
        for turn in reversed(self._turns):
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
            self.turns, self.left_out = shown[::-1], len(self._turns) - len(shown)
            self.keep(first=np.array(first, dtype=np.int32).reshape(len(first), self.lab.config.n_layers))
            self.room = self._room()

    def _room(self) -> str:
        """How much of what the model can read the conversation takes."""
        used = next((len(turn.trace) for turn in reversed(self._turns) if turn.trace is not None), 0)
        config, name = self.lab.config, self.lab.name
        if config.window is None:
            said = f"The conversation takes {used:,} of the {config.context:,} tokens that {name} can read."
            if config.context - used < self.max_new_tokens:
                said += " The next answer may be cut short: clear the conversation to make room."
            return said
        said = f"The conversation has {_tokens(used)}; in each layer a token sees the last {config.window:,}."
        if used > config.window:
            said += " What came earlier can only reach an answer through the tokens and layers between."
        return said


class _Writer:
    """An answer as it grows: what every token adds to the text, and which expert of each layer reads it first."""

    def __init__(self, tokenizer: Tokenizer, n_layers: int) -> None:
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer, continues=True)
        self._sites = [f"layers.{layer}.router.experts" for layer in range(n_layers)]
        self._started = False
        self.texts: list[str | None] = []
        self.first: list[list[int]] = []

    def add(self, token: int, recorded: Mapping[str, Tensor], step: int = -1) -> None:
        """One token more; `recorded` holds what the routers chose for it at `step`."""
        self.texts.append(None if self._tokenizer.is_control(token) else self._begun(self._stream.feed(token)))
        self.first.append([int(recorded[site][step, 0]) for site in self._sites if site in recorded])

    def flush(self) -> None:
        rest = self._stream.flush()
        at = next((at for at in reversed(range(len(self.texts))) if self.texts[at] is not None), None)
        if rest and at is not None:
            self.texts[at] = (self.texts[at] or "") + rest

    @property
    def content(self) -> str:
        return "".join(text or "" for text in self.texts).strip()

    def _begun(self, text: str) -> str:
        """Without white space before the first word."""
        text = text if self._started else text.lstrip()
        self._started = self._started or bool(text)
        return text


def _checked(messages: Any) -> tuple[str | None, list[dict[str, str]]]:
    """The system text, and the other messages, which must be in turns and end with an answer."""
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise WidgetError(f'messages is {messages!r}: it must be a list of {{"role": ..., "content": ...}}.')
    found = [{"role": m.get("role", ""), "content": m.get("content", "")} for m in messages]
    first = found[0] if found else {}
    opening = found[:1] if first.get("role") == "system" and isinstance(first["content"], str) else []
    said = found[len(opening) :]
    try:
        if said:
            check_messages(found, last="assistant")
    except LabError as error:
        raise WidgetError(f"{error} To ask something, use send_message.") from None
    return (opening[0]["content"] or None if opening else None), said


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


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"
