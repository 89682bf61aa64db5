"""The public calls, on the trained models in the box."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import mixtral_lab
from mixtral_lab.checkpoint import CheckpointError
from mixtral_lab.config import LabError
from mixtral_lab.generate import PromptError, Sampling, generate_ids
from mixtral_lab.lab import Lab, Writer
from mixtral_lab.model import Transformer
from mixtral_lab.tokenizer import TextStream, TokenizerError
from mixtral_lab.trace import TraceError

STORY = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def dense():
    return mixtral_lab.load("mini-mistral", device="cpu")


def test_a_bundled_model_is_found_by_name_and_by_path_from_anywhere(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("data/mini-mixtral", "mini-mixtral"):
        assert mixtral_lab.load(path, device="cpu").config == lab.config
    assert lab.config == mixtral_lab.PRESETS["mini-mixtral"].config


def test_the_model_is_a_plain_module_in_float32(lab):
    assert isinstance(lab.model, torch.nn.Module)
    assert lab.dtype == "float32"
    assert "21.5 M parameters" in repr(lab)
    assert "8 experts" in repr(lab)


def test_an_unknown_model_says_what_there_is():
    with pytest.raises(CheckpointError, match="Bundled models are mini-mixtral, mini-mistral"):
        mixtral_lab.load("no-such-model")
    with pytest.raises(CheckpointError, match="a published shape without weights"):
        mixtral_lab.load("mixtral-8x7b")


def test_logits(lab):
    ids = torch.tensor([lab.tokenizer.encode(STORY)] * 2)
    logits = lab.logits(ids)
    assert logits.shape == (2, ids.shape[1], 4096)
    with pytest.raises(PromptError, match="ids are 0 to 4095"):
        lab.logits(torch.tensor([[4096]]))
    with pytest.raises(PromptError, match="shape"):
        lab.logits(torch.tensor([1, 2]))


def test_the_model_has_learned_to_tell_stories(lab):
    text = lab.generate(STORY, max_new_tokens=40)
    letters = sum(c.isalpha() or c in " .,\"'!?\n" for c in text)
    assert letters > 0.95 * len(text)
    assert len(set(text.split())) > 8


def test_streaming_and_batches_write_the_same(lab):
    alone = lab.generate(STORY, max_new_tokens=30)
    assert "".join(lab.stream(STORY, max_new_tokens=30)) == alone
    together = lab.generate([STORY, "def f(x):\n"], max_new_tokens=30)
    assert together[0] == alone
    assert together[1] == lab.generate("def f(x):\n", max_new_tokens=30)


def test_a_seed_repeats_a_draw(lab):
    draw = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95, "top_k": 200}
    assert lab.generate(STORY, seed=3, **draw) == lab.generate(STORY, seed=3, **draw)
    assert lab.generate(STORY, seed=3, **draw) != lab.generate(STORY, seed=4, **draw)


def test_stop_strings_end_before_themselves(lab):
    free = lab.generate(STORY, max_new_tokens=40)
    stop = free[10:14]
    assert lab.generate(STORY, max_new_tokens=40, stop=stop) == free[: free.index(stop)]
    assert "".join(lab.stream(STORY, max_new_tokens=40, stop=["never there", stop])) == free[: free.index(stop)]
    with pytest.raises(PromptError, match="stop string is empty"):
        lab.generate(STORY, stop="")


def test_a_stop_string_split_over_tokens_is_held_back(lab):
    writer = Writer(TextStream(lab.tokenizer), ["END"])
    got = [writer.feed(token) for token in lab.tokenizer.encode("a EN b END c", bos=False)]
    assert "".join(got) == "a EN b "
    assert writer.done
    assert writer.flush() == ""


def test_what_only_looked_like_a_stop_comes_out_in_the_end(lab):
    writer = Writer(TextStream(lab.tokenizer), ["END"])
    got = "".join(writer.feed(token) for token in lab.tokenizer.encode("so EN", bos=False))
    assert got + writer.flush() == "so EN"


def test_chat_answers_and_checks_roles(lab):
    question = [{"role": "user", "content": "Who are you?"}]
    answer = lab.chat(question, max_new_tokens=40)
    assert answer
    assert "[INST]" not in answer
    assert answer == "".join(lab.stream(question, max_new_tokens=40)).strip()
    with pytest.raises(TokenizerError):
        lab.chat([{"role": "assistant", "content": "Hello"}])


def test_trace_records_what_the_routers_say(lab):
    trace = lab.trace(STORY)
    ids = torch.tensor([lab.tokenizer.encode(STORY)])
    assert trace.ids.tolist() == ids[0].tolist()
    assert trace.tokens[0] == "<s>"
    assert "".join(trace.tokens[1:]) == STORY.replace(" ", "␣")
    said = []
    hooks = [b.router.register_forward_hook(lambda m, i, out: said.append(out)) for b in lab.model.layers]
    lab.logits(ids)
    for hook in hooks:
        hook.remove()
    for layer, routing in enumerate(said):
        torch.testing.assert_close(trace.routing.logits[layer], routing.logits[0])
        assert torch.equal(trace.routing.experts[layer], routing.experts[0])
        torch.testing.assert_close(trace.routing.weights[layer], routing.weights[0])
    seq = ids.shape[1]
    assert trace.routing.logits.shape == (8, seq, 8)
    assert trace.routing.weights.shape == (8, seq, 2)
    torch.testing.assert_close(trace.routing.weights.sum(-1), torch.ones(8, seq))


def test_trace_leaves_no_hooks_behind(lab):
    lab.trace(STORY)
    assert not any(module._forward_hooks for module in lab.model.modules())


def test_written_tokens_are_traced_like_read_ones(lab):
    written = lab.trace(STORY, max_new_tokens=12)
    assert len(written) == written.n_prompt + 12
    text = lab.generate(STORY, max_new_tokens=12)
    assert lab.tokenizer.decode(written.ids[written.n_prompt :]) == text
    read = lab.trace_ids(written.ids.tolist())
    torch.testing.assert_close(written.routing.logits, read.routing.logits, atol=1e-3, rtol=1e-3)
    assert (written.routing.experts == read.routing.experts).float().mean() > 0.99


def test_several_texts_give_several_traces(lab):
    traces = lab.trace([STORY, "x = 1"])
    assert [trace.n_prompt for trace in traces] == [len(lab.tokenizer.encode(t)) for t in (STORY, "x = 1")]
    table = mixtral_lab.trace.frame(traces)
    assert set(table["text"]) == {0, 1}


def test_the_table_is_tidy(lab):
    trace = lab.trace(STORY, max_new_tokens=2)
    table = trace.frame()
    layers, seq, choices = trace.routing.experts.shape
    assert len(table) == layers * seq * choices
    assert list(table.columns) == [
        "text", "position", "id", "token", "written", "layer", "choice", "expert", "weight", "logit",
    ]  # fmt: skip
    row = table[(table.layer == 3) & (table.position == 4) & (table.choice == 1)].iloc[0]
    assert row.expert == trace.routing.experts[3, 4, 1]
    assert row.weight == pytest.approx(trace.routing.weights[3, 4, 1].item())
    assert row.logit == pytest.approx(trace.routing.logits[3, 4, row.expert].item())
    assert row.token == trace.tokens[4]
    assert table.written.sum() == 2 * layers * choices


def test_a_trace_survives_its_file(lab, tmp_path):
    trace = lab.trace("Hé ␣ 日本 <script>", max_new_tokens=3)
    path = trace.save(tmp_path / "a.safetensors")
    again = mixtral_lab.Trace.load(path)
    for a, b in zip(trace.routing, again.routing, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert torch.equal(trace.ids, again.ids)
    assert (trace.tokens, trace.n_prompt, trace.model, trace.dtype) == (
        again.tokens, again.n_prompt, again.model, again.dtype,
    )  # fmt: skip
    trace.save(path)  # a trace may replace a trace


def test_other_files_are_refused_and_left_alone(lab, tmp_path):
    trace = lab.trace("a")
    path = tmp_path / "precious.txt"
    path.write_text("do not lose me")
    with pytest.raises(TraceError, match="left alone"):
        trace.save(path)
    assert path.read_text() == "do not lose me"
    with pytest.raises(TraceError, match="is not a trace"):
        mixtral_lab.Trace.load(path)
    with pytest.raises(TraceError, match="no file"):
        mixtral_lab.Trace.load(tmp_path / "missing.safetensors")


def test_a_dense_model_has_no_routing_and_says_so(dense):
    trace = dense.trace(STORY, max_new_tokens=3)
    assert len(trace) == trace.n_prompt + 3
    with pytest.raises(TraceError, match="dense model"):
        _ = trace.routing


def test_the_dense_model_goes_beyond_its_window(dense):
    assert dense.config.window == 128
    ids = dense.tokenizer.encode(" ".join([STORY] * 30))
    assert len(ids) > 2 * 128
    written = dense.trace_ids(ids, max_new_tokens=8).ids[len(ids) :]
    again = dense.logits(torch.tensor([ids + written.tolist()])).argmax(-1)[0, len(ids) - 1 : -1]
    assert written.tolist() == again.tolist()


def test_an_empty_prompt_is_named(lab):
    for call in (lab.trace, lab.generate, lambda text: list(lab.stream(text))):
        with pytest.raises(PromptError, match="prompt is empty"):
            call("")


SLIPS = """
import numpy as np
import torch

