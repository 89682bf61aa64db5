"""Conversations: what is kept, saved and refused; the terminal chat through pipes and through a pseudo-terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mixtral_lab
from mixtral_lab.chat import ChatError, Conversation
from mixtral_lab.cli import app
from mixtral_lab.figures.colours import expert_colour
from mixtral_lab.figures.terminal import expert_table
from mixtral_lab.generate import Sampling
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.repl import Repl, _printable
from mixtral_lab.tokenizer import BPETokenizer

WHO, STORY = "Who are you?", "Tell me a story about a cat."
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def asked(*questions: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question} for question in questions]


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def dense():
    return mixtral_lab.load("mini-mistral", device="cpu")


@pytest.fixture
def conversation(lab):
    return Conversation(lab)


def tiny(lab: Lab, **changes) -> Lab:
    """Random weights, and the tokenizer of `lab`."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "hidden": 32}
    torch.manual_seed(0)
    return Lab(Transformer(dataclasses.replace(lab.config, **(shape | changes))).eval(), lab.tokenizer, "tiny")


def said(conversation: Conversation, text: str, **settings) -> str:
    return "".join(conversation.ask(text, **settings))


class TestConversation:
    def test_pieces_text_and_routing_are_those_of_the_lab(self, lab, conversation):
        streamed = said(conversation, WHO, max_new_tokens=30)
        assert streamed.strip() == lab.chat(asked(WHO), max_new_tokens=30) == conversation.messages[1]["content"]
        again = said(conversation, STORY, max_new_tokens=20)
        history = [*asked(WHO), conversation.messages[1], *asked(STORY)]
        assert again.strip() == lab.chat(history, max_new_tokens=20)
        expected = lab.trace_ids(lab.tokenizer.chat(history), 20)
        trace = conversation.trace()
        assert trace.ids.tolist() == expected.ids.tolist() and trace.n_prompt == expected.n_prompt
        assert torch.equal(trace.experts, expected.experts)
        assert conversation.used == len(trace)
        assert conversation.turns[1].ended == "ended by itself"
        assert conversation.turns[3].ended == "cut at the longest answer, 20 tokens"

    def test_an_answer_that_is_stopped_stays_as_it_was(self, lab, conversation):
        steps = conversation.ask(STORY)
        pieces = [next(steps) for _ in range(8)]
        assert conversation.busy
        with pytest.raises(ChatError, match="still being written"):
            conversation.ask(WHO)
        with pytest.raises(ChatError, match="still being written"):
            conversation.retry()
        conversation.stop()
        assert not conversation.busy and conversation.turns[-1].ended == "stopped"
        assert conversation.messages[-1]["content"] == "".join(pieces).strip()
        assert lab.chat(asked(STORY)).startswith(conversation.messages[-1]["content"])
        assert next(steps, None) is None

    def test_retry_answers_the_same_question_again(self, lab, conversation):
        with pytest.raises(ChatError, match="Nothing has been asked"):
            conversation.retry()
        said(conversation, WHO, max_new_tokens=4)
        drawn = Sampling(1.0, seed=5)
        "".join(conversation.retry(drawn, 12))
        assert conversation.messages[1:] == [
            {"role": "assistant", "content": lab.chat(asked(WHO), 12, temperature=1.0, seed=5)}
        ]
        steps = conversation.ask(STORY)
        next(steps)
        conversation.stop()  # before any word
        assert conversation.messages[-1]["content"] == ""
        assert "".join(conversation.retry(None, 6)).strip() == conversation.messages[-1]["content"] != ""
        assert len(conversation.turns) == 4

    def test_a_full_context_is_said_before_anything_is_lost(self, lab):
        conversation = Conversation(tiny(lab, context=40))
        said(conversation, WHO, sampling=Sampling(1.0, seed=1), max_new_tokens=100)
        assert conversation.turns[-1].ended == "cut at the model's limit of 40 tokens" and conversation.used == 40
        before = conversation.messages
        with pytest.raises(ChatError, match=r"has \d+ tokens, and tiny reads at most 40: .* start a new conversation"):
            conversation.ask(STORY * 5)
        assert conversation.messages == before and not conversation.busy
        conversation.clear()
        assert conversation.messages == []
        said(conversation, WHO, max_new_tokens=2)
        assert len(conversation.messages) == 2

    def test_system_stays_when_the_conversation_is_cleared(self, lab):
        conversation = Conversation(lab, system="Be brief.")
        said(conversation, WHO, max_new_tokens=2)
        assert conversation.prompt == lab.tokenizer.chat([{"role": "system", "content": "Be brief."}, *asked(WHO)])
        conversation.clear()
        assert conversation.messages == [{"role": "system", "content": "Be brief."}]

    def test_a_model_without_a_chat_format_says_so(self, lab):
        conversation = Conversation(Lab(lab.model, BPETokenizer(lab.tokenizer._backend, chat_template=None), "base"))
        assert conversation.cannot.startswith("base cannot hold a conversation.")
        with pytest.raises(ChatError, match="cannot hold a conversation"):
            conversation.ask(WHO)


