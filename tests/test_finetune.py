"""Fine-tuning: what is accepted as data, what is learned from it, and a run that can be stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import mixtral_lab
from mixtral_lab import lora
from mixtral_lab.cli import app
from mixtral_lab.config import PRESETS
from mixtral_lab.lab import Lab
from mixtral_lab.lora import PARTS, LoRA
from mixtral_lab.model import Transformer
from mixtral_lab.tokenizer import MistralCommonTokenizer
from mixtral_lab.train import finetune as tuning
from mixtral_lab.train.finetune import DataError, Example, FineTuningError, Recipe, finetune
from mixtral_lab.train.pretrain import initialise
from mixtral_lab.weights import save_model

TINY = replace(
    PRESETS["mini-mixtral"].config, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=24, context=128
)
MINE = LoRA(rank=4, alpha=8, parts=PARTS)
FAST = Recipe(epochs=2, batch_size=2, accumulate=2, lr=1e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return mixtral_lab.load("mini-mixtral", device="cpu").tokenizer


def tiny(tokenizer) -> Lab:
    model = Transformer(TINY)
    initialise(model, seed=3)
    return Lab(model.eval().requires_grad_(False), tokenizer, "tiny", "tiny")


@pytest.fixture
def lab(tokenizer) -> Lab:
    return tiny(tokenizer)


def said(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


CONVERSATIONS = [said(f"What is {n} and {n}?", f"It is {2 * n}, captain!") for n in range(10)]


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "train.jsonl", CONVERSATIONS)


@pytest.fixture
def examples(tokenizer):
    return tuning.as_examples([record["messages"] for record in CONVERSATIONS], tokenizer, 128)


# --- Data -----------------------------------------------------------------------------------------

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
BAD = {
    "not JSON": (b'{"messages": [', "It is not JSON: Expecting value at character 15."),
    "two on a line": (b'{"messages": []} {"messages": []}', "It is not JSON: Extra data at character 18."),
    "too deep": (b"[" * 100_000, "It is not JSON"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "It is not UTF-8: byte 15 of the line cannot be read."),
    "a list": ([1], 'It is a list, but {"messages": [...]} was expected.'),
    "a text": ("hi", "It is a text"),
    "null": (None, "It is a null"),
    "no messages": ({"text": "hi", "id": 3}, "It has no \"messages\"; it has 'text', 'id'."),
    "empty record": ({}, 'It has no "messages"; it has nothing.'),
    "messages is a text": ({"messages": "hi"}, '"messages" is a text, but a list was expected.'),
    "no message": ({"messages": []}, "must end with a message by 'assistant', but there is no message"),
    "message is a text": ({"messages": [U, "hi"]}, 'Message 2 is a text, but a record with "role" and "content"'),
    "no role": ({"messages": [{"content": "x"}, A]}, 'Message 1 has no "role".'),
    "no content": ({"messages": [U, {"role": "assistant"}]}, 'Message 2 has no "content".'),
    "unknown role": ({"messages": [U, {"role": "bot", "content": "x"}]}, "Message 2 is by 'bot', but a role is one of system,"),
    "role is a list": ({"messages": [{"role": ["user"], "content": "x"}, A]}, "Message 1 is by ['user'], but"),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, A]}, "has a list as content"),
    "content is null": ({"messages": [U, {"role": "assistant", "content": None}]}, "has a null as content"),
    "two questions": ({"messages": [U, U, A]}, "Message 2 is by 'user', but 'assistant' was expected"),
    "the assistant begins": ({"messages": [A, U, A]}, "Message 1 is by 'assistant', but 'user' was expected"),
    "late system": ({"messages": [U, {"role": "system", "content": "x"}, A]}, "Message 2 is by 'system'"),
    "ends with a question": ({"messages": [U, A, U]}, "must end with a message by 'assistant', but the last is by 'user'"),
    "empty answer": (said("Hi", "  \n"), "Message 2 is an empty answer"),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    "too long": (said("Hi", "word " * 300), "tokens, but a conversation may have 128: shorten or split it."),
    "tools": ({"tools": [{"type": "function"}], "messages": [U, A]}, 'It has "tools"'),
    "tool result": ({"messages": [U, {"role": "tool", "content": "3"}]}, "Message 2 is about tools"),
    "tool call": ({"messages": [U, {"role": "assistant", "tool_calls": [{}]}]}, "Message 2 is about tools"),
    "weight of a question": ({"messages": [U | {"weight": 1}, A]}, "Message 1 has a weight, but only the assistant's"),
    "half a weight": (said("Hi", "Hello", weight=0.5), "has weight 0.5, but 0 (not learned) or 1 was expected."),
    "weight is true": (said("Hi", "Hello", weight=True), "has weight True"),
    "nothing to learn": (said("Hi", "Hello", weight=0), "there is nothing to learn"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_each_problem_is_one_sentence_with_its_line(what, tokenizer, tmp_path):
    bad, message = BAD[what]
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    good = json.dumps(CONVERSATIONS[0]).encode()
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(DataError) as caught:
        tuning.read_conversations(path, tokenizer, 128)
    ((number, sentence),) = caught.value.problems
    assert number == 3 and message in sentence and sentence.endswith(".") and "\n" not in sentence
    assert str(caught.value) == f"{path} has a problem; nothing was trained.\n  line 3: {sentence}"


def test_all_problems_are_listed_and_of_very_many_the_first(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [CONVERSATIONS[0], {}, CONVERSATIONS[1], [], *[{}] * 30])
    with pytest.raises(DataError) as caught:
        tuning.read_conversations(path, tokenizer, 128)
    assert [line for line, _ in caught.value.problems] == [2, *range(4, 35)]
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} has problems in 32 lines; nothing was trained."
    assert len(lines) == 1 + tuning.MOST_PROBLEMS + 1 and lines[-1] == "  and 12 more."


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_an_empty_file_and_one_that_is_not_there(content, tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        tuning.read_conversations(path, tokenizer, 128)
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no conversation"):
        tuning.read_conversations(path, tokenizer, 128)


def test_windows_files_are_read(tokenizer, tmp_path, data, examples):
    other = tmp_path / "windows.jsonl"
    other.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n"))
    assert tuning.read_conversations(other, tokenizer, 128) == examples


@settings(max_examples=40)
@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "role", "content", "weight", "tools"]), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_line_gives_anything_but_a_data_error(tokenizer, tmp_path_factory, line):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    path.write_bytes(line.replace(b"\n", b" ") + b"\n" + json.dumps(said("a", "b")).encode())
    try:
        tuning.read_conversations(path, tokenizer, 128)
    except DataError as error:
        assert [number for number, _ in error.problems] == [1]


# --- What is learned ------------------------------------------------------------------------------

LONG = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi </s> [/INST]"},
    {"role": "assistant", "content": "Hello there."}, {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]  # fmt: skip


def learned_text(tokenizer, example: Example) -> list[str]:
    """The learned tokens' text, an item for each unbroken row of them."""
    rows, before = [], False
    for token, now in zip(example.ids, example.learned, strict=True):
        if now and not before:
            rows.append([])
        if now:
            rows[-1].append(token)
        before = now
    return ["".join("</s>" if i == tokenizer.eos_id else tokenizer.decode([i]) for i in row) for row in rows]


