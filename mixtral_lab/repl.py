"""A conversation in the terminal, in the manner of Le Chat: answers as they are written, and commands that begin with /."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixtral_lab.chat import ChatError, Conversation
from mixtral_lab.config import LabError
from mixtral_lab.figures.terminal import expert_table
from mixtral_lab.generate import Sampling

PROMPT = "\x01\x1b[1m\x02> \x01\x1b[0m\x02"  # bold; the marks tell readline that the escapes take no room
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?\s*", re.DOTALL)
HELP = {
    "/route": "the experts that read each token of the last answer, layer by layer",
    "/retry [TEMPERATURE]": "write the last answer anew",
    "/system [TEXT]": 'show or set the message before the first question; "" takes it away',
    "/save FILE": "keep the conversation: .jsonl for fine-tuning, .md for reading",
    "/new": "forget the conversation and begin another one",
    "/help": "this list",
    "/quit": "end; so does Ctrl-D. Ctrl-C ends an answer",
}


class Repl:
    """Reads questions and commands, prints answers to `out` and what is to be said about them to `err`."""

    def __init__(
        self, conversation: Conversation, out: Console, err: Console, sampling: Sampling, max_new_tokens: int
    ) -> None:
        self.conversation, self.out, self.err = conversation, out, err
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.failed = False
        self._outgrown = False  # whether it was said that the conversation is longer than the window
        self._at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "route": self.route, "retry": self.retry, "system": self.system, "save": self.save, "new": self.new, "help": self.help,
        }  # fmt: skip

    def run(self) -> bool:
        """Until /quit or the end of the input; whether everything went well."""
        if self._at_terminal:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  # lets `input` edit lines and remember them
            lab = self.conversation.lab
            self.note(f"{lab.name}, {lab.config.parameters / 1e6:,.0f} M parameters. /help lists the commands.")
        for line in self._lines():
            try:
                if not self.take(line):
                    break
            except LabError as error:
                self.failed = True
                self.err.print(Text(str(error), style="red"))
        return not self.failed

    def take(self, line: str) -> bool:
        """Do what a line says; False for /quit."""
        command = COMMAND.fullmatch(line)
        if not line.strip():
            return True
        if command is None:
            self._answer(self.conversation.ask(line, self.sampling, self.max_new_tokens))
            return True
        name, rest = command[1], (command[2] or "").strip()
        if name == "quit":
            return False
        if name not in self._commands:
            raise ChatError(
                f"There is no command /{name}: /help lists them. To say it to the model, put a space before it."
            )
        self._commands[name](rest)
        return True

    def route(self, rest: str = "") -> None:
        lab = self.conversation.lab
        if lab.config.n_experts is None:
            raise ChatError(
                f"{lab.name} is a dense model: every token takes the same way, so there is no router to show."
            )
        trace = self.conversation.trace()
        self.out.print(expert_table(trace, trace.n_prompt, self.out.width))
        self.note(
            "A cell names the experts that took the token in that layer, coloured by the first, and its weight in %."
        )

    def retry(self, temperature: str = "") -> None:
        sampling, last = self.sampling, self.conversation.writing
        if temperature:
            try:
                sampling = Sampling(float(temperature), sampling.top_p)
            except ValueError:
                raise ChatError(
                    f"{temperature} is no temperature: it is a number of 0 or above, as in /retry 0.8."
                ) from None
        same = last.ended not in ("stopped", "broke off") and self.conversation.turns
        if sampling.temperature == 0 and same:
            raise ChatError("At temperature 0 the same answer would come again: /retry 0.8 draws another one.")
        self._answer(self.conversation.retry(sampling, self.max_new_tokens))

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == '""' else text
        now = self.conversation.system
        self.note(f"System message: {now}" if now else "There is no system message.")

    def save(self, name: str) -> None:
        if not name:
            raise ChatError("Name a file to save to, such as /save chat.jsonl or /save chat.md.")
        replaced = self.conversation.saved(name)
        path = self.conversation.save(name)
        self.note(f"Saved {path}{', in place of what was saved there before' if replaced else ''}.")

    def new(self, rest: str = "") -> None:
        self.conversation.clear()
        self.note("A new conversation.")

    def help(self, rest: str = "") -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for command, meaning in HELP.items():
            table.add_row(Text(command, style="bold"), meaning)
        self.out.print(table)
        self.out.print(Text("Anything else is said to the model.", style="dim"))

    def note(self, text: str) -> None:
        self.err.print(Text(text, style="dim"))

    def _lines(self) -> Iterator[str]:
        """What is typed or piped in. Ctrl-C twice at an empty prompt ends it too."""
        asked_to_end = False
        while True:
            try:
                yield input(PROMPT if self._at_terminal else "")
                asked_to_end = False
            except EOFError:
                if self._at_terminal:
                    self.out.print()
                return
            except KeyboardInterrupt:
                self.out.print()
                if asked_to_end or not self._at_terminal:
                    return
                asked_to_end = True
                self.note("Ctrl-D or /quit ends the conversation.")

    def _answer(self, steps: Generator[str, None, None]) -> None:
        """Print an answer as it is written; Ctrl-C ends it, and what is there of it stays."""
        try:
            for piece in steps:
                self.out.print(Text(_printable(piece)), end="", soft_wrap=True)
        except KeyboardInterrupt:
            self.conversation.stop()
        finally:
            self.out.print()
        self._after()

    def _after(self) -> None:
        """What a reader of the answer should know."""
        conversation = self.conversation
        answer, config = conversation.turns[-1], conversation.lab.config
        if not answer.content:
            self.note(f"(an empty answer, {answer.ended}; the model will not be shown it or its question)")
        elif answer.ended != "ended by itself":
            self.note(f"({answer.ended})")
        full = config.window is None and config.context - conversation.used < self.max_new_tokens
        outgrown = config.window is not None and conversation.used > config.window
        if full or (outgrown and not self._outgrown):
            self.note(conversation.room(self.max_new_tokens) + (" /new begins one." if full else ""))
        self._outgrown = outgrown


def _printable(text: str) -> str:
    """Without the control characters with which a text could command the terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)
