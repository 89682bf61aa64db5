"""RouterExplorer holds what the trace holds, says what it lacks, and its selection is read and set in Python."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_figures import ODD, dense, made_up
from traitlets import TraitError

import mixtral_lab
from mixtral_lab.analysis import near_tie_margin
from mixtral_lab.analysis.certainty import NEAR_TIE
from mixtral_lab.edit import ablate, reroute
from mixtral_lab.trace import Trace
from mixtral_lab.widgets import RouterExplorer
from mixtral_lab.widgets.base import LARGEST, MINUS_INFINITY, MOST_STATE, UNKNOWN, WidgetError

SHAPES = {
    "usual": {"n_prompt": 9},
    "one token": {"tokens": ("<s>",)},
    "one layer, top-1": {"layers": 1, "choices": 1},
    "many experts": {"experts": 64, "choices": 8},
    "very many experts": {"experts": 300, "layers": 2},
    "every expert": {"experts": 2},
    "right to left": {"tokens": ("<s>", "שלום", "␣עולם", "⏎", "␣مرحبا", "<script>alert(1)</script>")},
    "bfloat16": {"dtype": torch.bfloat16},
}


def array(explorer: RouterExplorer, name: str, state: dict | None = None) -> np.ndarray:
    state = explorer.state() if state is None else state
    about, data = state["arrays"][name], bytes(state["data"])
    size = int(np.prod(about["shape"])) * np.dtype(about["kind"]).itemsize
    found = np.frombuffer(data[about["start"] : about["start"] + size], "<" + about["kind"]).reshape(about["shape"])
    if about["step"] is None:
        return found
    whole = np.where(found == MINUS_INFINITY, -np.inf, found * about["step"])
    return np.where(found == UNKNOWN, np.nan, whole)


def bits(explorer: RouterExplorer, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(array(explorer, name))[: int(np.prod(shape))].reshape(shape).astype(bool)


def size(explorer: RouterExplorer) -> int:
    state = explorer.state()
    return sum(
        len(value) if isinstance(value, bytes) else len(json.dumps(value, ensure_ascii=False).encode())
        for value in state.values()
    )


def big(seq=4096, layers=32, experts=8, choices=2) -> Trace:
    return made_up([f"␣word{at % 999}" for at in range(seq)], layers, experts, choices)


@pytest.fixture(scope="module")
def lab():
    return mixtral_lab.load("mini-mixtral", device="cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_state_is_the_trace(name):
    trace = made_up(**SHAPES[name])
    explorer, routing = RouterExplorer(trace), trace.routing
    (pane,) = explorer.panes
    assert tuple(pane["tokens"]) == trace.tokens and pane["n_prompt"] == trace.n_prompt
    assert explorer.part == {"start": 0, "stop": len(trace), "whole": True} and explorer.notice == ""
    assert (explorer.length, explorer.n_layers, explorer.n_experts) == (len(trace), trace.n_layers, trace.n_experts)
    assert len(explorer.colours) == trace.n_experts
    np.testing.assert_array_equal(array(explorer, "experts0"), routing.experts)
    for part in ("weights", "logits"):
        want = getattr(routing, part).float().numpy()
        np.testing.assert_allclose(array(explorer, part + "0"), want, atol=np.abs(want).max() / LARGEST, rtol=0)
    ties = bits(explorer, "near_ties0", routing.experts.shape[:2])
    if routing.experts.shape[2] == trace.n_experts:
        assert not ties.any()
    else:
        margin = near_tie_margin(routing.logits.float().numpy(), routing.experts.shape[2])
        np.testing.assert_array_equal(ties, margin < NEAR_TIE)


def test_near_ties_of_a_real_text(lab):
    trace = lab.trace("Once upon a time there was a little dog.", max_new_tokens=30)
    ties = bits(RouterExplorer(trace), "near_ties0", trace.experts.shape[:2])
    np.testing.assert_array_equal(ties, near_tie_margin(trace.routing.logits.numpy(), 2) < NEAR_TIE)
    assert ties.any() and not ties.all()


def test_numbers_that_are_none():
    logits = torch.tensor([[[1.0, -torch.inf, 0.5], [torch.nan, 0.0, -2.0]]])
    trace = Trace.from_arrays(("a", "b"), torch.tensor([[[0, 2], [1, 2]]]), torch.full((1, 2, 2), torch.nan), logits)
    explorer = RouterExplorer(trace)
    found = array(explorer, "logits0")[0]
    assert found[0, 1] == -np.inf and np.isnan(found[1, 0]) and found[1, 2] == pytest.approx(-2.0)
    assert np.isnan(array(explorer, "weights0")).all()
    assert not bits(explorer, "near_ties0", (1, 2)).any()


def test_the_selection_is_read_and_set():
    explorer = RouterExplorer(made_up())
    assert (explorer.selected_token, explorer.selected_layer, explorer.selected_expert) == (1, 2, None)
    explorer.selected_token, explorer.selected_layer, explorer.selected_expert = np.int64(7), 4, 7
    explorer.search = "dog"
    state = explorer.state()
    assert (state["selected_token"], state["selected_layer"], state["selected_expert"]) == (7, 4, 7)
    assert type(explorer.selected_token) is int and state["search"] == "dog"
    explorer.selected_expert = None
    assert explorer.selected_expert is None
    assert RouterExplorer(made_up(("a",))).selected_token == 0


@pytest.mark.parametrize(
    ("trait", "wrong", "says"),
    [
        ("selected_token", 14, "There is no token 14: tokens are numbered 0 to 13."),
        ("selected_token", -1, "no token -1"),
        ("selected_token", "dog", "no token 'dog'"),
        ("selected_token", 1.5, "no token 1.5"),
        ("selected_token", True, "no token True"),
        ("selected_token", None, "no token None"),
        ("selected_layer", 5, "There is no layer 5: layers are numbered 0 to 4."),
        ("selected_expert", 8, "There is no expert 8: experts are numbered 0 to 7, or None for no expert."),
    ],
)
def test_a_wrong_selection_is_refused(trait, wrong, says):
    explorer = RouterExplorer(made_up())
    before = getattr(explorer, trait)
    with pytest.raises(WidgetError, match=says):
        setattr(explorer, trait, wrong)
    assert getattr(explorer, trait) == before
    with pytest.raises(TraitError):
        explorer.search = 3


def test_a_wrong_value_from_a_page_is_taken_back():
    explorer = RouterExplorer(made_up())
    with pytest.raises(TraitError, match="There is no layer 5"):
        explorer.set_state({"selected_layer": 5})
    assert explorer.selected_layer != 5


def test_traces_that_cannot_be_shown():
    whole = made_up()
    with pytest.raises(WidgetError, match="each token needs its own"):
        RouterExplorer(replace(whole, tokens=whole.tokens[:3], ids=whole.ids[:3]))
    with pytest.raises(WidgetError, match="no tokens"):
        RouterExplorer(replace(dense(), tokens=(), ids=torch.tensor([], dtype=torch.long)))
    with pytest.raises(WidgetError, match="5 and 4 layers"):
        RouterExplorer(whole, made_up(layers=4))
    with pytest.raises(WidgetError, match="give two"):
        RouterExplorer(whole, whole, names=("one",))


def test_what_is_missing_is_said(lab):
    whole = made_up()
    explorer = RouterExplorer(dense())
    assert "dense model" in explorer.notice and explorer.n_experts == 0
    with pytest.raises(WidgetError, match="as there are no experts"):
        explorer.selected_expert = 0
    assert "a</span>" in explorer.fallback()

    bare = Trace.from_arrays(whole.tokens, whole.experts)
    explorer = RouterExplorer(bare)
    assert "weights were not recorded" in explorer.notice and "logits were not recorded" in explorer.notice
    assert set(explorer.arrays) == {"experts0", "near_ties0"} and explorer.panes[0]["has_logits"] is False
    assert "weights" not in RouterExplorer(Trace.from_arrays(whole.tokens, whole.experts, whole.routing.weights)).notice

    some = lab.trace("Once upon a time", sites=["layers.2.router.*"], positions=[0, 3])
    explorer = RouterExplorer(some)
    assert f"{lab.config.n_layers - 1} were not recorded: 0, 1, 3" in explorer.notice
    assert f"Of {len(some)} tokens, {len(some) - 2} were not recorded" in explorer.notice
    want = np.full((lab.config.n_layers, len(some), 2), -1)
    want[2, [0, 3]] = some["layers.2.router.experts"].numpy()
    np.testing.assert_array_equal(array(explorer, "experts0"), want)
    explorer.fallback()

    unrouted = lab.trace("Once upon a time", sites=["layers.*.residual.after"])
    assert "Record it with lab.trace" in RouterExplorer(unrouted).notice


def test_two_runs_before_and_after_an_edit(lab):
    before = lab.trace("Once upon a time there was a little dog.")
    layer, position = 2, 5
    lost = int(before.experts[layer, position, 0])
    with lab.edit(ablate(layer, lost, how="next_best")):
        after = lab.trace("Once upon a time there was a little dog.")
    explorer = RouterExplorer(before, after, names=("before", "after"))
    want = (before.experts.sort(-1).values != after.experts.sort(-1).values).any(-1).numpy()
    np.testing.assert_array_equal(bits(explorer, "differs", want.shape), want)
    assert want[layer, position] and not want[:layer].any()
    np.testing.assert_array_equal(array(explorer, "experts1"), after.experts)
    assert f"take other experts in {want.sum()} of {want.size} decisions" in explorer.comparison
    most = want.sum(1).argmax()
    assert f"most often in layer {most} ({want[most].sum()} of {want.shape[1]})" in explorer.comparison
    assert "texts differ" not in explorer.comparison
    assert [pane["name"] for pane in explorer.panes] == ["before", "after"]
    assert "before" in explorer.fallback() and explorer.title.endswith("before and after?")
    assert "the same experts in all" in RouterExplorer(before, before).comparison


def test_a_forced_choice_is_no_near_tie(lab):
    text = "Once upon a time"
    worst = [int(e) for e in lab.trace(text).routing.logits[2, 3].topk(2, largest=False).indices]
    with lab.edit(reroute(2, 3, worst)):
        trace = lab.trace(text)
    explorer = RouterExplorer(trace)
    assert array(explorer, "experts0")[2, 3].tolist() == worst
    assert not bits(explorer, "near_ties0", trace.experts.shape[:2])[2, 3]


def test_two_texts_are_compared_by_position():
    one = made_up(("<s>", "a", "b", "c"))
    other = made_up(("<s>", "a", "x"), experts=12)
    explorer = RouterExplorer(one, other)
    assert (explorer.length, explorer.n_experts) == (4, 12)
    assert "compared by position, 0 to 2, of which 2 hold the same token" in explorer.comparison
    assert explorer.arrays["differs"]["shape"] == [2]  # 5 layers of 3 positions, 15 bits
    explorer.selected_token = 3
    assert "no decision that both recorded" in RouterExplorer(dense(), replace(dense(), model="b")).comparison
    assert "They choose 2 and 1 experts" in RouterExplorer(one, made_up(one.tokens, choices=1)).comparison


def test_a_long_text_stays_below_a_megabyte_and_sends_numbers_when_asked():
    trace = big()
    explorer = RouterExplorer(trace)
    assert size(explorer) < MOST_STATE
    assert explorer.part == {"start": 0, "stop": 4096, "whole": False} and "logits0" not in explorer.arrays
    np.testing.assert_array_equal(array(explorer, "experts0"), trace.experts)
    np.testing.assert_allclose(array(explorer, "weights0"), trace.routing.weights, atol=1e-4)

    sent = []
    explorer.send = lambda content, buffers=None: sent.append((content, buffers))
    for nonsense in ({"token": 4096}, {"token": "x"}, {}, None, {"token": -1}):
        explorer._handle_custom_msg(nonsense, [])
    assert not sent
    explorer._handle_custom_msg({"token": 4000}, [])
    ((content, buffers),) = sent
    assert content == {"token": 4000, "pane": 0, "width": 8}
    np.testing.assert_array_equal(np.frombuffer(buffers[0], "<f4").reshape(32, 8), trace.routing.logits[:, 4000])


def test_a_saved_page_carries_everything(tmp_path):
    trace = big(2048)
    explorer = RouterExplorer(trace)
    assert not explorer.part["whole"]
    page = explorer.save_html(tmp_path / "page.html").read_text("utf-8")
    state = json.loads(page.split('id="state">')[1].split("</script>")[0])
    assert state["part"] == {"start": 0, "stop": 2048, "whole": True} and "logits0" in state["arrays"]
    assert not explorer.part["whole"]  # the widget stays small


@pytest.mark.parametrize(
    "shape", [(20_000, 8, 8, 2), (9000, 2, 4, 1), (4096, 32, 64, 8)], ids=["long", "shallow", "many experts"]
)
def test_of_what_is_too_much_a_part_is_shown(shape):
    trace = big(*shape)
    explorer = RouterExplorer(trace)
    assert size(explorer) < MOST_STATE
    start, stop = explorer.part["start"], explorer.part["stop"]
    assert start == 0 and 400 < stop <= 8192 and stop < len(trace)
    explorer.selected_token = len(trace) - 1
    start, stop = explorer.part["start"], explorer.part["stop"]
    assert stop == len(trace) and size(explorer) < MOST_STATE
    assert tuple(explorer.panes[0]["tokens"]) == trace.tokens[start:stop]
    np.testing.assert_array_equal(array(explorer, "experts0"), trace.experts[:, start:stop])


def test_two_long_texts_stay_below_a_megabyte():
    explorer = RouterExplorer(big(), big())
    assert size(explorer) < MOST_STATE and explorer.part["stop"] > 1500


def test_the_fallback_is_small_and_says_what_it_leaves_out():
    for trace in (big(), big(512), big(600, 3, 300)):
        still = RouterExplorer(trace).fallback()
        assert len(still.encode()) < 60_000 and f"of {len(trace):,} tokens" in still
    still = RouterExplorer(made_up(ODD, model="<b>x</b>")).fallback()
    assert "<b>" not in still and "&lt;b&gt;x" in still and "<script" not in still


def test_titles():
    assert RouterExplorer(made_up(("<s>", "Once", "␣<b>"))).title == "Who reads “Once <b>”?"
    assert RouterExplorer(made_up(("<s>", "⏎"))).title == "Who reads this text?"
    assert RouterExplorer(made_up(("a",)), made_up(("b",))).title == "Who reads “a” and “b”?"
