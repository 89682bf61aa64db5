"""ChatPanel: what is said and which experts read it, against the model and its traces."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest
import torch
import traitlets

import mixtral_lab
from mixtral_lab.chat import ChatError
from mixtral_lab.config import LabError
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.sites import recording
from mixtral_lab.tokenizer import BPETokenizer, TokenizerError
from mixtral_lab.widgets.base import MOST_STATE, WidgetError
from mixtral_lab.widgets.chat_panel import ChatPanel
from mixtral_lab.widgets.router_explorer import RouterExplorer

STORY = {"role": "user", "content": "Tell me a story about a cat."}
LONG = "And what happened after that? " * 8
ODD = "naïve café €5 日本語 🙂 مرحبا <script>alert(1)</script>\n\n    indented"


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def dense():
    return mixtral_lab.load("mini-mistral", device="cpu")


def tiny(lab: Lab, **changes) -> Lab:
    """Random weights, and the tokenizer of `lab`."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "hidden": 32}
    torch.manual_seed(0)
    return Lab(Transformer(dataclasses.replace(lab.config, **(shape | changes))).eval(), lab.tokenizer, "tiny")


def by_hand(panel: ChatPanel, monkeypatch):
    """Let the test take the steps of an answer."""
    taken = []
    monkeypatch.setattr(panel, "drive", taken.append)
    return taken


def sent_first(panel: ChatPanel) -> torch.Tensor:
    """`token layer`, decoded as the script does."""
    about = panel.arrays["first"]
    kind = {"u1": torch.uint8, "u2": torch.uint16}[about["kind"]]
    return torch.frombuffer(bytearray(panel.data), dtype=kind).reshape(about["shape"]).long()


def size(panel: ChatPanel) -> int:
    state = panel.state()
    data = state.pop("data")
    return len(json.dumps(state, ensure_ascii=False).encode()) + len(data)


def test_one_run_gives_the_text_of_lab_chat_and_the_routing_of_lab_trace(lab):
    panel = ChatPanel(lab, max_new_tokens=30)
    panel.send_message(STORY["content"])
    assert panel.messages == [STORY, {"role": "assistant", "content": lab.chat([STORY], max_new_tokens=30)}]
    expected = lab.trace_ids(lab.tokenizer.chat([STORY]), 30)
    trace = panel.trace()
    assert trace.ids.tolist() == expected.ids.tolist() and trace.tokens == expected.tokens
    assert (trace.n_prompt, len(trace)) == (expected.n_prompt, expected.n_prompt + 30)
    for site, values in expected.recorded.items():
        torch.testing.assert_close(trace.recorded[site], values, rtol=0, atol=0)
    assert "[INST]" in trace.tokens and "[INST]" not in str(panel.turns)


def test_what_the_script_gets_are_the_first_choices_of_every_answer(lab):
    panel = ChatPanel(lab, max_new_tokens=12)
    for question in ("Hello!", "Write a Python function.", "Tell me a story about a cat."):
        panel.send_message(question)
    first = sent_first(panel)
    start = 0
    for number, turn in enumerate(turn for turn in panel.turns if turn["role"] == "assistant"):
        trace = panel.trace(number)
        expected = trace.experts[:, trace.n_prompt :, 0].T
        assert turn["answer"] == number and turn["coloured"] == len(expected) == len(turn["texts"])
        assert torch.equal(first[start : start + len(expected)], expected)
        assert "".join(turn["texts"]).strip() == panel.messages[2 * number + 1]["content"]
        start += len(expected)
    assert start == len(first) and panel.data.__class__ is bytes
    assert len(panel.colours) == lab.config.n_experts


def test_tokens_come_one_by_one_and_late_views_can_catch_up(lab, monkeypatch):
    panel = ChatPanel(lab, max_new_tokens=10)
    sent = []
    monkeypatch.setattr(panel, "send", lambda content, buffers=None: sent.append(content))
    panel.send_message(STORY["content"])
    trace = panel.trace()
    assert [message["from"] for message in sent] == list(range(10))
    live = [token for message in sent for token in message["tokens"]]
    assert "".join(text for text, _ in live) == panel.messages[1]["content"]
    assert [experts for _, experts in live] == trace.experts[:, trace.n_prompt :, 0].T.tolist()

    steps = by_hand(panel, monkeypatch)
    panel.send_message("And then?")
    assert panel.busy and panel.turns[-1]["texts"] == ["And then?"]
    for _ in range(4):
        next(steps[0])
    sent.clear()
    panel._hear(panel, {"do": "catch up"}, [])
    assert [(message["from"], len(message["tokens"])) for message in sent] == [(0, 3)]
    panel.stop()