def test_only_the_assistants_words_and_ends_are_learned(tokenizer):
    (example,) = tuning.as_examples([LONG], tokenizer, 128)
    assert learned_text(tokenizer, example) == [" Hello there.</s>", " Goodbye.</s>"]
    quiet = [m | {"weight": 0} if m["content"] == "Hello there." else m for m in LONG]
    (example,) = tuning.as_examples([quiet], tokenizer, 128)
    assert learned_text(tokenizer, example) == [" Goodbye.</s>"]


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
def test_mistrals_own_tokenizers_know_what_the_assistant_wrote(version):
    mistral = MistralCommonTokenizer.from_version(version)
    ids, learned = mistral.chat_training_ids(LONG)
    words = [text.replace(" ", "") for text in learned_text(mistral, Example(tuple(ids), tuple(learned)))]
    assert words == ["Hellothere.</s>", "Goodbye.</s>"]
    prompt = mistral.chat(LONG[:4])
    assert ids[: len(prompt)] == prompt and all(learned[len(prompt) :])


def test_a_tokenizer_without_a_chat_format_says_so_once(tokenizer, data):
    from mixtral_lab.tokenizer import BPETokenizer, TokenizerError

    silent = BPETokenizer(tokenizer._backend, chat_template=None)
    with pytest.raises(TokenizerError, match="no chat template"):
        tuning.read_conversations(data, silent, 128)


