"""A conversation: what was said, an answer as it is written, and the routing behind it. The terminal and ChatPanel use it."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import GEN_CLOSED, GEN_SUSPENDED, getgeneratorstate
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from mixtral_lab.config import LabError
from mixtral_lab.generate import Sampling, generate_ids
from mixtral_lab.lab import Lab, Message
from mixtral_lab.sites import recording
from mixtral_lab.tokenizer import BPETokenizer, TextStream, Tokenizer, check_messages
from mixtral_lab.trace import Trace


class ChatError(LabError, ValueError):
    """A conversation cannot go on as it was asked to."""


@dataclass
class Turn:
    """A question, or an answer and what is known of it.

    Of an answer, `texts` are what each token adds ("" while a character is unfinished, None for markup), `first` is
    `token layer`: the expert that weighs most; `line` says in words how it was written, `ended` why it ended.
    """

    role: str
    content: str = ""
    texts: list[str | None] = field(default_factory=list)
    first: list[list[int]] = field(default_factory=list)
    line: str = ""
    ended: str = ""
    trace: Trace | None = None

    @property
    def coloured(self) -> bool:
        return bool(self.first and self.first[0])


class Conversation:
    """What was said with `lab`'s model, in `turns`, and what it says next.

    `system` is said before the first question; it may change between questions, as the model reads the whole conversation
    anew for every answer. `cannot` says in words why this model cannot talk, or is empty.
    """

    def __init__(self, lab: Lab, system: str | None = None) -> None:
        self.lab, self.system = lab, system or None
        self.turns: list[Turn] = []
        self.writing = Turn("assistant")  # the answer that is being written, or the last one that was
        self.prompt: list[int] = []  # what the model read for it
        self._steps: Generator[str, None, None] | None = None
        self._saved: dict[Path, bytes] = {}  # what `save` wrote where
        self.cannot = ""
        try:
            lab.tokenizer.chat([{"role": "user", "content": "Hello"}])
        except LabError as error:
            self.cannot = f"{lab.name} cannot hold a conversation. {error}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """Everything as `lab.chat` takes it: `{"role", "content"}`, with the system message first if there is one.

        Can be set to a whole conversation: its system message, or none, becomes `system`, the last message is an
        answer, and the model reads every answer to know its routing. Raises `ChatError` or `TokenizerError` for other
        values, and changes nothing then.
        """
        said = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        return [{"role": "system", "content": self.system}, *said] if self.system else said

    @messages.setter
    def messages(self, messages: Any) -> None:
        system, said = check_conversation(messages)
        self.stop()
        turns: list[Turn] = []
        for message in said:
            self.lab.tokenizer.encode(message["content"])  # raises where it is no text
            turns.append(Turn(message["role"], message["content"]))
            if message["role"] == "assistant":
                self._read(turns, system)
        self.turns, self.system = turns, system

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self._steps is not None and getgeneratorstate(self._steps) != GEN_CLOSED

    @property
    def used(self) -> int:
        """Tokens that the conversation takes, up to the last answer that was recorded."""
        return next((len(turn.trace) for turn in reversed(self.turns) if turn.trace is not None), 0)

    def ask(self, text: str, sampling: Sampling | None = None, max_new_tokens: int = 256) -> Generator[str, None, None]:
        """Say something; what is returned writes the answer, a token for each step, and yields what it adds.

        The first step reads the prompt and adds nothing. Closing it, or `stop`, ends the answer; what is there of it stays.
        Raises `ChatError`, before anything is said, during another answer, for a model that cannot talk, and where the
        conversation no longer fits the model's context.
        """
        self._free()
        self.lab.tokenizer.encode(text)  # raises where it is no text
        question = Turn("user", text.strip())
        ids = self._ids([*self.turns, question])
        self.turns.append(question)
        return self._begin(ids, sampling, max_new_tokens)

    def retry(self, sampling: Sampling | None = None, max_new_tokens: int = 256) -> Generator[str, None, None]:
        """Forget the last answer and write another one; returns and raises what `ask` does."""
        self._free()
        if not self.turns:
            raise ChatError("Nothing has been asked yet that could be answered again.")
        ids = self._ids(self.turns[:-1])
        self.turns.pop()
        return self._begin(ids, sampling, max_new_tokens)

    def stop(self) -> None:
        """End the answer that is being written; what is there of it stays."""
        if self._steps is not None and getgeneratorstate(self._steps) == GEN_SUSPENDED:
            self._steps.close()

    def clear(self) -> None:
        """Forget what was said; `system` stays."""
        self.stop()
        self.turns = []

    def trace(self, answer: int = -1) -> Trace:
        """What was recorded while the model read the conversation and wrote an answer: the first is 0, the last -1.

        As in `lab.trace`, the token that ended the answer is not in it: it was never read.
        """
        answers = [turn for turn in self.turns if turn.role == "assistant"]
        if not -len(answers) <= answer < len(answers):
            there = f"the answers are 0 to {len(answers) - 1}" if answers else "nothing has been answered yet"
            raise ChatError(f"There is no answer {answer}: {there}.")
        found = answers[answer].trace
        if found is None:
            raise ChatError(f"Answer {answer} is empty, and nothing was recorded for it.")
        return found

    def room(self, max_new_tokens: int = 256) -> str:
        """How much of what the model can read the conversation takes, in words."""
        used, config, name = self.used, self.lab.config, self.lab.name
        if config.window is None:
            said = f"The conversation takes {used:,} of the {config.context:,} tokens that {name} can read."
            if config.context - used < max_new_tokens:
                said += " The next answer may be cut short: a new conversation has room."
            return said
        said = f"The conversation has {count_tokens(used)}; in each layer a token sees the last {config.window:,}."
        if used > config.window:
            said += " What came earlier can only reach an answer through the tokens and layers between."
        return said

    def history(self, turns: Sequence[Turn] | None = None, system: str | None = None) -> list[Message]:
        """What the model reads: questions that were left without any answer are skipped."""
        if turns is None:
            turns, system = self.turns, self.system
        empty = {at for at, turn in enumerate(turns) if turn.role == "assistant" and not turn.content}
        kept = [turn for at, turn in enumerate(turns) if at not in empty and at + 1 not in empty]
        said: list[Message] = [{"role": turn.role, "content": turn.content} for turn in kept]
        return [{"role": "system", "content": system}, *said] if system else said

    def save(self, path: str | Path) -> Path:
        """Write what was said: to `.jsonl` as one line `{"messages": [...]}`, which Mistral's fine-tuning and this package's
        read, or to `.md` for a reader. Questions without an answer are left out.

        Never overwrites a file, except one that it wrote itself and that nobody has changed since: raises `ChatError`,
        also where there is nothing to save or no folder to save into.
        """
        path = Path(path).expanduser()
        forms = {".jsonl": _as_jsonl, ".md": _as_markdown}
        if path.suffix not in forms:
            raise ChatError(f"{path} was not written: the name must end in .jsonl (for programs) or .md (for readers).")
        said = self.history()
        if not any(message["role"] == "assistant" for message in said):
            raise ChatError("Nothing has been answered yet, so there is nothing to save.")
        if path.exists() and not self.saved(path):
            raise ChatError(f"{path} exists and was left alone: choose another name.")
        written = forms[path.suffix](said, self.lab.name).encode()
        partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")  # nobody else's
        try:
            partial.write_bytes(written)
            partial.replace(path)
        except OSError as error:
            raise ChatError(f"{path} cannot be written: {error.strerror or error}.") from None
        finally:
            partial.unlink(missing_ok=True)
        self._saved[path.resolve()] = written
        return path

    def saved(self, path: str | Path) -> bool:
        """Whether a file is as `save` has written it."""
        path = Path(path).expanduser()
        return path.is_file() and path.read_bytes() == self._saved.get(path.resolve())

    def _free(self) -> None:
        if self.busy:
            raise ChatError("An answer is still being written: wait for its end or stop it.")
        if self.cannot:
            raise ChatError(self.cannot)

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        """What the model reads for its next answer, if it fits."""
        config = self.lab.config
        ids = self.lab.tokenizer.chat(self.history(turns, self.system))
        if config.window is None and len(ids) >= config.context:
            raise ChatError(
                f"With this message the conversation has {len(ids):,} tokens, and {self.lab.name} reads at most "
                f"{config.context:,}: send a shorter one, or start a new conversation."
            )
        return ids

    def _begin(self, ids: list[int], sampling: Sampling | None, most: int) -> Generator[str, None, None]:
        self.prompt = ids
        self._steps = self._answer(ids, sampling or Sampling(), most)
        next(self._steps)  # from here on, closing it keeps what is there
        return self._steps

    def _answer(self, ids: list[int], sampling: Sampling, most: int) -> Generator[str, None, None]:
        """Write an answer, a step for every token: text and routing come from the same run."""
        lab, began = self.lab, len(ids)
        writer, whole = _Writer(lab.tokenizer, lab.config.n_layers), list(ids)
        turn = self.writing = Turn("assistant", texts=writer.texts, first=writer.first)
        recorded: dict[str, list[Tensor]] = {}
        # One token more than asked for, as in lab.trace_ids: the last one written is never read.
        steps = generate_ids(lab.model, [ids], most + 1, sampling, lab.tokenizer.stop_ids)
        written: int | None = None
        seconds = [0.0, 0.0]  # for reading the prompt, for the tokens
        turn.ended = "stopped"
        try:
            yield ""
            while True:
                start = time.perf_counter()
                with recording(lab.model) as recorder:  # closed between steps: nothing else that runs gets in
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
                written = new[0]
                yield (writer.texts[-1] or "") if writer.texts else ""
            if written in lab.tokenizer.stop_ids:
                turn.ended = "ended by itself"
            elif len(writer.texts) == most:
                turn.ended = f"cut at the longest answer, {most:,} tokens"
            else:
                turn.ended = f"cut at the model's limit of {lab.config.context:,} tokens"
            yield writer.flush()
        except LabError:
            turn.ended = "broke off"
            raise
        except RuntimeError as error:  # such as too little memory
            turn.ended = "broke off"
            raise ChatError(f"The model could not go on: {error}") from error
        finally:
            writer.flush()
            turn.content = writer.content
            count = len(writer.texts)
            rate = f" at {count / seconds[1]:,.0f} tokens/s" if count and seconds[1] else ""
            turn.line = (
                f"read {count_tokens(began)} in {seconds[0]:.2f} s, wrote {count_tokens(count)}{rate}, {turn.ended}"
            )
            if not turn.content:
                turn.line += "; an empty answer, which the model will not be shown"
            if recorded or lab.config.n_experts is None:
                parts = {site: torch.cat(values) for site, values in recorded.items()}
                turn.trace = self._trace(whole, began, parts)
            self.turns.append(turn)

    def _read(self, turns: list[Turn], system: str | None) -> None:
        """Record how the model reads the last of these turns, an answer that was set."""
        turn, tokenizer = turns[-1], self.lab.tokenizer
        turn.line = "set from Python"
        if not turn.content:
            return
        prompt = tokenizer.chat(self.history(turns[:-1], system))
        if isinstance(tokenizer, BPETokenizer):
            whole, by_model = tokenizer.chat_training_ids(self.history(turns, system))
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
        turn.line += f", read as {count_tokens(len(answer))}"

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

    def flush(self) -> str:
        """U+FFFD if the last character was left unfinished, else nothing; it belongs to the last token of text."""
        rest = self._stream.flush()
        at = next((at for at in reversed(range(len(self.texts))) if self.texts[at] is not None), None)
        if rest and at is not None:
            self.texts[at] = (self.texts[at] or "") + rest
        return rest

    @property
    def content(self) -> str:
        return "".join(text or "" for text in self.texts).strip()

    def _begun(self, text: str) -> str:
        """Without white space before the first word."""
        text = text if self._started else text.lstrip()
        self._started = self._started or bool(text)
        return text


def check_conversation(messages: Any) -> tuple[str | None, list[dict[str, str]]]:
    """The system text, and the other messages, which must be in turns and end with an answer."""
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise ChatError(f'messages is {messages!r}: it must be a list of {{"role": ..., "content": ...}}.')
    found = [{"role": m.get("role", ""), "content": m.get("content", "")} for m in messages]
    first = found[0] if found else {}
    opening = found[:1] if first.get("role") == "system" and isinstance(first["content"], str) else []
    said = found[len(opening) :]
    try:
        if said:
            check_messages(found, last="assistant")
    except LabError as error:
        raise ChatError(f"{error} A question that waits for its answer is asked, not set.") from None
    return (opening[0]["content"] or None if opening else None), said


def _as_jsonl(messages: Sequence[Message], name: str) -> str:
    return json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n"


def _as_markdown(messages: Sequence[Message], name: str) -> str:
    who = {"system": "System", "user": "You", "assistant": name}
    return "\n".join(f"## {who[message['role']]}\n\n{message['content']}\n" for message in messages)


def count_tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"