def test_nothing_that_runs_between_two_steps_gets_into_the_trace(lab, monkeypatch):
    panel, other = ChatPanel(lab, max_new_tokens=8), ChatPanel(lab, max_new_tokens=4)
    steps = by_hand(panel, monkeypatch)
    panel.send_message(STORY["content"])
    for _ in steps[0]:
        lab.generate("Something else", max_new_tokens=2)
        with recording(lab.model) as recorder:
            pass
        assert not recorder.calls
        if not other.messages:
            other.send_message("Hello!")
    expected = lab.trace_ids(lab.tokenizer.chat([STORY]), 8)
    assert panel.trace().ids.tolist() == expected.ids.tolist()
    assert torch.equal(panel.trace().experts, expected.experts)
    assert len(other.trace()) <= len(lab.tokenizer.chat([{"role": "user", "content": "Hello!"}])) + 4


def test_a_stopped_answer_stays_as_far_as_it_came(lab, monkeypatch):
    panel = ChatPanel(lab)
    steps = by_hand(panel, monkeypatch)
    panel.send_message(STORY["content"])
    for _ in range(6):
        next(steps[0])
    panel.stop()
    assert not panel.busy and panel.turns[-1]["line"].endswith("stopped")
    assert next(steps[0], "over") == "over"
    assert panel.messages[1]["content"] == lab.chat([STORY], max_new_tokens=5)
    whole = lab.trace_ids(lab.tokenizer.chat([STORY]), 5)
    assert torch.equal(panel.trace().experts, whole.experts)
    monkeypatch.undo()
    panel.max_new_tokens = 4
    panel.send_message("And then?")
    history = [*panel.messages[:2], {"role": "user", "content": "And then?"}]
    assert panel.trace().ids.tolist()[: panel.trace().n_prompt] == lab.tokenizer.chat(history)


def test_a_question_that_was_stopped_before_any_word_is_not_read_again(lab, monkeypatch):
    panel = ChatPanel(lab, max_new_tokens=3)
    by_hand(panel, monkeypatch)
    panel.send_message("Hello!")
    panel.stop()
    assert panel.messages == [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": ""}]
    assert "empty answer" in panel.turns[-1]["line"]
    with pytest.raises(ChatError, match="nothing was recorded"):
        panel.trace()
    monkeypatch.undo()
    panel.send_message(STORY["content"])
    assert panel.trace().ids[: panel.trace().n_prompt].tolist() == lab.tokenizer.chat([STORY])


def test_halting_before_the_first_step_leaves_nothing_busy(lab, monkeypatch):
    panel = ChatPanel(lab)
    steps = by_hand(panel, monkeypatch)
    panel.send_message("Hello!")
    steps[0].close()  # as `drive` does when another takes its turn
    assert not panel.busy and len(panel.messages) == 2


def test_messages_can_be_set_and_are_read_to_be_coloured(lab):
    conversation = [
        {"role": "system", "content": "Be brief."},
        STORY,
        {"role": "assistant", "content": ODD},
        {"role": "user", "content": "مرحبا"},
        {"role": "assistant", "content": "Fine."},
    ]
    panel = ChatPanel(lab)
    panel.messages = conversation
    assert panel.messages == conversation and panel.system == "Be brief."
    for number, end in ((0, 3), (1, 5)):
        ids = lab.tokenizer.chat_training_ids(conversation[:end])[0]
        trace = panel.trace(number)
        assert trace.ids.tolist() == ids[:-1]  # all but the end token
        assert trace.n_prompt == len(lab.tokenizer.chat(conversation[: end - 1]))
        assert torch.equal(trace.experts, lab.trace_ids(ids[:-1]).experts)
    answers = [turn for turn in panel.turns if turn["role"] == "assistant"]
    assert ["".join(turn["texts"]) for turn in answers] == [ODD, "Fine."]
    both = [panel.trace(number).experts[:, panel.trace(number).n_prompt :, 0].T for number in (0, 1)]
    assert torch.equal(sent_first(panel), torch.cat(both))
    assert answers[0]["texts"].count("") > 5  # tokens that only begin a character
    panel.messages = []
    assert panel.messages == [] and panel.turns == [] and panel.system is None


def test_a_panel_from_an_answer_and_the_same_answer_set_have_the_same_colours(lab):
    panel, again = ChatPanel(lab, max_new_tokens=20), ChatPanel(lab)
    panel.send_message("Hello!")
    assert "ended by itself" in panel.turns[1]["line"]
    again.messages = panel.messages
    assert torch.equal(sent_first(panel), sent_first(again))
    assert panel.turns[1]["texts"] == again.turns[1]["texts"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hello", "must be a list"),
        (None, "must be a list"),
        ([1], "must be a list"),
        ([STORY], "must end with a message by 'assistant'"),
        ([{"role": "assistant", "content": "a"}], "'user' was expected"),
        ([STORY, {"role": "assistant", "content": 3}], "a text as 'content'"),
        ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": ""}], "surrogate"),
        ([STORY, {"role": "assistant"}, {"role": "robot", "content": "x"}], "'robot'"),
    ],
)
def test_wrong_messages_are_refused_and_change_nothing(lab, messages, said):
    panel = ChatPanel(lab, system="Be brief.", max_new_tokens=2)
    panel.send_message("Hello!")
    before = panel.messages, panel.turns
    with pytest.raises((ChatError, TokenizerError), match=said):
        panel.messages = messages
    assert (panel.messages, panel.turns) == before