def loss_by_hand(lab: Lab, examples) -> float:
    """Each conversation alone, each learned token alone, in double precision."""
    total, count = 0.0, 0
    for example in examples:
        probabilities = lab.logits(torch.tensor([example.ids]))[0].double().softmax(-1)
        for place in range(1, len(example.ids)):
            if example.learned[place]:
                total -= float(np.log(probabilities[place - 1, example.ids[place]].item()))
                count += 1
    return total / count


@settings(max_examples=6)
@given(st.integers(1, 10), st.integers(1, 5))
def test_the_loss_is_over_the_assistants_tokens_however_they_are_batched(tokenizer, number, batch_size):
    lab = tiny(tokenizer)
    records = [LONG, *[record["messages"] for record in CONVERSATIONS]][:number]
    examples = tuning.as_examples(records, tokenizer, 128)
    assert tuning.held_out_loss(lab, examples, batch_size) == pytest.approx(loss_by_hand(lab, examples), abs=1e-5)


def test_padding_and_unlearned_tokens_have_no_say_in_the_gradient(lab):
    """The gradient of B by the loop's own step equals that of a loss written out for each conversation alone."""
    examples = tuning.as_examples([LONG, said("Hi", "Yes")["messages"]], lab.tokenizer, 128)

    def gradients(loss_of):
        fresh = lora.new_adapter(TINY, MINE)
        own = {name: torch.nn.Parameter(tensor) for name, tensor in fresh.tensors().items()}
        with lora.attached(lab.model, lora.with_tensors(fresh, own)):
            loss_of().backward()
        return {name: p.grad for name, p in own.items() if p.grad is not None}

    def padded_loss():
        return tuning.token_losses(lab.model, *tuning.padded(examples, 3, lab.device)).mean()

    def plain_loss():
        losses = []
        for example in examples:
            ids, learned = torch.tensor([example.ids]), torch.tensor(example.learned)
            logs = lab.model(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            losses.append(-logs[learned[1:]])
        return torch.cat(losses).mean()

    ours, plain = gradients(padded_loss), gradients(plain_loss)
    assert plain and all(torch.allclose(ours[name], grad, atol=1e-6) for name, grad in plain.items())
    extra = {name: grad for name, grad in ours.items() if name not in plain}  # experts that padding alone has chosen
    assert all(not grad.any() for grad in extra.values())


def test_accumulated_batches_make_the_step_of_one_large_batch(examples, tokenizer, tmp_path):
    """The mean is over all learned tokens of a step: batches of unlike lengths must not weigh alike."""
    found = []
    for folder, recipe in (("a", Recipe(1, 8, 1, 1e-2)), ("b", Recipe(1, 2, 4, 1e-2))):
        finetune(tiny(tokenizer), examples[:8], examples[8:], tmp_path / folder, MINE, recipe)
        found.append(load_file(tmp_path / folder / tuning.STATE))
    grads = [{n: t for n, t in state.items() if n.startswith("exp_avg.")} for state in found]
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1].get(name, torch.zeros_like(grad)), grad, atol=1e-6), name