import mixtral_lab
from mixtral_lab import analysis, edit
from mixtral_lab.analysis import lens
from mixtral_lab.config import LabError
from mixtral_lab.widgets import RouterExplorer

lab = mixtral_lab.load()
for two in (torch.tensor([0, -1]), np.array([0, -1])):
    assert lab.trace("Once", positions=two).positions.tolist() == [0, len(lab.tokenizer.encode("Once")) - 1]
trace = mixtral_lab.Trace.from_arrays(["a", "b"], [[[0, 1], [2, 1]]], [[[0.75, 0.25], [0.5, 0.5]]])
assert trace["layers.*.router.weights"].tolist() == [[[0.75, 0.25], [0.5, 0.5]]]
t, ids, whole = lab.trace("Once upon"), torch.tensor([lab.tokenizer.encode("Once upon")]), lab.trace("Once upon", sites="*")
assert (analysis.assignment_counts(t.experts, 8) == analysis.assignment_counts(*analysis.choices(t))).all()
for at in (np.int64(2), torch.tensor(2), [np.int64(2)], torch.tensor([2])):
    with lab.edit(edit.scale(0, 0, 0.5, at), edit.patch("layers.1.residual.after", whole, at)):
        lab.logits(ids)
said = lens.attribution(lab.model, whole, targets=np.int64(5)).targets.tolist()
assert said == lens.attribution(lab.model, whole, targets=5).targets.tolist()
for slip in (
    lambda: lens.attribution(lab.model, whole, targets=" dog"),
    lambda: analysis.assignment_counts(t, 8),
    lambda: edit.scale(0, 0, 0.5, "first"),
    lambda: lab.generate(123),
    lambda: lab.generate(["a", None]),
    lambda: lab.trace(None),
    lambda: lab.trace(b"a"),
    lambda: lab.generate("a", max_new_tokens=2.5),
    lambda: lab.generate("a", max_new_tokens=-1),
    lambda: lab.trace("a", max_new_tokens=-1),
    lambda: lab.logits("a"),
    lambda: lab.edit({"layers.2.residual.after": 0.5}).__enter__(),
    lambda: RouterExplorer("hello"),
    lambda: lab.trace("a", positions=3),
    lambda: lab.generate("a", 2, 1.0, seed=1.5),
    lambda: lab.generate("a", 2, 1.0, top_k=2.5),
):
    try:
        slip()
    except LabError as error:
        print(error)