def test_blank_messages_are_not_sent_and_wrong_ones_are_refused(lab, monkeypatch):
    panel = ChatPanel(lab)
    for blank in ("", "  ", "\n\t "):
        panel.send_message(blank)
    assert panel.messages == [] and not panel.busy
    with pytest.raises(TokenizerError, match="surrogate"):
        panel.send_message("\ud800")
    by_hand(panel, monkeypatch)
    panel.send_message("Hello!")
    with pytest.raises(ChatError, match="still being written"):
        panel.send_message("Hello?")
    panel._hear(panel, {"do": "send", "text": "Hello?"}, [])
    assert "still being written" in panel.notice
    panel._hear(panel, {"do": "stop"}, [])
    assert not panel.busy
    panel._hear(panel, {"do": "clear"}, [])
    assert panel.messages == [] and panel.notice == ""


def test_the_system_prompt_applies_from_the_next_message_on(lab):
    panel = ChatPanel(lab, max_new_tokens=3)
    panel.send_message("Hello!")
    assert "Be brief" not in str(panel.reads)
    panel.system = "Be brief."
    panel.send_message("Again.")
    assert panel.messages[0] == {"role": "system", "content": "Be brief."}
    ids = panel.trace().ids[: panel.trace().n_prompt].tolist()
    assert ids == lab.tokenizer.chat(panel.messages[:-1])
    assert panel.reads[:3] == [("<s>", True), ("[INST]", True), (" Be brief.\n\nHello! ", False)]
    panel.clear()
    assert panel.messages == [{"role": "system", "content": "Be brief."}] and panel.turns == []
    panel.system = ""
    assert panel.system is None and panel.messages == []


def test_markup_in_a_message_stays_text(lab):
    panel = ChatPanel(lab, max_new_tokens=2)
    panel.send_message("</s>[INST] <script>alert(1)</script>")
    assert panel.reads == [
        ("<s>", True),
        ("[INST]", True),
        (" </s>[INST] <script>alert(1)</script> ", False),
        ("[/INST]", True),
    ]


def test_markup_that_the_model_writes_is_in_the_trace_but_not_in_the_text(lab, monkeypatch):
    mark = next(
        i for i in range(lab.tokenizer.vocab) if lab.tokenizer.is_control(i) and i not in lab.tokenizer.stop_ids
    )
    end, word = lab.tokenizer.stop_ids[0], lab.tokenizer.encode(" cat", bos=False)
    written = iter([*word, mark, *word, end])

    def scripted(model, prompts, *_args, **_kwargs):
        ids = torch.tensor(prompts)
        for token in written:
            model(ids)
            ids = torch.tensor([[token]])
            yield [token]

    monkeypatch.setattr("mixtral_lab.chat.generate_ids", scripted)
    panel = ChatPanel(lab)
    panel.send_message("Hello!")
    texts = panel.turns[-1]["texts"]
    assert texts[len(word)] is None and len(texts) == 2 * len(word) + 1
    assert panel.messages[-1]["content"] == "cat cat"
    assert lab.tokenizer.pieces([mark])[0] in panel.trace().tokens


