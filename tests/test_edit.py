"""Ready-made edits do what they say, together too, and leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_model import random_model
from test_parity import mixtral

import mixtral_lab
from mixtral_lab.edit import EditError, ablate, editing, patch, replay, reroute, scale, temperature, top_k
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.model.moe import route, share
from mixtral_lab.sites import recording, resolve
from mixtral_lab.trace import Trace

TEXT = "Once upon a time there was a little robot."
PROMPTS = ["Once upon a time", "def main():"]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return mixtral_lab.load("mini-mixtral")


@pytest.fixture(scope="module")
def plain(lab) -> Trace:
    return lab.trace(TEXT, 6, "*")


def both(lab: Lab, *edits, new: int = 6) -> Trace:
    with lab.edit(*edits):
        return lab.trace(TEXT, new, "*")


def state(model: Transformer) -> tuple:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }
    settings = [(block.router.n_choices, block.experts.dispatch, block.attention.plain) for block in model.blocks]
    return weights, hooks, settings


def same_state(one: tuple, other: tuple) -> bool:
    return one[1:] == other[1:] and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.mark.parametrize("how", ["zero", "renormalise", "next_best"])
def test_ablation(lab, plain, how):
    edited = both(lab, ablate(3, 2, how), new=0)
    before = plain["layers.3.router.experts"][: len(edited)]
    experts, weights = edited["layers.3.router.experts"], edited["layers.3.router.weights"]
    chose = (before == 2).any(-1)
    assert chose.any() and not chose.all()
    own = plain["layers.3.router.weights"][: len(edited)]
    torch.testing.assert_close(weights[~chose], own[~chose], atol=1e-6, rtol=1e-5)
    assert experts[~chose].equal(before[~chose])
    if how == "next_best":
        logits = plain["layers.3.router.logits"][: len(edited)].clone()
        logits[:, 2] = -torch.inf
        expected = route(logits, 2)
        assert experts.equal(expected.experts)
        torch.testing.assert_close(weights, expected.weights, atol=1e-5, rtol=1e-4)
    else:
        gone = experts == 2
        assert experts.equal(before) and (weights[gone] == 0).all()
        rest = torch.where(gone, 0.0, own)
        if how == "renormalise":
            rest = rest / rest.sum(-1, keepdim=True)
        torch.testing.assert_close(weights, rest, atol=1e-5, rtol=1e-4)
        assert (edited["layers.3.experts.weighted"][gone] == 0).all()


def test_ablating_everywhere_names_no_layer(lab):
    edited = both(lab, ablate(None, 5, "next_best"))
    assert not (edited.experts == 5).any()


def test_the_last_expert_of_one_choice_leaves_nothing():
    model = random_model(mixtral(n_choices=1))
    with torch.no_grad(), editing(model, ablate(0, 1)), recording(model, ["layers.0.router.*"]) as recorder:
        model(torch.arange(20)[None])
    at = recorder.values()
    weights = at["layers.0.router.weights"]
    assert weights.isfinite().all() and (weights[at["layers.0.router.experts"] == 1] == 0).all()


def test_rerouting(lab, plain):
    edited = both(lab, reroute(2, 4, [7, 1]), new=0)
    experts = edited["layers.2.router.experts"]
    assert experts[4].tolist() == [7, 1]
    others = [i for i in range(len(edited)) if i != 4]
    assert experts[others].equal(plain["layers.2.router.experts"][others])
    logits = plain["layers.2.router.logits"][4]
    torch.testing.assert_close(
        edited["layers.2.router.weights"][4], share(logits[torch.tensor([7, 1])]), atol=1e-5, rtol=1e-4
    )
    assert (both(lab, reroute(None, None, [0, 3])).experts == torch.tensor([0, 3])).all()


def test_a_written_token_is_rerouted_in_its_decode_step(lab, plain):
    position = plain.n_prompt + 2
    edited = both(lab, reroute(5, position, [6, 0]))
    assert edited["layers.5.router.experts"][position].tolist() == [6, 0]


def test_scaling(lab, plain):
    edited = both(lab, scale(1, 4, 0.25), new=0)
    own, chose = plain["layers.1.router.weights"][: len(edited)], plain["layers.1.router.experts"][: len(edited)] == 4
    assert chose.any()
    torch.testing.assert_close(
        edited["layers.1.router.weights"], torch.where(chose, own * 0.25, own), atol=1e-6, rtol=1e-5
    )
    at = int(chose.any(-1).nonzero()[0])
    single = both(lab, scale(1, 4, 0.25, position=at), new=0)["layers.1.router.weights"]
    torch.testing.assert_close(single[at], edited["layers.1.router.weights"][at])
    torch.testing.assert_close(single[at + 1 :], own[at + 1 :], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("dispatch", ["every", "sorted", "one_by_one", "dense"])
def test_top_k(lab, plain, k, dispatch):
    for block in lab.model.blocks:
        block.experts.dispatch = dispatch
    edited = both(lab, top_k(k), new=0)
    for block in lab.model.blocks:
        block.experts.dispatch = "auto"
    expected = route(plain["layers.0.router.logits"][: len(edited)], k)
    assert edited["layers.0.router.experts"].equal(expected.experts)
    torch.testing.assert_close(edited["layers.0.router.weights"], expected.weights, atol=1e-5, rtol=1e-4)


def test_temperature(lab, plain):
    edited = both(lab, temperature(4.0, layer=0), new=0)
    own = plain["layers.0.router.logits"][: len(edited)]
    torch.testing.assert_close(edited["layers.0.router.logits"], own / 4, atol=1e-6, rtol=1e-5)
    assert edited["layers.0.router.experts"].equal(plain["layers.0.router.experts"][: len(edited)])


@pytest.mark.parametrize(
    "site",
    [
        "embed", "layers.2.residual.after", "layers.4.attention.heads.key", "layers.4.attention.heads.query",
        "layers.1.attention.heads.out", "layers.3.experts.weighted", "layers.3.router.experts", "layers.*.router.logits",
    ],
)  # fmt: skip
def test_patching(lab, site):
    source = lab.trace("Once upon a day there was a little dragon.", 0, site)
    edited = both(lab, patch(site, source, [3, 5]), new=3)
    plain = both(lab, new=3) if site == "embed" else lab.trace(TEXT, 3, site)
    for name in resolve(lab.config, site):
        axis = lab.sites[name].seq
        index = torch.tensor([3, 5])
        torch.testing.assert_close(
            edited[name].index_select(axis, index), source[name].index_select(axis, index), msg=name
        )
        if name == site and not site.startswith("layers.*"):
            torch.testing.assert_close(
                edited[name].index_select(axis, torch.tensor([0, 1, 2])),
                plain[name].index_select(axis, torch.tensor([0, 1, 2])), atol=1e-4, rtol=1e-4,
            )  # fmt: skip


def test_patching_a_run_into_itself_changes_nothing(lab, plain):
    everywhere = list(range(plain.n_prompt))
    edited = both(lab, *(patch(f"layers.{n}.residual.between", plain, everywhere) for n in range(8)), new=0)
    torch.testing.assert_close(edited["logits"], plain["logits"][: len(edited)], atol=1e-4, rtol=1e-4)


def test_replay_of_its_own_routing_is_the_run_itself(lab, plain):
    again = replay(plain)
    edited = both(lab, again)
    torch.testing.assert_close(edited["logits"], plain["logits"], atol=1e-4, rtol=1e-4)
    table = again.frame()
    assert (table["shared"] == 2).all() and table["same_first"].all()
    assert len(table) == 8 * len(plain)


def test_replay_forces_what_it_is_given(lab, plain):
    shifted = Trace.from_arrays(plain.tokens, (plain.experts + 1) % 8)
    again = replay(shifted)
    edited = both(lab, again, new=0)
    assert edited.experts.equal(shifted.experts[:, : len(edited)])
    assert (edited["logits"] - plain["logits"][: len(edited)]).abs().max() > 0.1
    torch.testing.assert_close(
        edited["layers.0.router.weights"],
        share(plain["layers.0.router.logits"][: len(edited)].gather(-1, shifted.experts[0, : len(edited)])), atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    first = again.frame().query("layer == 0")
    assert [list(own) for own in first["own"]] == plain.experts[0, : len(edited)].tolist()
    assert not first["same_first"].all()


def test_replay_may_lack_the_last_token(lab, plain):
    short = Trace.from_arrays(plain.tokens[:-1], plain.experts[:, :-1])
    with lab.edit(replay(short)):
        edited = lab.trace_ids(plain.ids.tolist(), 0, "*")
    torch.testing.assert_close(edited["logits"], plain["logits"], atol=1e-4, rtol=1e-4)


def test_edits_compose_in_order(lab):
    edited = both(lab, top_k(3), ablate(None, 0, "next_best"), ablate(None, 1, "next_best"), temperature(2.0))
    assert edited.experts.shape[-1] == 3
    assert not ((edited.experts == 0) | (edited.experts == 1)).any()
    twice = both(lab, {"layers.0.residual.after": lambda x: x + 1}, {"layers.0.residual.after": lambda x: x * 2}, new=0)
    once = both(lab, {"layers.0.residual.after": lambda x: (x + 1) * 2}, new=0)
    torch.testing.assert_close(twice["logits"], once["logits"])
    with lab.edit(top_k(1)), lab.edit(scale(0, 3, 0.0)):
        nested = lab.trace(TEXT)
    assert nested.experts.shape[-1] == 1


def test_everything_is_as_before_bit_for_bit(lab):
    before, logits = state(lab.model), lab.logits(torch.arange(30)[None])
    with lab.edit(top_k(1), ablate(None, 0), reroute(0, 0, [1]), {"embed": lambda x: -x}):
        lab.trace(TEXT, 3)
    assert same_state(before, state(lab.model)) and torch.equal(lab.logits(torch.arange(30)[None]), logits)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["in the change", "in the block", "while it opens"])
def test_everything_is_as_before_after_an_error(lab, error, where, monkeypatch):
    before, logits = state(lab.model), lab.logits(torch.arange(30)[None])

    def fail(*_):
        raise error

    if where == "while it opens":
        monkeypatch.setattr("mixtral_lab.edit.resolve", fail)
    with pytest.raises(error), lab.edit(top_k(1), {"layers.5.residual.after": fail}):
        if where == "in the block":
            raise error
        lab.trace(TEXT, 3)
    assert same_state(before, state(lab.model)) and torch.equal(lab.logits(torch.arange(30)[None]), logits)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: ablate(0, 8), "no expert 8: there are 8, 0 to 7"),
        (lambda t: ablate(0, -1), "no expert -1"),
        (lambda t: ablate(9, 0), "Its layers are 0 to 7"),
        (lambda t: ablate(0, 0, "gently"), "'zero', 'renormalise' or 'next_best'"),
        (lambda t: reroute(0, 3, [1, 9]), "no expert 9"),
        (lambda t: reroute(0, 3, [1, 1]), "name one twice"),
        (lambda t: reroute(0, 3, [1]), "takes 2 experts here, but 1 are named"),
        (lambda t: reroute(0, 500, [1, 2]), "position 500 never took effect"),
        (lambda t: reroute(0, -1, [1, 2]), "0 or above"),
        (lambda t: top_k(9), "k is 9, but layers.0.router has only 8 experts"),
        (lambda t: top_k(0), "at least 1"),
        (lambda t: temperature(0.0), "above 0"),
        (lambda t: patch("layers.0.residual.after", t, 99), "Position 99 is not in the trace"),
        (lambda t: patch("layers.0.attention.pattern", t, 1), "its keys belong to its own text"),
        (lambda t: patch("layers.0.router.nothing", t, 1), "This trace has no"),
        (lambda t: replay(Trace.from_arrays(t.tokens, t.experts[..., :1])), "1 choices per token"),
        (lambda t: replay(Trace.from_arrays(t.tokens, t.experts.repeat(2, 1, 1))), "Its layers are 0 to 7"),
        (lambda t: {"layers.0.feed_forward": lambda x: x}, "this is a mixture of experts"),
    ],
)
def test_what_cannot_take_effect_raises(lab, plain, edit, says):
    with pytest.raises(mixtral_lab.LabError, match=says):
        both(lab, edit(plain))


def test_single_positions_need_texts_of_one_length(lab):
    with pytest.raises(EditError, match="one at a time"), lab.edit(reroute(0, 1, [1, 2])):
        lab.generate([*PROMPTS, "a longer prompt than the others"], 2)
    with lab.edit(ablate(0, 1)):
        assert len(lab.generate(PROMPTS, 2)) == 2


def test_generation_under_an_edit_is_one_run_under_it(lab):
    with lab.edit(ablate(2, 1), {"layers.4.residual.between": lambda x: 1.1 * x}):
        written = lab.trace(TEXT, 8, "logits")
        whole = lab.trace_ids(written.ids.tolist(), 0, "logits")
    torch.testing.assert_close(written["logits"], whole["logits"], atol=1e-4, rtol=1e-4)


def test_a_replay_knows_the_last_run_alone(lab, plain):
    again = replay(plain)
    for _ in range(2):
        with lab.edit(again):
            lab.logits(plain.ids[None])
        assert again.own.shape == plain.experts.shape


def test_nothing_is_next_best_to_the_only_expert():
    model = random_model(replace(mixtral(), n_experts=1, n_choices=1))
    with pytest.raises(EditError, match="only 0 of 1 experts are left"), editing(model, ablate(0, 0, "next_best")):
        model(torch.arange(5)[None])


@pytest.mark.parametrize("positions", [None, [3, 5]])
def test_a_trace_shows_what_an_edit_made_not_what_it_was_made_of(lab, positions):
    """Patterns are computed from queries and keys, contributions from answers and weights: not where these say nothing of them."""
    with lab.edit({"layers.0.attention.scores": lambda s: s * 0}):
        trace = lab.trace(TEXT, sites="*", positions=positions)
    seen = trace["layers.0.attention.pattern"] > 0
    torch.testing.assert_close(
        trace["layers.0.attention.pattern"][seen], (1 / seen.sum(-1)).expand(4, 2, -1)[..., None].expand_as(seen)[seen]
    )
    sums = ["layers.0.experts.out", "layers.0.router.weights", "layers.0.experts"]
    with lab.edit({"layers.0.experts.weighted": lambda x: x * 2}):
        trace = lab.trace(TEXT, sites=sums, positions=positions)
    torch.testing.assert_close(trace["layers.0.experts.weighted"].sum(1), trace["layers.0.experts"])
    heads = ["layers.0.attention.heads.*"]
    with lab.edit({"layers.0.attention.pattern": lambda p: p * 0}):
        trace = lab.trace(TEXT, sites=heads)
    assert not trace["layers.0.attention.pattern"].any() and not trace["layers.0.attention.heads.out"].any()


def test_a_pattern_does_not_patch_what_has_other_keys(lab, plain):
    other = lab.trace(TEXT, sites="*")
    for site in ("layers.0.attention.[p]attern*", "layers.0.attention.*", "layers.0.*"):
        with pytest.raises(EditError, match="its keys belong to its own text"), lab.edit(patch(site, other, 1)):
            lab.logits(other.ids[None])


@pytest.mark.parametrize("edit", [lambda at: reroute(0, at, [1, 2]), lambda at: scale(0, 1, 0.5, at)])
def test_every_position_must_be_met(lab, edit):
    with pytest.raises(EditError, match="at position 50, 500 never"), lab.edit(edit([2, 50, 500])):
        lab.logits(torch.arange(20)[None])
    with lab.edit(edit([2, 19])):
        lab.logits(torch.arange(20)[None])


def test_too_few_experts_left(lab):
    gone = [ablate(1, expert, "next_best") for expert in range(7)]
    with pytest.raises(EditError, match="only 1 of 8 experts are left for a token, which takes 2"), lab.edit(*gone):
        lab.logits(torch.arange(20)[None])
    with lab.edit(*gone[:6]):
        trace = lab.trace(TEXT)
    assert set(trace.experts[1].flatten().tolist()) == {6, 7}