def test_split_is_a_partition_and_repeatable(examples):
    train, held = tuning.split(examples, 0.3, seed=4)
    assert len(held) == 3 and sorted(map(hash, train + held)) == sorted(map(hash, examples))
    assert tuning.split(examples, 0.3, seed=4) == (train, held)
    assert len(tuning.split(examples, 0.001, 0)[1]) == 1
    thrice = [example for example in examples for _ in range(3)]
    train, held = tuning.split(thrice, 0.3, seed=4)
    assert len(held) == 3 and len(train) == 3 * (len(examples) - 3) and not set(train) & set(held)
    for few, share in (
        (examples[:1], 0.1),
        (examples[:1] * 5, 0.2),
        (examples, 0.99),
        (examples, 0.0),
        (examples, 1.5),
    ):
        with pytest.raises(DataError):
            tuning.split(few, share, 0)


def test_the_learning_rate_rises_then_falls_to_nothing():
    recipe = Recipe(lr=2.0)
    rates = [tuning.learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.4) and max(rates) == rates[4] == pytest.approx(2.0, rel=0.01)
    assert rates[50] == pytest.approx(1.0) and rates[-1] < 0.001
    assert tuning.learning_rate(recipe, 0, 1) == pytest.approx(2.0)


# --- A run ----------------------------------------------------------------------------------------


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / tuning.LOG).read_text("utf-8").splitlines()]


def test_a_run_learns_leaves_the_base_alone_and_keeps_the_best(lab, examples, tmp_path):
    before = {name: p.clone() for name, p in lab.model.state_dict().items()}
    out = tmp_path / "run"
    found = finetune(lab, examples[:8], examples[8:], out, MINE, replace(FAST, epochs=6), base="tiny")
    after = lab.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert found.finished and found.step == found.steps == 12
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [lora.CONFIG, lora.WEIGHTS, tuning.RUN, tuning.LOG, tuning.STATE]
    )
    entries = log_of(out)
    steps = [entry for entry in entries if "loss" in entry]
    held = {entry["step"]: entry["held_out"] for entry in entries if "held_out" in entry}
    assert [entry["step"] for entry in steps] == list(range(1, 13)) and list(held) == [0, 2, 4, 6, 8, 10, 12]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2  # the embedding of a model without training is frozen too
    assert held[0] == pytest.approx(loss_by_hand(lab, examples[8:]), abs=1e-5) == pytest.approx(found.loss_before)
    assert found.best_step == min(held, key=held.get) and found.best_loss == held[found.best_step] < held[0]
    lora.merge(lab.model, lora.load_adapter(out, lab.config))
    assert tuning.held_out_loss(lab, examples[8:]) == pytest.approx(found.best_loss, abs=1e-4)


def test_the_best_is_kept_when_it_is_not_the_last(lab, examples, tmp_path, monkeypatch):
    """A held-out loss that falls and rises again, dictated: the adapter that is kept is the one of its lowest point."""
    dictated, adapters = iter([5.0, 3.0, 2.0, 2.5, 4.0]), []

    def judge(lab, examples, batch_size):
        adapters.append({n: p.detach().clone() for n, p in lab.model.named_parameters() if n.endswith(".B")})
        return next(dictated)

    monkeypatch.setattr(tuning, "held_out_loss", judge)
    found = finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, replace(FAST, epochs=4))
    assert (found.loss_before, found.best_loss, found.best_step, found.step) == (5.0, 2.0, 4, 8)
    kept = lora.load_adapter(tmp_path / "run", TINY)
    assert all(torch.equal(factors.B, adapters[2][f"{name}.B"]) for name, factors in kept.factors.items())
    assert any(not torch.equal(adapters[2][name], last) for name, last in adapters[4].items())
    assert [entry["best"] for entry in log_of(tmp_path / "run") if "held_out" in entry] == [
        True,
        True,
        True,
        False,
        False,
    ]


def files(folder: Path) -> dict[str, object]:
    """Everything that a run leaves but the times."""
    log = [{k: v for k, v in entry.items() if k != "seconds"} for entry in log_of(folder)]
    state = load_file(folder / tuning.STATE)
    return {"log": log, "best": (folder / lora.WEIGHTS).read_bytes(), "run": (folder / tuning.RUN).read_text()} | {
        name: tensor.numpy().tobytes() for name, tensor in state.items()
    }