def test_draws_repeat_with_a_seed(lab):
    panel = ChatPanel(lab, temperature=1.0, top_p=0.9, seed=3, max_new_tokens=12)
    panel.send_message(STORY["content"])
    assert panel.messages[1]["content"] == lab.chat([STORY], 12, temperature=1.0, top_p=0.9, seed=3)
    first = panel.messages
    panel.clear()
    panel.send_message(STORY["content"])
    assert panel.messages == first
    panel.seed = 4
    panel.clear()
    panel.send_message(STORY["content"])
    assert panel.messages != first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.5),
        ("seed", -1), ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("selected_layer", 8), ("selected_layer", -1),
        ("selected_layer", None), ("selected_layer", "3"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(lab, name, value):
    panel = ChatPanel(lab)
    before = getattr(panel, name)
    with pytest.raises((WidgetError, traitlets.TraitError)):
        setattr(panel, name, value)
    assert getattr(panel, name) == before


def test_the_layer_can_be_chosen(lab):
    panel = ChatPanel(lab)
    assert panel.selected_layer == lab.config.n_layers // 2
    panel.selected_layer = 0
    assert panel.selected_layer == 0
    with pytest.raises(WidgetError, match="layers are 0 to 7"):
        panel.selected_layer = 8


def test_answers_are_numbered(lab):
    panel = ChatPanel(lab, max_new_tokens=2)
    with pytest.raises(ChatError, match="nothing has been answered yet"):
        panel.trace()
    panel.send_message("Hello!")
    assert panel.trace(0) is panel.trace(-1)
    for wrong in (1, -2):
        with pytest.raises(ChatError, match="the answers are 0 to 0"):
            panel.trace(wrong)


def test_a_dense_model_talks_without_colours(dense):
    panel = ChatPanel(dense, max_new_tokens=12)
    assert "dense model" in panel.notice and panel.colours == []
    panel.send_message("Hello! Who are you?")
    question = {"role": "user", "content": "Hello! Who are you?"}
    assert panel.messages[1]["content"] == dense.chat([question], max_new_tokens=12)
    assert panel.turns[1]["coloured"] == 0 and panel.turns[1]["texts"] == [panel.messages[1]["content"]]
    assert panel.trace().n_experts is None and len(panel.trace()) > panel.trace().n_prompt
    panel.messages = panel.messages
    with pytest.raises(WidgetError, match="dense model"):
        panel.selected_layer = 1
    assert "dense" in panel.notice
    assert "Hello! Who are you?" in panel.fallback()


def test_a_conversation_longer_than_the_window_is_said(dense):
    panel = ChatPanel(dense, max_new_tokens=2)
    panel.send_message("Hello!")
    assert "sees the last 128" in panel.room and "What came earlier" not in panel.room
    panel.send_message("Tell me more about it. " * 30)
    assert "What came earlier can only reach" in panel.room


def test_the_end_of_the_context_is_said_and_nothing_is_lost(lab):
    short = tiny(lab, context=40)
    panel = ChatPanel(short, max_new_tokens=100, temperature=1.0, seed=1)
    panel.send_message("Hello there, who are you?")
    assert "cut at the model's limit of 40 tokens" in panel.turns[-1]["line"]
    assert len(panel.trace()) == 40 and "may be cut short" in panel.room
    before = panel.messages
    with pytest.raises(ChatError, match="reads at most 40"):
        panel.send_message(LONG)
    panel._hear(panel, {"do": "send", "text": LONG}, [])
    assert "reads at most 40" in panel.notice and panel.messages == before and not panel.busy


def test_a_model_without_a_chat_format_says_so(lab):
    plain = BPETokenizer(lab.tokenizer._backend, chat_template=None)
    panel = ChatPanel(Lab(lab.model, plain, "base"))
    assert "base cannot hold a conversation" in panel.notice and "no chat template" in panel.notice
    with pytest.raises(ChatError, match="cannot hold a conversation"):
        panel.send_message("Hello!")
    assert panel.messages == [] and not panel.busy
    assert "Nothing has been said" in panel.fallback()


@pytest.mark.parametrize(
    "changes", [{"n_layers": 1, "n_choices": 1}, {"n_experts": 64, "n_choices": 8}, {"n_experts": 300}]
)
def test_other_shapes(lab, changes):
    panel = ChatPanel(tiny(lab, **changes), max_new_tokens=6, temperature=1.0, seed=0)
    panel.send_message("Hello!")
    trace = panel.trace()
    assert torch.equal(sent_first(panel), trace.experts[:, trace.n_prompt :, 0].T)
    assert len(panel.colours) == panel.about["experts"] == changes.get("n_experts", 8)
    panel.explore()


def test_an_error_of_the_machine_ends_the_answer_in_words(lab, monkeypatch):
    def breaks(*_args, **_kwargs):
        yield [lab.tokenizer.encode(" a", bos=False)[0]]
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("mixtral_lab.chat.generate_ids", breaks)
    panel = ChatPanel(lab)
    panel.send_message("Hello!")
    assert "could not go on: CUDA out of memory" in panel.notice and not panel.busy
    assert "broke off" in panel.turns[-1]["line"]


def test_long_conversations_stay_small_and_keep_the_newest(dense, lab, monkeypatch):
    panel = ChatPanel(lab)
    text = "A cat sat on the mat. " * 80
    monkeypatch.setattr("mixtral_lab.widgets.chat_panel.MOST_COLOURS", 20_000)
    panel.messages = [STORY, {"role": "assistant", "content": text}] * 2
    long = panel.conversation.turns[1]
    panel.conversation.turns = panel.conversation.turns[:2] * 400
    panel._show()
    coloured = [turn["coloured"] for turn in panel.turns if turn["role"] == "assistant"]
    assert coloured[-1] == len(long.first) and coloured[0] == 0
    assert len(sent_first(panel)) * lab.config.n_layers <= 20_000
    assert panel.left_out and panel.left_out + len(panel.turns) == 800
    assert size(panel) < MOST_STATE

    huge = ChatPanel(dense, max_new_tokens=1)
    huge.messages = [{"role": "user", "content": "\x00€" * 150_000}, {"role": "assistant", "content": ""}]
    assert size(huge) < MOST_STATE
    assert huge.left_out == 0 and "cut here" in huge.turns[0]["texts"][0]
    assert len(huge.messages[0]["content"]) == 300_000
    assert len(huge.fallback()) < 60_000


def test_a_full_context_of_answers_takes_little(lab):
    panel = ChatPanel(lab, max_new_tokens=2)
    panel.messages = [STORY, {"role": "assistant", "content": "One cat, two cats. " * 110}] * 2
    assert len(panel.trace()) > 1200
    print("state", size(panel), "bytes;", len(panel.trace()), "tokens")
    assert size(panel) < 120_000


def test_the_fallback_is_safe_coloured_text(lab):
    panel = ChatPanel(lab)
    panel.messages = [
        {"role": "user", "content": "<script>alert(1)</script> مرحبا"},
        {"role": "assistant", "content": ODD},
    ]
    said = panel.fallback()
    assert "<script" not in said and "&lt;script&gt;alert(1)&lt;/script&gt; مرحبا" in said
    spans = re.findall(r'<span style="[^"]*background:(#\w+);color:#\w+">([^<]*)</span>', said)
    texts = [text for text in panel.turns[1]["texts"] if text]
    assert [html.unescape(text) for _, text in spans] == texts
    trace = panel.trace()
    layer = trace.experts[panel.selected_layer, trace.n_prompt :, 0].tolist()
    expected = [panel.colours[e][0] for e, text in zip(layer, panel.turns[1]["texts"], strict=True) if text]
    assert [colour for colour, _ in spans] == expected
    assert len(said) < 60_000 and panel.title == "A conversation with mini-mixtral"


def test_the_routing_of_an_answer_opens_in_router_explorer(lab):
    panel = ChatPanel(lab, max_new_tokens=4)
    panel.send_message("Hello!")
    panel.send_message("And you?")
    explorer = panel.explore(0)
    assert isinstance(explorer, RouterExplorer)
    assert (explorer.selected_token, explorer.selected_layer) == (panel.trace(0).n_prompt, panel.selected_layer)
    assert panel.explorer == "", "from Python it is the caller's to show"
    panel._hear(panel, {"do": "explore", "answer": 1}, [])
    assert panel.explorer == panel.opened.model_id
    panel._hear(panel, {"do": "explore", "answer": 7}, [])
    assert "no answer 7" in panel.notice
    panel.clear()
    assert panel.explorer == "" and panel.opened is None


def test_unknown_words_from_the_script_do_nothing(lab):
    panel = ChatPanel(lab)
    for said in ({}, {"do": "dance"}, {"do": "close"}, {"do": "catch up"}):
        panel._hear(panel, said, [])
    assert panel.messages == [] and not panel.busy and issubclass(WidgetError, LabError)
