"""Intervene shows what the tensors say, its code computes the same, and the model is afterwards as it was."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_edit import same_state, state
from test_model import random_model
from test_parity import mixtral
from traitlets import TraitError

import mixtral_lab
from mixtral_lab.edit import ablate, scale, top_k
from mixtral_lab.lab import Lab
from mixtral_lab.widgets.base import MOST_STATE, WidgetError
from mixtral_lab.widgets.intervene import FOLLOWS, FORCED, Intervene

PROMPT = "Once upon a time there was a little robot."
ABLATE = {"kind": "ablate", "layer": 2, "expert": 5, "how": "next_best"}
SCALE = {"kind": "scale", "layer": 0, "expert": 3, "factor": 2.5}
PATCH = {"kind": "patch", "site": "layers.3.residual.after", "text": "Once upon a day", "position": 4}
EVERY_KIND = [
    {"kind": "top_k", "k": 3},
    {"kind": "temperature", "t": 2.0, "layer": 1},
    ABLATE,
    SCALE,
    {"kind": "reroute", "layer": 4, "position": 3, "experts": [1, 7, 0]},
    PATCH,
    {"kind": "multiply", "site": "layers.1.attention.output", "factor": 0.5},
]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.fixture(scope="module")
def made(lab) -> Intervene:
    return Intervene(lab, PROMPT, 2)


@pytest.fixture
def widget(made) -> Intervene:
    """Without an edit; the run of the prompt is kept from test to test."""
    made.prompt, made.max_new_tokens, made.edits = PROMPT, 2, []
    return made


def array(widget: Intervene, name: str) -> np.ndarray:
    about = widget.arrays[name]
    size = int(np.prod(about["shape"]))
    return np.frombuffer(widget.data, "<" + about["kind"], size, about["start"]).reshape(about["shape"]).astype(int)


def size(widget: Intervene) -> int:
    return len(json.dumps(widget.state(), default=lambda value: value.hex() if isinstance(value, bytes) else value))


def small(**changes) -> Lab:
    """A random model under the words of mini-mixtral."""
    torch.manual_seed(0)
    usual = dict(vocab=4096, context=8192, window=None, dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden=8)
    words = mixtral_lab.load("mini-mixtral", device="cpu").tokenizer
    return Lab(random_model(mixtral(**(usual | changes))), words, "random")


def test_without_an_edit_both_runs_are_the_same(lab, widget):
    assert widget.edits == [] and widget.comparison["kl"] == 0 and widget.comparison["first_difference"] is None
    assert widget.baseline == widget.edited and widget.baseline["text"] == lab.generate(PROMPT, 2)
    assert widget.notice == "" and not widget.busy
    seq = len(lab.tokenizer.encode(PROMPT))
    assert widget.tokens == lab.tokenizer.pieces(lab.tokenizer.encode(PROMPT))
    assert widget.comparison["decisions"] == seq * lab.config.n_layers
    chosen = F.one_hot(lab.trace(PROMPT).experts, lab.config.n_experts).sum((1, 2))
    assert np.array_equal(array(widget, "used"), chosen.numpy())


def test_numbers_against_tensors(lab, widget):
    widget.edits = [{"kind": "top_k", "k": 1}, ABLATE, SCALE]
    ids = torch.tensor([lab.tokenizer.encode(PROMPT)])
    plain = lab.logits(ids)[0].double()
    with lab.edit(top_k(1), ablate(2, 5, "next_best"), scale(0, 3, 2.5)):
        edited = lab.logits(ids)[0].double()
        trace, text = lab.trace(PROMPT, 2), lab.generate(PROMPT, 2)
    p, q = plain[-1].log_softmax(-1), edited[-1].log_softmax(-1)
    assert widget.comparison["kl"] == pytest.approx(float(F.kl_div(q, p, reduction="sum", log_target=True)), abs=1e-6)
    for run, logits in ((widget.baseline, plain), (widget.edited, edited)):
        assert run["loss"] == pytest.approx(float(F.cross_entropy(logits[:-1], ids[0, 1:])), abs=1e-5)
    assert widget.edited["text"] == text and widget.edited["tokens"] == list(trace.tokens[ids.shape[1] :])
    both = set(p.topk(10).indices.tolist()) | set(q.topk(10).indices.tolist())
    table = widget.frame()
    assert set(table["id"]) == both and table["token"].tolist() == lab.tokenizer.pieces(table["id"])
    np.testing.assert_allclose(table["baseline"], p.exp()[table["id"].tolist()], atol=1e-6)
    np.testing.assert_allclose(table["difference"], 100 * (q.exp() - p.exp())[table["id"].tolist()], atol=1e-4)
    np.testing.assert_allclose(table["log_p_change"], (q - p)[table["id"].tolist()], atol=1e-4)
    assert table[["baseline", "edited"]].max(axis=1).is_monotonic_decreasing


def test_first_difference_and_traces(lab, widget):
    widget.edits = [{"kind": "multiply", "site": "layers.*.attention.output", "factor": 0}]
    before, after = widget.traces()
    assert before.ids.equal(lab.trace(PROMPT, 2).ids) and not after.experts.equal(before.experts[:, : len(after)])
    one, other = before.ids[before.n_prompt :].tolist(), after.ids[after.n_prompt :].tolist()
    at = widget.comparison["first_difference"]
    assert one[:at] == other[:at] and one[at : at + 1] != other[at : at + 1]


def test_changed_decisions(lab, widget):
    widget.edits = [{"kind": "reroute", "layer": 1, "position": 3, "experts": [6, 0]}, ABLATE]
    before, after = widget.traces()
    seq = before.n_prompt
    assert np.array_equal(array(widget, "before"), before.experts[:, :seq].numpy())
    assert np.array_equal(array(widget, "after"), after.experts[:, :seq].numpy())
    changed = array(widget, "changed")
    for layer in range(lab.config.n_layers):
        for at in range(seq):
            old, new = set(before.experts[layer, at].tolist()), set(after.experts[layer, at].tolist())
            named = (layer, at) == (1, 3) or (layer == 2 and 5 in old)
            assert changed[layer, at] == (0 if old == new else FORCED if named else FOLLOWS)
    assert (changed[:, :3] == 0)[:2].all() and changed[0].sum() == 0  # nothing before the first edit
    assert widget.comparison["forced"] == (changed == FORCED).sum() > 0
    assert widget.comparison["follows"] == (changed == FOLLOWS).sum() > 0


@pytest.mark.parametrize(
    "edits", [[], EVERY_KIND, *([edit] for edit in EVERY_KIND[:4]), [PATCH, PATCH | {"position": [1, 2]}]]
)
def test_the_code_computes_the_same(widget, edits):
    widget.edits = edits
    found: dict = {}
    exec(widget.code, found)
    assert found["loss"] == widget.edited["loss"] and found["text"] == widget.edited["text"]
    table = widget.frame()
    assert found["log_p"][table["id"].tolist()].tolist() == pytest.approx(table["edited_log_p"].tolist(), abs=0)
    experts = widget.traces()[1].recorded
    assert all(value.equal(experts[site]) for site, value in found["trace"].recorded.items())
    assert len(widget.said) == len(widget.edits) == len(edits)


def test_the_model_is_as_it_was_bit_for_bit(lab):
    before, logits = state(lab.model), lab.logits(torch.arange(30)[None])
    widget = Intervene(lab, PROMPT, 2)
    widget.edits = EVERY_KIND
    with pytest.raises(WidgetError):
        widget.edits = [ABLATE | {"layer": None, "expert": expert} for expert in range(8)]
    widget.edits = []
    assert same_state(before, state(lab.model)) and torch.equal(lab.logits(torch.arange(30)[None]), logits)
    assert widget.baseline == widget.edited


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"kind": "delete"}, "kind 'delete': it must be one of ablate"),
        ({"kind": "ablate", "layer": 2}, "needs 'expert'"),
        (ABLATE | {"factor": 1}, "has no field 'factor'"),
        (ABLATE | {"layer": 8}, "layer is 8: it must be a whole number, 0 to 7"),
        (ABLATE | {"layer": True}, "layer is True"),
        (ABLATE | {"expert": -1}, "expert is -1"),
        (ABLATE | {"how": "gently"}, "how is 'gently'"),
        (SCALE | {"factor": float("nan")}, "factor is nan: it must be a finite number"),
        (SCALE | {"position": 99}, "position is 99"),
        ({"kind": "reroute", "layer": 0, "position": 1, "experts": [1]}, "takes 2 expert"),
        ({"kind": "reroute", "layer": 0, "position": 1, "experts": [1, 1]}, "name one twice"),
        ({"kind": "reroute", "layer": 0, "position": 1, "experts": 3}, "give a list"),
        ({"kind": "top_k", "k": 9}, "k is 9: it must be a whole number, 1 to 8"),
        ({"kind": "temperature", "t": 0}, "must be above 0"),
        (PATCH | {"position": 9}, "Position 9 is not in the trace"),
        (PATCH | {"site": "layers.0.nothing"}, "There is no site"),
        (PATCH | {"site": "layers.0.attention.pattern"}, "cannot be patched"),
        (PATCH | {"text": ""}, "text is ''"),
        ({"kind": "multiply", "site": "layers.0.feed_forward", "factor": 1.0}, "this is a mixture of experts"),
        ({"kind": "multiply", "site": "layers.0.router.experts", "factor": 0.5}, "whole numbers"),
    ],
)  # fmt: skip
def test_wrong_edits_are_refused(widget, edit, says):
    good, kept = widget.edits, widget.edited
    with pytest.raises(WidgetError, match=says):
        widget.edits = [edit]
    assert widget.edits == good and widget.edited == kept and not widget.busy
    turn = widget.turn
    widget._handle_custom_msg({"edits": [edit]}, [])
    assert says.split(":")[0] in widget.notice and widget.edits == good and widget.turn > turn


def test_what_only_a_run_brings_to_light(widget):
    widget.edits = [SCALE]
    kept = widget.edited
    with pytest.raises(WidgetError, match="of 8 experts are left"):
        widget.edits = [ABLATE | {"expert": expert} for expert in range(8)]
    assert (
        widget.edits == [SCALE | {"position": None}]
        and widget.edited == kept
        and "of 8 experts are left" in widget.notice
    )
    widget.edits = []
    assert widget.notice == ""


def test_a_later_top_k_would_undo_a_reroute(widget):
    reroute = {"kind": "reroute", "layer": 1, "position": 2, "experts": [4]}
    with pytest.raises(WidgetError, match="put it before"):
        widget.edits = [{"kind": "reroute", "layer": 1, "position": 2, "experts": [4, 5]}, {"kind": "top_k", "k": 1}]
    with pytest.raises(WidgetError, match="put it before"):
        widget.edits = [PATCH | {"site": "layers.1.router.experts"}, {"kind": "top_k", "k": 1}]
    widget.edits = [{"kind": "top_k", "k": 1}, reroute]
    assert array(widget, "after")[1, 2].tolist() == [4]


def test_layers_may_take_different_numbers_of_experts(widget):
    widget.edits = [{"kind": "top_k", "k": 4, "layer": 5}]
    assert widget.about["choices_by_layer"] == [2, 2, 2, 2, 2, 4, 2, 2]
    assert array(widget, "changed")[5].tolist() == [FORCED] * len(widget.tokens)
    assert set(array(widget, "changed")[:5].ravel()) == {0}


def test_another_prompt_drops_edits_of_later_positions(lab, widget):
    widget.selected_token = 8
    widget.edits = [SCALE, SCALE | {"expert": 1, "position": 9}]
    widget.prompt = "def main():"
    assert widget.edits == [SCALE | {"position": None}] and "1 edit(s) of later positions were dropped" in widget.notice
    assert widget.selected_token == len(widget.tokens) - 1 and widget.baseline["text"] == lab.generate("def main():", 2)
    widget.max_new_tokens = 0
    assert widget.baseline["text"] == widget.edited["text"] == ""
    for name, wrong in (("prompt", ""), ("prompt", "x" * 30_000), ("max_new_tokens", -1), ("prompt", "a b " * 2000)):
        with pytest.raises(WidgetError):
            setattr(widget, name, wrong)
    assert widget.prompt == "def main():" and widget.max_new_tokens == 0


def test_the_selection_is_settable(widget):
    widget.selected_layer, widget.selected_expert, widget.selected_token = 7, 6, 5
    for name, wrong in (("layer", 8), ("expert", -1), ("token", 99)):
        with pytest.raises(WidgetError, match=f"There is no {name} {wrong}"):
            setattr(widget, "selected_" + name, wrong)
    with pytest.raises(TraitError):
        widget.selected_layer = "first"
    assert (widget.selected_layer, widget.selected_expert, widget.selected_token) == (7, 6, 5)


def test_asked_by_the_page_while_the_kernel_runs(widget):
    async def clicks():
        widget._handle_custom_msg({"edits": [ABLATE]}, [])
        assert widget.busy and widget.comparison["kl"] == 0
        widget._handle_custom_msg({"edits": [SCALE]}, [])
        while widget.busy:
            await asyncio.sleep(0.01)

    asyncio.run(clicks())
    assert widget.edits == [SCALE | {"position": None}] and widget.said[0].startswith("Expert 3, layer 0")
    assert widget.comparison["kl"] > 0

    async def bad():
        widget._handle_custom_msg({"edits": [ABLATE | {"expert": expert} for expert in range(8)]}, [])
        while widget.busy:
            await asyncio.sleep(0.01)

    asyncio.run(bad())
    assert widget.edits == [SCALE | {"position": None}] and "of 8 experts are left" in widget.notice


def test_dense(widget):
    dense = Intervene(mixtral_lab.load("mini-mistral", device="cpu"), PROMPT, 2)
    assert "is a dense model" in dense.notice and dense.arrays == {} and "decisions" not in dense.comparison
    with pytest.raises(WidgetError, match="is a dense model"):
        dense.edits = [ABLATE]
    dense.edits = [{"kind": "multiply", "site": "layers.2.feed_forward", "factor": 0.0}, PATCH]
    assert dense.comparison["kl"] > 0 and "is a dense model" in dense.notice
    found: dict = {}
    exec(dense.code, found)
    assert found["loss"] == dense.edited["loss"]
    assert "router" not in " ".join(dense.about["sites"]) and "table" in dense.fallback()


def test_4096_tokens_one_layer():
    long = Intervene(small(n_layers=1, n_experts=64, n_choices=1), " a" * 4_300, 1)
    seq = long.about["seq"]
    assert seq > 4_096 and len(long.tokens) == 4_096 and long.about["first"] == seq - 4_096
    long.edits = [{"kind": "top_k", "k": 64}]
    assert array(long, "after").shape == (1, 4_096, 4) and array(long, "used").sum() == seq
    assert size(long) < MOST_STATE and len(long.fallback()) < 60_000


@pytest.mark.parametrize("n_layers, n_experts, k", [(1, 64, 1), (3, 5, 5), (6, 8, 1)])
def test_odd_models(n_layers, n_experts, k):
    odd = Intervene(small(n_layers=n_layers, n_experts=n_experts, n_choices=k), "A few words", 1)
    odd.edits = [{"kind": "ablate", "layer": None, "expert": 0, "how": "renormalise"}]
    assert odd.code.splitlines()[5] == "# lab is the one that the widget was made with"
    found = {"lab": odd.lab}
    exec(odd.code, found)
    assert found["loss"] == odd.edited["loss"] and array(odd, "used").shape == (n_layers, n_experts)


def test_one_token(lab, monkeypatch):
    monkeypatch.setattr(lab.tokenizer, "encode", lambda text: [373])
    one = Intervene(lab, "was", 1)
    assert one.tokens == ["␣was"] and one.baseline["loss"] is None and "Loss" not in one.fallback()
    one.edits = [{"kind": "ablate", "layer": 0, "expert": one.traces()[0].experts[0, 0, 0].item()}]
    json.dumps(one.state(), default=str, allow_nan=False)


@pytest.mark.parametrize("prompt", ["<script>alert(1)</script>", "שלום עולם", "日本語 🤖\n\ttab", "a\u202eb\u0000c"])
def test_odd_texts(lab, prompt):
    odd = Intervene(lab, prompt, 1)
    odd.edits = [{"kind": "patch", "site": "embed", "text": prompt + prompt, "position": 1}]
    assert "<script>" not in odd.fallback() and size(odd) < 20_000
    found: dict = {}
    exec(odd.code, found)
    assert found["prompt"] == prompt and found["loss"] == odd.edited["loss"]


def test_fallback_and_page(lab, widget, tmp_path):
    widget.edits = [ABLATE]
    text = widget.fallback()
    assert f"{widget.comparison['kl']:.4g} nats" in text and "Expert 5, layer 2" in text and text.count("<circle") == 64
    assert len(text) < 60_000 and widget.edited["text"].strip() in text
    assert widget.save_html(tmp_path / "page.html").stat().st_size < 200_000
    assert widget.title == "What a change does: mini-mixtral"