class Stop(tuning._Run):
    """A run that is asked to stop after some steps, as Ctrl-C asks."""

    at = 0

    def _learn(self):
        report = super()._learn()
        if self.state.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return report


@pytest.mark.parametrize("stops", [(1,), (2, 3), (5,)])
def test_a_run_that_was_stopped_goes_on_to_the_same_result_bit_for_bit(
    stops, tokenizer, examples, tmp_path, monkeypatch
):
    recipe = replace(FAST, epochs=3, evaluate_every=2)
    finetune(tiny(tokenizer), examples[:8], examples[8:], tmp_path / "whole", MINE, recipe)
    monkeypatch.setattr(tuning, "_Run", Stop)
    out, resume = tmp_path / "parts", False
    for stop in (*stops, None):
        monkeypatch.setattr(Stop, "at", stop)
        found = finetune(tiny(tokenizer), examples[:8], examples[8:], out, MINE, recipe, resume=resume)
        assert found.step == (stop or found.steps) and found.finished is (stop is None)
        resume = True
    assert files(out) == files(tmp_path / "whole")


def test_a_run_that_was_killed_loses_only_what_came_after_the_last_save(tokenizer, examples, tmp_path, monkeypatch):
    class Killed(tuning._Run):
        def _learn(self):
            if self.state.step == 3:
                raise SystemError("power cut")
            return super()._learn()

    recipe = replace(FAST, epochs=3)
    args = (examples[:8], examples[8:])
    finetune(tiny(tokenizer), *args, tmp_path / "whole", MINE, recipe)
    lab = tiny(tokenizer)
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(tuning, "_Run", Killed)
        finetune(lab, *args, tmp_path / "cut", MINE, recipe)
    assert not any(name.endswith(".A") for name in lab.model.state_dict())  # the adapter was taken off
    with (tmp_path / "cut" / tuning.LOG).open("a") as log:
        log.write('{"step": 4, "lo')  # a line cut in half
    finetune(lab, *args, tmp_path / "cut", MINE, recipe, resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_run_that_was_killed_before_its_first_save_begins_again(tokenizer, examples, tmp_path):
    args = (examples[:8], examples[8:])
    finetune(tiny(tokenizer), *args, tmp_path / "whole", MINE, FAST)
    finetune(tiny(tokenizer), *args, tmp_path / "cut", MINE, FAST)
    (tmp_path / "cut" / tuning.STATE).unlink()
    finetune(tiny(tokenizer), *args, tmp_path / "cut", MINE, FAST, resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_finished_run_is_not_trained_on(lab, examples, tmp_path):
    first = finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, FAST)
    before = files(tmp_path / "run")
    again = finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, FAST, resume=True)
    assert again == first and files(tmp_path / "run") == before


def test_signals_are_as_before_and_another_thread_may_train(lab, examples, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = []
    thread = threading.Thread(
        target=lambda: done.append(finetune(lab, examples[:4], examples[8:], tmp_path / "run", MINE, FAST))
    )
    thread.start()
    thread.join()
    assert done[0].finished
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_best(lab, examples, tmp_path):
    with pytest.raises(FineTuningError, match=r"loss was nan.*Take a lower learning rate"):
        finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, replace(FAST, epochs=40, lr=1e30, clip=1e30))
    kept = lora.load_adapter(tmp_path / "run", TINY)
    assert all(factors.B.isfinite().all() for factors in kept.factors.values())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"settings": replace(MINE, rank=2)}, "lora.rank 4 instead of 2"),
        ({"recipe": replace(FAST, lr=0.5, epochs=9)}, "recipe.epochs 2 instead of 9, recipe.lr 0.01 instead of 0.5"),
        ({"examples": slice(0, 7)}, r"\(examples\)"),
    ],
)
def test_going_on_with_another_run_is_refused(what, message, lab, examples, tmp_path):
    finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, FAST)
    before = files(tmp_path / "run")
    chosen = examples[what.get("examples", slice(0, 8))]
    with pytest.raises(FineTuningError, match=message):
        finetune(
            lab,
            chosen,
            examples[8:],
            tmp_path / "run",
            what.get("settings", MINE),
            what.get("recipe", FAST),
            resume=True,
        )
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("damage", [b"", b"12345678 nothing"])
def test_a_damaged_state_is_one_sentence(damage, lab, examples, tmp_path):
    finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, FAST)
    (tmp_path / "run" / tuning.STATE).write_bytes(damage)
    with pytest.raises(FineTuningError, match=r"could not be read|damaged"):
        finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, FAST, resume=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 0}, "epochs is 0, but it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every is 0, but it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0, but it must be above 0"),
        ({"lr": float("nan")}, "lr is nan, but it must be above 0"),
        ({"lr": float("inf")}, "lr is infinite"),
        ({"clip": -1.0}, "clip is -1.0, but it must be above 0"),
        ({"seed": -1}, "seed is -1, but it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but it must be at least 0"),
    ],
)
def test_recipes_that_cannot_be(changes, says):
    with pytest.raises(FineTuningError, match=says):
        Recipe(**changes)


