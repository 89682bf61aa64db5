"""Inference step by step: what it shows is what `generate`, `logits` and `trace` say, on every branch and past the window."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import traitlets

import mixtral_lab
from mixtral_lab import Lab
from mixtral_lab.config import Config
from mixtral_lab.generate import PromptError, Sampling, prefill, probabilities
from mixtral_lab.model import Transformer
from mixtral_lab.widgets.base import MOST_STATE, WidgetError
from mixtral_lab.widgets.inference_stepper import KEPT, MOST_STEPS, InferenceStepper, _Step

STORY = "Once upon a time there was a small dog who lived near the river."
LONG = "Once upon a time. The dog ran away. " * 14


@pytest.fixture(scope="module")
def lab() -> Lab:
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def dense() -> Lab:
    return mixtral_lab.load("mini-mistral", device="cpu")


def small(lab: Lab, **shape) -> Lab:
    """A random model of another shape with the bundled tokenizer."""
    config = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=16, vocab=4096, context=8192) | shape
    return Lab(Transformer(Config(**config)).eval(), lab.tokenizer, "random")


def to_the_end(stepper: InferenceStepper) -> InferenceStepper:
    while stepper.phase != "end":
        stepper.forward()
    return stepper


def state_size(stepper: InferenceStepper) -> int:
    return sum(len(v) if isinstance(v, bytes) else len(json.dumps(v).encode()) for v in stepper.state().values())


def fresh_logits(lab: Lab, ids: list[int]) -> torch.Tensor:
    """As a new run computes them: the whole text read at once into a new cache."""
    return prefill(lab.model, torch.tensor([ids]), lab.model.new_cache(1, len(ids)))[0]


# The same as without a widget


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.8, "top_p": 0.8, "top_k": 9}]
)
def test_stepping_writes_what_generate_writes(lab, sampling):
    lab = small(lab, n_experts=8, n_choices=2) if sampling else lab
    stepper = to_the_end(InferenceStepper(lab, STORY, chunk=9, max_new_tokens=10, **sampling))
    assert stepper.text == lab.generate(STORY, 10, **{"seed": 0, **sampling})
    assert len(stepper.ids) <= len(lab.tokenizer.encode(STORY)) + 10


@pytest.mark.parametrize("chunk", [50, 400])
def test_any_chunk_gives_the_same_text_past_the_window(dense, chunk):
    stepper = InferenceStepper(dense, LONG, chunk=chunk, max_new_tokens=8)
    assert len(stepper.ids) > dense.config.window
    assert to_the_end(stepper).text == dense.generate(LONG, 8)


def test_a_seed_repeats_and_another_does_not(lab):
    lab = small(lab, n_experts=8, n_choices=2)
    texts = [to_the_end(InferenceStepper(lab, STORY, 18, 7, 1.2, seed=seed)).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    stepper = InferenceStepper(lab, STORY, 18, 7, 1.2, seed=4)
    to_the_end(stepper)
    stepper.step, stepper.seed = 1, 3  # a text drawn with another seed, from where the prompt ends
    stepper.draw()
    assert to_the_end(stepper).text == texts[0]


def test_the_end_token_ends_the_text(lab):
    end = lab.tokenizer.eos_id
    stepper = InferenceStepper(lab, STORY)
    stepper.forward(3)
    stepper.choose(end)
    assert stepper.phase == "end" and stepper.tokens[-1] == "</s>" and stepper.logits is None and not stepper.candidates
    with pytest.raises(WidgetError, match="has ended"):
        stepper.forward()


def test_a_model_without_a_window_ends_at_its_context(lab):
    stepper = to_the_end(InferenceStepper(small(lab, context=8), "one two", max_new_tokens=100))
    assert len(stepper.ids) <= 9 and stepper.text == stepper.lab.generate("one two", 100)


def test_candidates_are_the_softmax(lab):
    stepper = InferenceStepper(lab, STORY, chunk=7, max_new_tokens=4)
    to_the_end(stepper)
    whole = lab.logits(torch.tensor([stepper.ids]))[0].softmax(-1)
    for step in range(1, stepper.step):
        stepper.step = step
        read = int(stepper.frame()["tokens"][: step + 1].sum())
        expected = whole[read - 1].topk(KEPT)
        assert [c.id for c in stepper.candidates] == expected.indices.tolist()
        np.testing.assert_allclose([c.raw for c in stepper.candidates], expected.values.numpy(), rtol=2e-3, atol=1e-6)
        assert [c.token for c in stepper.candidates] == lab.tokenizer.pieces(expected.indices)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.5), Sampling(1.7, 0.7), Sampling(1.0, 1.0, 3), Sampling(0.9, 0.5, 12)]
)
def test_sampling_changes_the_candidates(lab, sampling):
    stepper = InferenceStepper(lab, STORY)
    stepper.forward(2)
    stepper.temperature, stepper.top_p, stepper.top_k = sampling.temperature, sampling.top_p, sampling.top_k
    expected = probabilities(stepper.logits[None], sampling)[0]
    for candidate in stepper.candidates:
        assert candidate.adjusted == pytest.approx(float(expected[candidate.id]), rel=1e-3)
    assert stepper.now["sampling"] == [sampling.temperature, sampling.top_p, sampling.top_k]


def test_experts_are_those_of_a_trace(lab):
    stepper = to_the_end(InferenceStepper(lab, STORY, chunk=6, max_new_tokens=5))
    trace = lab.trace_ids(stepper.ids[:-1])
    at = 0
    for step in range(1, stepper.step):
        stepper.step = step
        experts = stepper.experts
        assert torch.equal(experts, trace.experts[:, at : at + experts.shape[1]])
        now = stepper.now
        shape = (lab.config.n_layers, now["shown"], lab.config.n_choices)
        assert np.array_equal(np.reshape(now["experts"], shape), experts.numpy())
        weights = trace.routing.weights[:, at : at + experts.shape[1]]
        assert np.abs(np.reshape(now["shares"], shape) / 100 - weights.float().numpy()).max() < 0.0051
        at += experts.shape[1]
    assert at == len(trace)


# Back, and other ways


def test_back_shows_what_was(lab):
    stepper = InferenceStepper(lab, STORY, max_new_tokens=9)
    stepper.forward(5)
    seen, tokens = stepper.candidates, stepper.tokens
    stepper.forward(3)
    for _ in range(3):
        stepper.back()
    assert stepper.step == 5 and stepper.candidates == seen and stepper.tokens == tokens
    assert len(stepper.frame()) == 9  # nothing was forgotten
    stepper.step = 0
    with pytest.raises(WidgetError, match="first step"):
        stepper.back()


@pytest.mark.parametrize("n_prompt, chunk", [(20, 6), (126, 40), (300, 200)])
def test_a_branch_is_a_fresh_run(dense, n_prompt, chunk):
    """With a window of 128: ahead of it, over its edge, and past it with a chunk longer than the ring."""
    text = dense.tokenizer.decode(dense.tokenizer.encode(LONG * 3)[:n_prompt])
    stepper = InferenceStepper(dense, text, chunk=chunk, max_new_tokens=60)
    ends = []
    stepper.forward(math.ceil(len(stepper.ids) / chunk) + 1)
    first = stepper.step
    for _ in range(6):
        stepper.choose(stepper.candidates[1].id)
    ends.append((stepper.branch, list(stepper.ids), stepper.logits))
    for back, rank in ((4, 2), (3, 4), (4, 3)):
        stepper.step = first + 6 - back
        for _ in range(2):
            stepper.choose(stepper.candidates[rank].id)
        ends.append((stepper.branch, list(stepper.ids), stepper.logits))
    assert len(stepper.branches) == 4
    for branch, ids, _ in [ends[0], ends[2], ends[1]]:  # to and fro, computing on from each
        stepper.branch = branch
        assert stepper.ids == ids
        stepper.choose(stepper.candidates[0].id)
        ends.append((branch, list(stepper.ids), stepper.logits))
    for _, ids, logits in ends:
        assert float((fresh_logits(dense, ids) - logits).abs().max()) < 1e-4


def test_a_branch_of_a_mixture_is_a_fresh_run(lab):
    stepper = InferenceStepper(lab, STORY, chunk=5, max_new_tokens=30)
    stepper.forward(12)
    stepper.step = 6
    stepper.choose(stepper.candidates[2].id)
    stepper.forward(4)
    assert float((fresh_logits(lab, stepper.ids) - stepper.logits).abs().max()) < 1e-4


def test_what_is_put_back_is_the_same_bit_by_bit(dense):
    stepper = InferenceStepper(dense, LONG, chunk=48, max_new_tokens=40)
    stepper.forward(14)
    before = [(one.keys.clone(), one.values.clone()) for one in stepper._cache]
    here = stepper.path[stepper.step]
    stepper.step = 9
    stepper.choose(stepper.candidates[5].id)
    stepper._restore(here)
    for one, (keys, values) in zip(stepper._cache, before, strict=True):
        assert torch.equal(one.keys, keys) and torch.equal(one.values, values)


def test_branches_remain(lab):
    stepper = InferenceStepper(lab, STORY, max_new_tokens=20)
    stepper.forward(6)
    first = list(stepper.ids)
    stepper.step = 3
    other = stepper.candidates[1]
    stepper.choose(other.token)
    assert stepper.branch == 1 and stepper.step == 4 and stepper.tokens[-1] == other.token
    assert [(b.number, b.after, b.token) for b in stepper.branches] == [(0, None, ""), (1, 3, other.token)]
    stepper.forward(2)
    stepper.branch = 0
    assert stepper.ids == first and stepper.step == 6
    stepper.step = 3
    stepper.choose(other.id)  # goes to the branch that took it
    assert stepper.branch == 1 and stepper.step == 4 and len(stepper.branches) == 2
    stepper.back()
    stepper.choose(first[-3])
    assert stepper.branch == 0 and stepper.step == 4 and len(stepper.branches) == 2
    assert stepper.leaves == [6, 9]


def test_choose_takes_ids_pieces_and_texts(lab):
    stepper = InferenceStepper(lab, STORY)
    stepper.forward(2)
    cat = lab.tokenizer.encode(" was", bos=False)[0]
    for given in (cat, "␣was", " was"):
        stepper.step = 2
        stepper.choose(given)
        assert stepper.ids[-1] == cat and stepper.tokens[-1] == "␣was"
    assert len(stepper.branches) == 1
    for wrong, message in (
        (4096, "0 to 4095"),
        (-1, "0 to 4095"),
        ("", "No token"),
        (" was there", "not one token of this model but 2"),
    ):
        with pytest.raises(WidgetError, match=message):
            stepper.choose(wrong)
    stepper.step = 1
    with pytest.raises(WidgetError, match="16 of the prompt's 18 tokens"):
        stepper.choose(cat)


# Selection, and what is said


def test_wrong_settings(lab):
    stepper = InferenceStepper(lab, STORY)
    stepper.forward()
    for name, value in {
        "step": 2, "branch": 1, "temperature": -1.0, "top_p": 0.0, "top_k": 0, "seed": -1, "speed": 0.0,
    }.items():  # fmt: skip
        before = getattr(stepper, name)
        with pytest.raises(WidgetError, match=str(value)):
            setattr(stepper, name, value)
        assert getattr(stepper, name) == before
    with pytest.raises(WidgetError, match="steps 0 to 1; forward"):
        stepper.step = 7
    with pytest.raises(traitlets.TraitError):
        stepper.temperature = "hot"
    for wrong in ({"chunk": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(WidgetError):
            InferenceStepper(lab, STORY, **wrong)
    with pytest.raises(PromptError):
        InferenceStepper(lab, "")
    with pytest.raises(PromptError, match="at most"):
        InferenceStepper(small(lab, context=4), STORY)


def test_a_dense_model_says_so(dense):
    stepper = InferenceStepper(dense, STORY)
    stepper.forward(3)
    assert "no experts" in stepper.notice and stepper.experts is None and stepper.now["experts"] == []
    assert stepper.colours == [] and "no experts" in stepper.fallback()


def test_what_the_script_asks(lab):
    stepper = InferenceStepper(lab, STORY, max_new_tokens=3)

    def ask(**message):
        stepper._handle_custom_msg({"at": stepper.path[stepper.step], **message}, [])

    ask(kind="forward")
    ask(kind="forward", at=99)  # late: another step is shown by now
    assert stepper.step == 1
    ask(kind="forward")
    ask(kind="choose", token=stepper.candidates[3].id)
    ask(kind="choose", token="many words")
    assert stepper.step == 3 and "not one token" in stepper.notice
    ask(kind="draw")
    assert stepper.notice == ""
    stepper.playing = True
    ask(kind="forward")
    assert stepper.phase == "end" and not stepper.playing


def test_an_edit_counts(lab):
    stepper = InferenceStepper(lab, STORY)
    stepper.forward(2)
    from mixtral_lab.edit import ablate

    stepper.forward()
    plain = stepper.logits
    stepper.back()
    with lab.edit(ablate(layer=2, expert=int(stepper.experts[2, -1, 0]))):
        stepper.choose(stepper.candidates[1].id)
    assert not torch.allclose(plain, stepper.logits)


# Time, bytes, table


def test_the_table(lab):
    stepper = to_the_end(InferenceStepper(lab, STORY, chunk=8, max_new_tokens=4))
    frame = stepper.frame()
    assert frame["phase"].tolist() == ["tokenise", "prefill", "prefill", "prefill", "decode", "decode", "decode", "end"]
    assert frame["tokens"].tolist() == [0, 8, 8, 2, 1, 1, 1, 0]
    assert frame["first"].tolist() == [0, 0, 8, 16, 18, 19, 20, 21]
    assert frame["cache_slots"].tolist() == [0, 8, 16, 18, 19, 20, 21, 21]
    assert frame["cache_bytes"].tolist() == [lab.config.cache_bytes(n, 4) if n else 0 for n in frame["cache_slots"]]
    assert (frame["milliseconds"][1:-1] > 0).all() and "".join(frame["text"][1:]) == "".join(stepper.tokens)
    assert frame["how"].tolist()[-4:] == ["greedy"] * 4 and (frame["probability"][4:] > 0).all()


def test_weights_read(lab, dense):
    """One token reads the active parameters (the row of its embedding, not the matrix, is read on top of the output matrix)."""
    for one in (lab, dense):
        stepper = InferenceStepper(one, STORY, chunk=100)
        stepper.forward(2)
        frame = stepper.frame()
        assert frame["weight_bytes"][2] == 4 * (one.config.active_parameters + one.config.dim)
        assert frame["weight_bytes"][2] < frame["weight_bytes"][1] <= 4 * (one.config.parameters + 18 * one.config.dim)
    stepper = InferenceStepper(lab, STORY, chunk=100)
    stepper.forward()
    chosen = sum(len(layer.unique()) for layer in stepper.experts)
    every = lab.config.n_layers * lab.config.n_experts
    missing = (every - chosen) * 3 * lab.config.dim * lab.config.hidden
    assert stepper.frame()["weight_bytes"][1] == 4 * (lab.config.parameters - missing + 18 * lab.config.dim)


def test_ring_past_the_window(dense):
    stepper = InferenceStepper(dense, LONG, chunk=100, max_new_tokens=5)
    stepper.forward(3)
    assert stepper.about["ring"] == stepper.about["window"] == 128
    assert stepper.frame()["cache_slots"].tolist() == [0, 100, 128, 128]
    assert (
        stepper.frame()["cache_bytes"].max() == dense.config.cache_bytes(10_000, 4) == 128 * stepper.about["slot_bytes"]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    lab = mixtral_lab.load("mini-mixtral", device="cuda", dtype="float32")
    stepper = InferenceStepper(lab, STORY, chunk=5, max_new_tokens=12, temperature=0.9, seed=2)
    to_the_end(stepper)
    assert stepper.text == lab.generate(STORY, 12, 0.9, seed=2)
    assert (stepper.frame()["activation_bytes"][1:-1] > 0).all() and stepper.about["on_gpu"]
    stepper.step = 6
    stepper.choose(stepper.candidates[2].id)
    assert float((lab.logits(torch.tensor([stepper.ids]))[0, -1].cpu() - stepper.logits).abs().max()) < 1e-3


# What travels


def test_history_is_what_was_shown(lab):
    from mixtral_lab.widgets.base import packed

    stepper = InferenceStepper(lab, STORY, chunk=5, max_new_tokens=10)
    stepper.forward(9)
    stepper.step = 5
    stepper.choose(stepper.candidates[4].id)
    about, data = stepper.state()["arrays"], stepper.state()["data"]
    assert packed({"kept": np.array([1])})[0]["kept"].keys() == about["kept"].keys()

    def array(name):
        one = about[name]
        values = np.frombuffer(data, "<" + one["kind"], int(np.prod(one["shape"])), one["start"]).reshape(one["shape"])
        return values if one["step"] is None else values * one["step"]

    kept = array("kept").tolist()
    assert sorted(kept) == list(range(11))
    for row, number in enumerate(kept):
        made = stepper._made[number]
        experts = array("experts")[array("from")[row] : array("from")[row + 1]]
        if made.logits is None:
            assert not len(experts)
            continue
        best = made.logits.log_softmax(-1).topk(KEPT)
        assert array("ids")[row].tolist() == best.indices.tolist()
        assert np.abs(array("below")[row] + best.values.numpy()).max() < 1e-3
        tail = array("tail")[row]
        assert tail.sum() == 4096 - KEPT
        middles = best.values[-1].item() - 0.5 * (np.arange(48) + 0.5)
        assert (tail * np.exp(middles)).sum() == pytest.approx(1 - best.values.exp().sum().item(), rel=0.1, abs=1e-3)
        assert experts.tolist() == made.experts.flatten().tolist()
    assert all(lab.tokenizer.pieces([int(token)])[0][:39] == word[:39] for token, word in stepper.words.items())


def test_hundreds_of_steps_stay_small(lab):
    """600 steps as a model of 32 layers would make them, of which each token takes 2 of 8 experts; then far too many."""
    deep = small(lab, n_layers=32, dim=8, n_heads=1, n_kv_heads=1, hidden=4, n_experts=8, n_choices=2)
    stepper = InferenceStepper(deep, STORY, chunk=100, max_new_tokens=10_000, temperature=1.5)
    stepper.forward()
    stepper.playing = True
    here = stepper.step

    known = []
    for _ in range(100):
        one = _Step("", experts=torch.randint(8, (32, 1, 2)), weights=torch.rand(32, 1, 2))
        one.know(torch.randn(4096))
        known.append({name: getattr(one, name) for name in ("logits", "best", "below", "tail", "experts", "weights")})

    def grow(steps):
        parent = len(stepper._made) - 1
        for n in range(steps):
            one = _Step(
                "decode", parent + n, 18 + n, 19 + n, [5 + n % 4000], "drawn", 0.1234, 12.345, 123_456, 123_456_789
            )
            vars(one).update(known[n % len(known)])
            stepper._made.append(one)
        stepper._tell_tree()
        stepper.leaves = [len(stepper._made) - 1]

    grow(600)
    assert state_size(stepper) < 0.4 * MOST_STATE
    assert stepper.state()["playing"] is False
    grow(MOST_STEPS - 602)
    assert state_size(stepper) < MOST_STATE
    assert stepper.state()["arrays"]["kept"]["shape"][0] < MOST_STEPS  # the latest ones
    stepper.step = here
    with pytest.raises(WidgetError, match="4,000 steps"):
        stepper.choose(7)


@pytest.mark.parametrize("n_tokens", [1, 4096])
def test_odd_lengths(lab, n_tokens, monkeypatch):
    one = small(lab, n_layers=1, n_experts=64, n_choices=1)
    monkeypatch.setattr(
        one.tokenizer, "encode", lambda text: list(range(5, 5 + n_tokens))[:4000] + [9] * (n_tokens - 4000)
    )
    stepper = InferenceStepper(one, "as long as that", chunk=2048, max_new_tokens=3)
    assert len(stepper.ids) == n_tokens
    to_the_end(stepper)
    stepper.step = 1
    assert len(stepper.colours) == 64 and stepper.now["shown"] == min(n_tokens, 128)
    assert state_size(stepper) < MOST_STATE and len(stepper.fallback()) < 60_000


def test_many_choices_are_cut(lab):
    wide = small(lab, n_layers=8, dim=8, n_heads=1, n_kv_heads=1, hidden=4, n_experts=64, n_choices=8)
    stepper = InferenceStepper(wide, LONG, chunk=200)
    stepper.forward()
    assert stepper.experts.shape == (8, len(stepper.ids), 8) or stepper.experts.shape == (8, 200, 8)
    assert stepper.now["shown"] == 64 and len(stepper.now["experts"]) == 64 * 64
    assert np.array_equal(np.reshape(stepper.now["experts"], (8, 64, 8)), stepper.experts[:, -64:].numpy())


@pytest.mark.parametrize("prompt", ["<script>alert(1)</script>", "שלום עולם", "🙂 ünïcødé ⏎ 漢字", "\n\n\t "])
def test_odd_texts(lab, prompt, tmp_path):
    stepper = to_the_end(InferenceStepper(lab, prompt, chunk=3, max_new_tokens=4))
    assert stepper.text == lab.generate(prompt, 4)
    assert "<script" not in stepper.fallback() and stepper.title in stepper.fallback()
    assert "<script>alert" not in stepper.save_html(tmp_path / "page.html").read_text("utf-8")