"""


def test_slips_are_told_in_a_sentence():
    """In a process of its own, where no annotation is checked before the package sees what it was given."""
    done = subprocess.run([sys.executable, "-c", SLIPS], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    wanted = [
        "A word's id", "choices(trace)", "position is 'first'",
        "this is 123", "this is None", "this is None", "this is b'a'", "whole number, 0 or above", "max_new_tokens is -1",
        "max_new_tokens is -1", "tokenizer.encode(text)", "lambda x: 0.5 * x", "shows a Trace",
        "such as [0, -1]", "64 bits", "top_k is 2.5",
    ]  # fmt: skip
    assert len(said) == len(wanted)
    for sentence, words in zip(said, wanted, strict=True):
        assert words in sentence


def test_too_long_for_the_context(lab):
    with pytest.raises(PromptError, match="at most 2048"):
        lab.trace("a b " * 3000)
    with pytest.raises(PromptError, match="at most 2048"):
        lab.trace("a", max_new_tokens=4000)


def test_experts_are_used_evenly_enough_and_know_the_domain():
    """What data/README.md claims of the routing, on the excerpts that come with it."""
    from mixtral_lab.analysis.routing import domain_counts, domain_information

    lab = mixtral_lab.load("mini-mixtral", device="cpu")
    traces = {
        domain: [
            lab.trace_ids(lab.tokenizer.chat(p["messages"][:-1])) if "messages" in p else lab.trace(p["text"])
            for p in passages
        ]
        for domain, passages in mixtral_lab.excerpts().items()
    }
    _, counts = domain_counts(traces)
    share = (counts / counts.sum(-1, keepdims=True)).mean(0)
    assert share.max() < 0.30
    assert share.min() > 0.03
    assert max(domain_information(counts[:, layer]) for layer in range(8)) > 0.05


def test_a_model_with_more_rows_than_tokens_reads_and_writes_them_without_text(lab):
    n = lab.tokenizer.vocab
    wide = Lab(Transformer(replace(lab.config, n_layers=1, vocab=n + 3)).eval(), lab.tokenizer, "wide")
    assert wide.tokenizer.vocab == n + 3 and lab.tokenizer.vocab == n
    assert wide.tokenizer.pieces([n, n + 2]) == [f"<unused {n}>", f"<unused {n + 2}>"]
    assert wide.tokenizer.decode([n + 1, *lab.tokenizer.encode("Once", bos=False), n + 2]) == "Once"
    assert wide.tokenizer.encode("Once upon") == lab.tokenizer.encode("Once upon")
    trace = wide.trace_ids([n + 1, n + 2])
    assert trace.tokens == (f"<unused {n + 1}>", f"<unused {n + 2}>")
    with pytest.raises(TokenizerError, match=f"ids are 0 to {n + 2}"):
        wide.tokenizer.pieces([n + 3])


def test_a_short_prompt_has_its_own_room_beside_a_long_one(lab):
    """The context is counted for each text: a long neighbour takes nothing away."""
    long = "one " * 2040
    assert lab.generate([STORY, long], max_new_tokens=40)[0] == lab.generate(STORY, max_new_tokens=40)
    ids = [lab.tokenizer.encode(STORY), lab.tokenizer.encode(long)]
    assert lab.config.context - len(ids[1]) < 8
    steps = list(generate_ids(lab.model, ids, 9))
    assert [sum(step[row] is not None for step in steps) for row in (0, 1)] == [9, lab.config.context - len(ids[1]) + 1]


def test_a_text_that_ends_amid_a_character_ends_alike_in_a_batch(lab):
    def ends(*tokens):
        writer = Writer(TextStream(lab.tokenizer, continues=True), [])
        return "".join(map(writer.feed, tokens)) + writer.flush()

    first = next(i for i in range(lab.tokenizer.vocab) if TextStream(lab.tokenizer).feed(i) == "" and i > 10)
    assert ends(first) == ends(first, None) == "\ufffd"


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_whole_kind(lab, kind):
    ids = torch.arange(20, 40)
    assert torch.equal(lab.logits(ids[None].to(kind)), lab.logits(ids[None]))


def test_a_seed_has_64_bits():
    with pytest.raises(PromptError, match="64 bits"):
        Sampling(1.0, seed=2**64)


def test_scores_that_are_no_numbers(lab):
    with pytest.raises(PromptError, match="NaN"), lab.edit({"layers.2.residual.after": lambda x: x * float("nan")}):
        lab.generate(STORY, max_new_tokens=2, temperature=1.0)


def test_a_window_that_is_set_holds_on_every_way():
    """Lesson 04 sets it: whole passes, tokens one by one, batches that need a mask, and patterns see the same keys."""
    lab = mixtral_lab.load("mini-mistral", device="cpu", dtype="float32")
    for block in lab.model.blocks:
        block.attention.window = 3
    ids = torch.tensor([lab.tokenizer.encode(STORY)])
    whole = lab.logits(ids)
    cache = lab.model.new_cache(1, ids.shape[1])
    assert cache[0].ring == 3
    with torch.no_grad():
        apart = torch.cat([lab.model(one, cache) for one in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(apart, whole, atol=1e-4, rtol=1e-4)
    trace = lab.trace(STORY, sites=["layers.*.attention.pattern", "layers.*.attention.scores", "logits"])
    assert trace.window == 3 and (trace["layers.5.attention.pattern"] > 0).sum(-1).max() == 3
    torch.testing.assert_close(trace["logits"], whole[0], atol=1e-4, rtol=1e-4)
    some = lab.trace(STORY, sites=["layers.*.attention.pattern", "logits"], positions=[-1])
    torch.testing.assert_close(some["logits"], whole[0, -1:], atol=1e-4, rtol=1e-4)
    assert lab.generate([STORY, "The"], max_new_tokens=8)[0] == lab.generate(STORY, max_new_tokens=8)
    lab.model.blocks[0].attention.window = 5
    with pytest.raises(LabError, match="alike in all of them"):
        lab.generate(STORY)


def test_more_than_a_cache_was_made_for(lab):
    cache = lab.model.new_cache(1, 4)
    with torch.no_grad():
        for token in range(4):
            lab.model(torch.tensor([[20 + token]]), cache)
        with pytest.raises(LabError, match="made for 4 tokens, and 5 were to be fed"):
            lab.model(torch.tensor([[30]]), cache)
        with pytest.raises(LabError, match="made for 4 tokens, and 6 were to be fed"):
            lab.model(torch.tensor([[30, 31]]), cache)