class TestSave:
    def test_jsonl_is_one_record_of_messages(self, lab, tmp_path):
        conversation = Conversation(lab, system="Be brief.")
        said(conversation, "naïve\n日本 </s>", max_new_tokens=5)
        path = conversation.save(tmp_path / "chat.jsonl")
        (line,) = path.read_text("utf-8").splitlines()
        record = json.loads(line)
        assert record == {"messages": conversation.messages}
        lab.tokenizer.chat_training_ids(record["messages"])  # what fine-tuning reads
        assert [p.name for p in tmp_path.iterdir()] == ["chat.jsonl"]

    def test_markdown_reads_as_a_conversation(self, conversation, tmp_path):
        said(conversation, WHO, max_new_tokens=30)
        text = conversation.save(tmp_path / "chat.md").read_text("utf-8")
        assert text == f"## You\n\n{WHO}\n\n## mini-mixtral\n\n{conversation.messages[1]['content']}\n"

    def test_questions_without_an_answer_are_left_out(self, conversation, tmp_path):
        steps = conversation.ask(STORY)
        next(steps)
        conversation.stop()
        with pytest.raises(ChatError, match="nothing to save"):
            conversation.save(tmp_path / "a.jsonl")
        said(conversation, WHO, max_new_tokens=30)
        record = json.loads(conversation.save(tmp_path / "a.jsonl").read_text())
        assert record["messages"] == conversation.messages[2:]

    def test_only_its_own_unchanged_file_is_written_again(self, conversation, tmp_path):
        path = tmp_path / "chat.jsonl"
        said(conversation, WHO, max_new_tokens=3)
        conversation.save(path)
        said(conversation, STORY, max_new_tokens=3)
        assert conversation.saved(path)
        conversation.save(path)
        assert len(json.loads(path.read_text())["messages"]) == 4
        path.write_text("notes of mine")
        with pytest.raises(ChatError, match="exists and was left alone"):
            conversation.save(path)
        assert path.read_text() == "notes of mine"

    @pytest.mark.parametrize(
        ("name", "says"), [("chat.txt", "must end in .jsonl"), ("no/such/chat.md", "No such file"), ("chat", "must end in")]
    )  # fmt: skip
    def test_where_it_cannot_save_it_says_why(self, conversation, tmp_path, name, says):
        said(conversation, WHO, max_new_tokens=3)
        with pytest.raises(ChatError, match=says):
            conversation.save(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_a_folder_is_left_alone(self, conversation, tmp_path):
        said(conversation, WHO, max_new_tokens=3)
        (tmp_path / "chat.md").mkdir()
        with pytest.raises(ChatError, match="exists"):
            conversation.save(tmp_path / "chat.md")


class TestExpertTable:
    def printed(self, table, width: int) -> str:
        console = Console(
            file=io.StringIO(), width=width, highlight=False, force_terminal=True, color_system="truecolor"
        )
        console.print(table)
        return console.file.getvalue()

    def test_rows_are_tokens_and_cells_their_experts(self, lab):
        trace = lab.trace("The cat sat on", max_new_tokens=3)
        text = self.printed(expert_table(trace, 2, 200), 200)
        rows = [ESCAPES.sub("", row) for row in text.splitlines()]
        assert rows[0].split() == ["token", *(f"L{layer}" for layer in range(8))]
        assert len(rows) == 1 + len(trace) - 2
        _, experts, weights = trace.routing
        for at, row in enumerate(rows[1:], start=2):
            cells = [
                f"{a},{b} {100 * w:3.0f}".split()
                for (a, b), w in zip(experts[:, at].tolist(), weights[:, at, 0].tolist(), strict=True)
            ]
            assert row.split() == [str(at), trace.tokens[at], *(part for cell in cells for part in cell)]
        red, green, blue = (int(expert_colour(int(experts[0, 2, 0]))[i : i + 2], 16) for i in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}m" in text.splitlines()[1]

    def test_where_it_is_narrow_only_the_first_expert_is_named(self, lab):
        trace = lab.trace("The cat sat on")
        rows = ESCAPES.sub("", self.printed(expert_table(trace, width=50), 50)).splitlines()
        first = trace.experts[:, :, 0].T.tolist()
        assert [row.split()[2:] for row in rows[1:]] == [[str(e) for e in token] for token in first]


def repl(lab: Lab, *lines: str, sampling: Sampling | None = None, most: int = 12) -> tuple[Repl, str, str]:
    """What a chat prints on both ways for these lines, errors caught as `run` does."""
    out, err = (Console(file=io.StringIO(), width=120, highlight=False) for _ in range(2))
    made = Repl(Conversation(lab), out, err, sampling or Sampling(), most)
    made._lines = lambda: iter(lines)
    made.run()
    return made, out.file.getvalue(), err.file.getvalue()


class TestCommands:
    def test_route_shows_the_experts_of_the_last_answer_alone(self, lab):
        made, out, err = repl(lab, WHO, "/route")
        trace = made.conversation.trace()
        table = Console(file=io.StringIO(), width=120, highlight=False)
        table.print(expert_table(trace, trace.n_prompt, 120))
        assert out.endswith(table.file.getvalue()) and not made.failed
        assert "A cell names the experts" in err

    def test_route_before_an_answer_and_of_a_dense_model(self, lab, dense):
        made, _, err = repl(lab, "/route")
        assert made.failed and "nothing has been answered yet" in err
        _, _, err = repl(dense, WHO, "/route")
        assert "mini-mistral is a dense model: every token takes the same way, so there is no router to show." in err

    def test_unknown_commands_are_not_said_to_the_model(self, lab):
        made, out, err = repl(lab, "/foo bar")
        assert made.failed and out == "" and "There is no command /foo: /help lists them." in err
        assert made.conversation.messages == []
        made, *_ = repl(lab, " /foo", "/usr/bin or /bin?", "   ", "")
        assert [m["content"] for m in made.conversation.messages[::2]] == ["/foo", "/usr/bin or /bin?"]

    def test_help_lists_every_command(self, lab):
        made, out, _ = repl(lab, "/help", most=1)
        assert {*re.findall(r"^/(\w+)", out, re.MULTILINE)} == {*made._commands, "quit"}

    def test_new_and_system(self, lab):
        made, _, err = repl(lab, "/system", "/system Be brief.", WHO, "/new", "/system")
        assert made.conversation.messages == [{"role": "system", "content": "Be brief."}]
        assert err.split("\n")[:2] == ["There is no system message.", "System message: Be brief."]
        assert "A new conversation." in err
        made, _, err = repl(lab, "/system Be brief.", '/system ""')
        assert made.conversation.system is None and err.endswith("There is no system message.\n")

    def test_quit_ends(self, lab):
        made, *_ = repl(lab, "/quit", WHO)
        assert made.conversation.messages == [] and not made.failed

    def test_retry(self, lab):
        made, _, err = repl(lab, WHO, "/retry", most=30)
        assert made.failed and "At temperature 0 the same answer would come again: /retry 0.8" in err
        made, out, err = repl(lab, STORY, "/retry 1.5", most=8)
        assert len(made.conversation.messages) == 2 and len(out.splitlines()) >= 2
        assert made.conversation.messages[1]["content"] in out
        assert made.sampling.temperature == 0  # once, not from now on
        _, _, err = repl(lab, WHO, "/retry hot", "/retry -1", "/retry nan")
        assert err.count("is no temperature") == 3
        made, _, err = repl(lab, "/retry 0.8")
        assert "Nothing has been asked yet" in err

    def test_save_says_what_it_did(self, lab, tmp_path):
        path = tmp_path / "chat.md"
        _, _, err = repl(lab, "/save", f"/save {path}", WHO, f"/save {path}", f"/save {path}", most=30)
        said = err.replace("\n", "")
        assert "Name a file to save to" in said and "nothing to save" in said
        assert (
            f"Saved {path}.".replace(" ", "") in said.replace(" ", "")
            and "in place of what was saved there before" in said
        )
        other = tmp_path / "other.md"
        other.write_text("mine")
        _, _, err = repl(lab, WHO, f"/save {other}")
        assert "left alone" in err and other.read_text() == "mine"

    def test_what_a_reader_should_know_is_said(self, lab, dense):
        _, _, err = repl(lab, STORY, most=5)
        assert err == "(cut at the longest answer, 5 tokens)\n"
        _, _, err = repl(lab, WHO, most=30)
        assert err == ""
        _, _, err = repl(tiny(lab, context=40), WHO, STORY * 5, sampling=Sampling(1.0, seed=0), most=100)
        assert "(cut at the model's limit of 40 tokens)" in err and "/new begins one" in err
        assert "tiny reads at most 40" in err.replace("\n", " ")
        long = "Tell me more about it. " * 20
        _, _, err = repl(dense, long, WHO, most=3)
        assert err.count("What came earlier can only reach") == 1

    def test_control_characters_cannot_command_the_terminal(self):
        assert _printable("a\x1b[2Jb\rc\n\td\x07é日🙂") == "a�[2Jb�c\n\td�é日🙂"


class TestPipe:
    def test_answers_alone_go_to_the_output(self, lab, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "mixtral_lab.cli", "chat", "--device", "cpu", "--new", "30"],
            input=f"{WHO}\n\n/save {tmp_path / 'c.jsonl'}\n", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        answer = lab.chat(asked(WHO), max_new_tokens=30)
        assert (done.returncode, done.stdout) == (0, answer + "\n"), done.stderr
        assert json.loads((tmp_path / "c.jsonl").read_text())["messages"][1]["content"] == answer

    @pytest.mark.parametrize(
        ("words", "typed", "code", "says"),
        [
            (["--new", "3"], "/foo\n", 1, "There is no command /foo"),
            (["--new", "3"], f"{WHO}\n/quit\nmore\n", 0, ""),
            (["no-such"], "", 1, "Bundled models are"),
            (["--top-p", "0"], "", 1, "top_p is 0"),
            (["mini-mistral", "--new", "3"], f"{WHO}\n/route\n", 1, "dense model"),
        ],
    )
    def test_exit_status(self, words, typed, code, says):
        result = CliRunner().invoke(app, ["chat", "--device", "cpu", *words], input=typed)
        assert result.exit_code == code, result.output
        assert says in " ".join(result.output.split()) and "Traceback" not in result.output

    def test_a_model_that_cannot_talk(self, lab, monkeypatch):
        base = Lab(lab.model, BPETokenizer(lab.tokenizer._backend, chat_template=None), "base")
        monkeypatch.setattr(mixtral_lab, "load", lambda *_, **__: base)
        result = CliRunner().invoke(app, ["chat"], input="Hello\n")
        assert result.exit_code == 1 and "base cannot hold a conversation" in result.output


class Terminal:
    """A chat in a pseudo-terminal, as a person has it."""

    def __init__(self, *words: str) -> None:
        self.text = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background run ignores it, and hands that on
            os.environ.update(TERM="xterm", COLUMNS="100", LINES="40", OMP_NUM_THREADS="1", PYTHON_READLINE="")
            os.execv(sys.executable, [sys.executable, "-m", "mixtral_lab.cli", "chat", "--device", "cpu", *words])

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What comes up to and with the first match; later calls see only what follows."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.text)) is None:
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.text!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    new = os.read(self.fd, 65536)
                except OSError:
                    raise AssertionError(f"ended without {pattern!r}: {self.text!r}") from None
                self.text = self.text + ESCAPES.sub("", new.decode("utf-8", "replace"))
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self, seconds: float = 20) -> int:
        """The exit status, once it has ended by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it did not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal():
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


class TestTerminal:
    def test_a_conversation(self, terminal, lab):
        chat = terminal("--new", "30")
        chat.until(r"/help lists the commands\.")
        chat.until("> ")
        chat.type(WHO + "\r")
        answer = lab.chat(asked(WHO), max_new_tokens=30)
        chat.until(re.escape(answer))
        chat.until("> ")
        chat.type("\x1b[A")  # readline's history: the question again
        chat.until(re.escape(WHO))
        chat.type("\x15/route\r")
        chat.until(r"L7\s")
        chat.until("A cell names the experts")
        chat.until("> ")
        chat.type("\x04")
        assert chat.end() == 0

    def test_ctrl_c_ends_an_answer_and_what_was_said_is_kept(self, terminal, lab, tmp_path):
        path = tmp_path / "chat.jsonl"
        chat = terminal("--new", "1500", "--temperature", "1.5")
        chat.until("> ")
        for _ in range(12):  # answers are drawn, and one in six is too short to be stopped
            chat.type(STORY + "\r")
            if not chat.until(r"\n(\S+ +){6}|\n\S*> ").endswith("> "):
                break
        chat.type("\x03")
        chat.until(r"\(stopped\)")
        chat.until("> ")
        chat.type(f"/save {path}\r")
        chat.until(r"Saved")
        kept = json.loads(path.read_text())["messages"][-1]["content"]
        assert len(kept.split()) >= 5
        chat.until("> ")
        time.sleep(1)  # Python misses a Ctrl-C between printing a prompt and listening
        chat.type("\x03")  # at an empty prompt: once is no end yet
        chat.until("Ctrl-D or /quit ends")
        chat.until("> ")
        chat.type("/quit\r")
        assert chat.end() == 0