# --- The commands ---------------------------------------------------------------------------------

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A model folder of the smallest kind, stored in bfloat16 like most."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    lab = tiny(tokenizer)
    save_model(lab.model, folder, dtype="bfloat16", bos=1, eos=2, pad=3)
    tokenizer.save(folder)
    return folder


def run(*words, code=0):
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


def test_finetune_then_merge_then_open_in_three_ways(model, data, tmp_path):
    out, merged, exact = tmp_path / "run", tmp_path / "merged", tmp_path / "exact"
    said = run("finetune", model, "--data", data, "--out", out, "--epochs", 2, "--lr", "1e-2", "--router", "--rank", 2)
    assert "Held-out loss" in said and "Stopped" not in said
    run("merge", out, "--out", merged)
    run("merge", out, "--out", exact, "--dtype", "float32", "--model", model)
    ids = torch.arange(5, 45)[None]
    with_adapter, plain, bf16, fp32 = (
        mixtral_lab.load(path, device="cpu", dtype="float32").logits(ids) for path in (out, model, merged, exact)
    )
    assert lora.load_adapter(out, TINY).parts == PARTS
    assert torch.allclose(fp32, with_adapter, atol=1e-6)
    assert (with_adapter - plain).abs().max() > 20 * (bf16 - with_adapter).abs().max() > 0
    assert {path.name for path in merged.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (merged / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, fp32, atol=1e-4)
    assert AutoTokenizer.from_pretrained(exact).encode("Once upon") == mixtral_lab.load(exact).tokenizer.encode(
        "Once upon"
    )


def test_a_held_out_file_and_switches(model, data, tmp_path):
    held = write(tmp_path / "held.jsonl", CONVERSATIONS[:3])
    run("finetune", model, "--data", data, "--held-out", held, "--out", tmp_path / "run", "--no-experts", "--epochs", 1)
    assert lora.load_adapter(tmp_path / "run", TINY).parts == ("attention",)
    assert lora.base_of(tmp_path / "run") == str(model.resolve())


def test_a_stopped_run_says_how_to_go_on(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_Run", Stop)
    monkeypatch.setattr(Stop, "at", 1)
    command = ("finetune", model, "--data", data, "--out", tmp_path / "run", "--epochs", 2)
    assert "Stopped after step 1 of 4: the same command with --resume goes on." in run(*command)
    monkeypatch.setattr(Stop, "at", None)
    assert "after step" in run(*command, "--resume")
    assert "Stopped" not in run(*command, "--resume")


def test_nothing_of_the_users_is_overwritten(model, data, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    command = ("finetune", model, "--data", data, "--epochs", 1)
    assert "holds other files" in run(*command, "--out", mine, code=1)
    assert "is a file, not a folder" in run(*command, "--out", data, code=1)
    assert "holds no run to go on with" in run(*command, "--out", mine, "--resume", code=1)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"] and (
        mine / "thesis.txt"
    ).read_text() == "years of work"
    run(*command, "--out", tmp_path / "run")
    before = files(tmp_path / "run")
    assert "holds a run already: go on with it (--resume)" in run(*command, "--out", tmp_path / "run", code=1)
    assert files(tmp_path / "run") == before
    assert "is there already" in run("merge", tmp_path / "run", "--out", mine, code=1)
    assert "merge its adapter first" in run(
        "finetune", tmp_path / "run", "--data", data, "--out", tmp_path / "b", code=1
    )
    assert not (tmp_path / "b").exists()


def test_an_adapter_finds_the_folder_that_its_model_was_loaded_from(model, examples, tmp_path):
    lab = mixtral_lab.load(model, device="cpu")
    finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, FAST)
    adapted = mixtral_lab.load(tmp_path / "run", device="cpu")
    assert lab.source == str(model.resolve()) == lora.base_of(tmp_path / "run") and adapted.source is None
    with pytest.raises(tuning.FineTuningError, match="No file holds"):
        finetune(adapted, examples[:8], examples[8:], tmp_path / "more", MINE, FAST)
    assert mixtral_lab.load("data/mini-mistral").source in ("mini-mistral", str(Path("data/mini-mistral").resolve()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--no-attention", "--no-experts"), "some or all of them, but it was asked for nothing"),
        (("--lr", "0"), "lr is 0.0, but it must be above 0"),
        (("--held-out-share", "1"), "must lie between 0 and 1"),
        (("--held-out", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--length", "5"), "a conversation may have 5"),
        (("--device", "tpu9"), "There is no device"),
    ],
)
def test_mistakes_at_the_command_are_one_sentence_and_leave_no_folder(more, message, model, data, tmp_path):
    assert message in run("finetune", model, "--data", data, "--out", tmp_path / "run", *more, code=1)
    assert not (tmp_path / "run").exists()


def test_bad_data_and_unknown_models_at_the_command(model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"mesages": []}\n')
    said = run("finetune", model, "--data", bad, "--out", tmp_path / "run", code=1)
    assert "line 1:" in said and "line 2:" in said and "mesages" in said and not (tmp_path / "run").exists()
    assert "There is no file or folder nothing" in run(
        "finetune", "nothing", "--data", bad, "--out", tmp_path / "run", code=1
    )
    assert "holds no adapter" in run("merge", model, "--out", tmp_path / "m", code=1)
    run("finetune", "mini-mistral", "--data", bad, "--out", tmp_path / "run", "--router", code=1)


def test_a_dense_model_has_no_router(tmp_path, tokenizer, examples):
    dense = Transformer(replace(TINY, n_experts=None, n_choices=None))
    with pytest.raises(lora.AdapterError, match="has no router"):
        finetune(
            Lab(dense.eval(), tokenizer, "dense", "dense"), examples[:8], examples[8:], tmp_path / "run", MINE, FAST
        )
    assert not (tmp_path / "run").exists()


def test_one_step_equals_adamw_by_hand(lab, examples, tmp_path):
    """The first step of Adam is `lr * sign(gradient)`, to a small epsilon: B holds nothing else after it."""
    finetune(lab, examples[:8], examples[8:], tmp_path / "run", MINE, Recipe(1, 8, 1, 1e-2, clip=1e9))
    state = load_file(tmp_path / "run" / tuning.STATE)
    for name in [name for name in state if name.startswith("model.") and name.endswith(".B")]:
        moments = state.get(name.replace("model.", "exp_avg."))
        if moments is None:
            assert not state[name].any()  # an expert that nobody chose
            continue
        gradient = moments / 0.1
        assert torch.allclose(state[name], -1e-2 * gradient / (gradient.abs() + 1e-8), atol=1e-6)


def test_the_loss_is_float32_in_a_bfloat16_model(lab, examples):
    lab.model.bfloat16()
    losses = tuning.token_losses(lab.model, *tuning.padded(examples, 3, lab.device))
    assert losses.dtype == torch.float32
    ids, learned = tuning.padded(examples, 3, lab.device)
    logits = lab.model(ids)[:, :-1].float()
    all_losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    assert torch.allclose(losses, all_losses[learned[:, 1:]], atol=1e-5)
