"""Sweeps against the same changes made without `mixtral_lab.edit`: by other mixtures, copied weights and plain hooks."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mixtral_lab
from mixtral_lab.analysis import AnalysisError
from mixtral_lab.analysis import causal as analysis
from mixtral_lab.analysis.causal import (
    ablation_sweep,
    noise_floor,
    patch_sweep,
    questions,
    replay_effect,
    reroute_sweep,
    score,
    top_k_sweep,
)
from mixtral_lab.config import Config
from mixtral_lab.figures import FigureError
from mixtral_lab.figures import causal as figures
from mixtral_lab.lab import Lab
from mixtral_lab.model import Transformer
from mixtral_lab.model.moe import Routing, mix_dense
from mixtral_lab.trace import Trace


class Letters:
    """A token for each letter, but one for "qu" together; a text begins with token 1."""

    vocab, stop_ids = 30, ()

    def encode(self, text, bos=True):
        ids = [2 if piece == "qu" else 3 + (ord(piece) - ord("a")) % 27 for piece in re.findall("qu|.", text)]
        return [1] * bos + ids

    def pieces(self, ids):
        return [{1: "<s>", 2: "qu"}.get(int(i), chr(int(i) - 3 + ord("a"))) for i in ids]


def tiny(seed: int = 0, **changes) -> Lab:
    torch.manual_seed(seed)
    shape = dict(dim=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, hidden=8, vocab=30, context=64)
    lab = Lab.__new__(Lab)
    lab.model = Transformer(Config(**{**shape, "n_experts": 4, "n_choices": 2, **changes})).eval()
    lab.tokenizer, lab.name = Letters(), "tiny"
    for parameter in lab.model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # so that a change is well above rounding
    return lab


def slow_log_p(lab: Lab, ids: list[int]) -> list[float]:
    """What the model gives to each token, from those before it alone, one run for each."""
    found = []
    for end in range(1, len(ids)):
        logits = lab.logits(torch.tensor([ids[:end]]))[0, -1].double()
        found.append(float(logits[ids[end]] - logits.exp().sum().log()))
    return found


def mixed(lab: Lab, layer: int, reroute_logits) -> Lab:
    """The same model, but in one layer `reroute_logits(logits, experts, weights)` decides who mixes, and how much."""
    other = copy.copy(lab)
    other.model = copy.deepcopy(lab.model)

    def mix(x, routing, experts):
        return mix_dense(x, Routing(routing.logits, *reroute_logits(*routing)), experts)

    for number, block in enumerate(other.model.blocks):
        block.experts.dispatch = mix if number == layer else mix_dense
    return other


def without(expert: int, how: str):
    def decide(logits, experts, weights):
        if how == "next_best":
            rest = logits.clone()
            rest[..., expert] = -1e9
            best = rest.topk(experts.shape[-1], dim=-1)
            return best.indices, best.values.softmax(-1)
        left = torch.where(experts == expert, 0.0, weights)
        return experts, left / left.sum(-1, keepdim=True).clamp(min=1e-9) if how == "renormalise" else left

    return decide


def test_questions_are_texts_and_what_follows():
    lab = tiny()
    assert questions(lab, ["abc", "d"], ["ef", "g"]) == [([1, 3, 4, 5, 7, 8], 2), ([1, 6, 9], 1)]
    assert questions(lab, "ab") == [([1, 3, 4], 0)]
    with pytest.raises(AnalysisError, match="does not begin with a token of its own"):
        questions(lab, "aq", "u")
    with pytest.raises(AnalysisError, match="2 texts and 1 targets"):
        questions(lab, ["a", "b"], "c")
    with pytest.raises(AnalysisError, match="0 texts"):
        questions(lab, [])
    with pytest.raises(AnalysisError, match="A text is empty"):
        questions(lab, ["ab", ""])


@given(st.integers(0, 99), st.text("abcdefg", min_size=1, max_size=6), st.text("abc", min_size=1, max_size=3))
def test_a_score_is_what_each_token_was_given(seed, text, target):
    lab = tiny(seed)
    given_ = slow_log_p(lab, lab.tokenizer.encode(text + target))
    found = score(lab, questions(lab, [text, text + target], [target, ""]))
    losses = [-p for p in (*given_[: len(text)], *given_)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert np.isnan(found.target)  # one of the two texts has no target
    assert score(lab, questions(lab, text, target)).target == pytest.approx(sum(given_[len(text) :]), abs=1e-4)
    chunked = score(lab, questions(lab, text, target), chunks=2)
    assert chunked.target == pytest.approx(sum(given_[len(text) :]), abs=1e-4)


def test_the_noise_floor_leaves_the_model_alone():
    lab = tiny()
    lab.model.blocks[1].experts.dispatch = "every"
    floor = noise_floor(lab, questions(lab, "abcdefghij", "kl"))
    assert 0 <= floor.loss < 1e-4 and 0 <= floor.target < 1e-4
    assert [block.experts.dispatch for block in lab.model.blocks] == ["auto", "every", "auto"]
    dense = tiny(n_experts=None, n_choices=None)
    assert noise_floor(dense, questions(dense, "abcdefghij", "kl")).loss < 1e-4
    lab.model.to(torch.bfloat16)
    assert noise_floor(lab, questions(lab, "abcdefghij" * 4, "kl")).loss > floor.loss


def test_the_ablation_sweep_is_another_mixture():
    lab = tiny()
    texts, targets = ["abcdefgh", "hgfab"], ["ij", "c"]
    frame = ablation_sweep(lab, texts, targets, layers=[0, 2])
    assert len(frame) == 3 * 2 * 4
    asked = questions(lab, texts, targets)
    before = score(lab, asked)
    chosen = [lab.trace_ids(ids).experts for ids, _ in asked]
    for row in frame.itertuples():
        after = score(mixed(lab, row.layer, without(row.expert, row.how)), asked)
        assert row.loss == pytest.approx(after.loss, abs=1e-5)
        assert row.loss_change == pytest.approx(after.loss - before.loss, abs=1e-5)
        assert row.target == pytest.approx(after.target, abs=1e-5)
        assert row.target_change == pytest.approx(after.target - before.target, abs=1e-5)
        took = [row.expert in token for one in chosen for token in one[row.layer].tolist()]
        assert row.used == pytest.approx(sum(took) / len(took))
    assert (frame[frame.used > 0].loss_change.abs() > frame.loss_noise.max()).all()
    assert score(lab, asked) == before  # nothing stays


def test_zeroing_an_expert_is_zeroing_its_weights():
    lab = tiny()
    frame = ablation_sweep(lab, "abcdefgh", how="zero", layers=[1])
    assert frame.target.isna().all()
    for row in frame.itertuples():
        other = copy.copy(lab)
        other.model = copy.deepcopy(lab.model)
        other.model.blocks[1].experts.ffn[row.expert].down.weight.data.zero_()
        assert row.loss == pytest.approx(score(other, questions(lab, "abcdefgh")).loss, abs=1e-5)


def test_the_top_k_sweep_is_another_mixture():
    lab = tiny(n_layers=2)
    texts = {"one": ["abcdefgh"], "two": ["hhgg", "faces"]}
    frame = top_k_sweep(lab, texts)
    assert len(frame) == 2 * 4 and frame[frame.trained].k.unique().tolist() == [2]
    for row in frame.itertuples():
        other = copy.copy(lab)
        other.model = copy.deepcopy(lab.model)
        for block in other.model.blocks:
            block.router.n_choices = row.k
        asked = questions(lab, texts[row.domain])
        assert row.loss == pytest.approx(score(other, asked).loss, abs=1e-5)
        assert row.loss_change == pytest.approx(row.loss - score(lab, asked).loss, abs=1e-5)
    assert frame[frame.trained].loss_change.abs().max() < 1e-6
    assert top_k_sweep(lab, texts, ks=[3]).k.tolist() == [3, 3]


def test_rerouting_is_another_mixture():
    lab = tiny()
    ids, layer, position = lab.tokenizer.encode("abcdefgh"), 1, 3
    before = lab.trace_ids(ids)
    found = reroute_sweep(lab, "abcdefgh", layer, position)
    assert set(found.own) == set(before.experts[layer, position].tolist())
    sets = [frozenset(experts) for experts in found.effects.experts]
    assert len(set(sets)) == len(sets) == 5 and frozenset(found.own) not in sets
    log_p = slow_log_p(lab, ids)
    for row, experts in enumerate(sets):

        def send(logits, chosen, weights, experts=experts):
            chosen = chosen.clone()
            chosen[0, position] = torch.tensor(sorted(experts))
            return chosen, logits.gather(-1, chosen).softmax(-1)

        other = mixed(lab, layer, send)
        with torch.inference_mode():
            after = F.log_softmax(other.model(torch.tensor([ids]))[0, :-1].double(), -1)
        after = after.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        effect = found.effects.iloc[row]
        assert effect.next == pytest.approx(after[position], abs=1e-4)
        assert effect.next_change == pytest.approx(after[position] - log_p[position], abs=1e-4)
        later = [log_p[t] - after[t] for t in range(position, len(ids) - 1)]
        assert effect.loss_change == pytest.approx(sum(later) / len(later), abs=1e-4)
        logits = before.routing.logits[layer, position]
        assert list(effect.experts) == sorted(experts, key=lambda e: -logits[e])
        choices = other.trace_ids(ids).experts
        assert np.isnan(found.moved[row, : layer + 1]).all()
        new = [set(choices[2, t].tolist()) - set(before.experts[2, t].tolist()) for t in range(position, len(ids))]
        assert found.moved[row, 2] == pytest.approx(sum(map(len, new)) / (2 * len(new)))


def test_rerouting_to_named_sets_only():
    lab = tiny()
    own = reroute_sweep(lab, "abcdef", 0, 2, sets=[]).own
    again = reroute_sweep(lab, "abcdef", 0, 2, sets=[own])
    assert abs(again.effects.next_change[0]) < 1e-5 and not again.moved[0, 1:].any()


def test_patching_is_a_plain_hook():
    lab = tiny()
    clean, corrupt = lab.tokenizer.encode("abcde"), lab.tokenizer.encode("abxde")
    found = patch_sweep(lab, "abcde", "abxde", "f", "g", site="attention.output")
    right, wrong = 8, 9
    trace = lab.trace_ids(clean, sites=["layers.*.attention.output"])

    def difference(ids):
        logits = lab.logits(torch.tensor([ids]))[0, -1]
        return (logits[right] - logits[wrong]).item()

    good, bad = difference(clean), difference(corrupt)
    assert (found.clean, found.corrupt) == pytest.approx((good, bad), abs=1e-5)
    assert found.tokens == (("<s>", *"abcde"), ("<s>", *"abxde"))
    for layer in range(3):
        for position in range(6):

            def put(_module, _args, value, layer=layer, position=position):
                value = value.clone()
                value[0, position] = trace[f"layers.{layer}.attention.output"][position]
                return value

            hook = lab.model.get_submodule(f"layers.{layer}.attention.output").register_forward_hook(put)
            patched = difference(corrupt)
            hook.remove()
            assert found.recovered[layer, position] == pytest.approx((patched - bad) / (good - bad), abs=1e-3)


def test_what_patching_must_give():
    """Before the texts part, nothing comes back; after the last layer, all of it, from the last position alone."""
    found = patch_sweep(tiny(), "abcde", "abxde", "f", "g")
    np.testing.assert_allclose(found.recovered[:, :3], 0, atol=1e-3)
    np.testing.assert_allclose(found.recovered[-1], [0, 0, 0, 0, 0, 1], atol=1e-3)
    assert found.recovered[0, 3] != pytest.approx(0, abs=1e-2)


def test_what_cannot_be_swept(monkeypatch):
    lab, dense = tiny(), tiny(n_experts=None, n_choices=None)
    for sweep in (lambda: ablation_sweep(dense, "ab"), lambda: top_k_sweep(dense, {"a": ["ab"]})):
        with pytest.raises(AnalysisError, match="dense"):
            sweep()
    with pytest.raises(AnalysisError, match="no layer 3"):
        reroute_sweep(lab, "abc", 3, 1)
    with pytest.raises(AnalysisError, match="no token after it"):
        reroute_sweep(lab, "abc", 0, 3)
    monkeypatch.setattr(analysis, "MOST_SETS", 5)
    with pytest.raises(AnalysisError, match="6 sets of 2 of 4"):
        reroute_sweep(lab, "abc", 0, 1)
    with pytest.raises(AnalysisError, match="have 4 and 3"):
        patch_sweep(lab, "abc", "ab", "d", "e")
    for target, against in (("", "b"), ("b", "")):
        with pytest.raises(AnalysisError, match="is empty"):
            patch_sweep(lab, "a", "c", target, against)
    with pytest.raises(AnalysisError, match="nothing to recover"):
        patch_sweep(lab, "abc", "abc", "d", "e")


def test_the_ablation_map_shows_the_changes():
    frame = ablation_sweep(tiny(n_layers=2), "abcdefgh", "ij", how=["zero", "next_best"])
    for of in ("loss", "target"):
        fig = figures.ablation_map(frame, of, "tiny", "float32")
        assert len(fig.data) == 2 and "tiny, float32" in fig.layout.title.text
        for heat, how in zip(fig.data, ("zero", "next_best"), strict=True):
            for row in frame[frame.how == how].itertuples():
                drawn = np.array(heat.z)[1 - row.layer, row.expert]
                assert drawn == pytest.approx(getattr(row, f"{of}_change"))
                words = heat.text[1 - row.layer][row.expert]
                assert (words == "") == (abs(drawn) <= getattr(row, f"{of}_noise"))
    with pytest.raises(FigureError, match="lacks targets"):
        figures.ablation_map(frame.assign(target_change=np.nan), "target")
    with pytest.raises(FigureError, match="lacks used"):
        figures.ablation_map(frame.drop(columns="used"))


def test_the_top_k_figure_shows_every_domain():
    frame = top_k_sweep(tiny(n_layers=1), {"one": ["abcdefgh"], "two": ["hgfedcba"]})
    fig = figures.top_k_losses(frame, "tiny", "float32")
    lines = {line.name: line for line in fig.data}
    for domain, part in frame.groupby("domain"):
        np.testing.assert_allclose(lines[domain].y, part.loss_change)
        np.testing.assert_allclose(lines[domain].customdata, part.loss)
    np.testing.assert_allclose(lines["mean"].y, frame.groupby("k").loss_change.mean())
    assert {note.text for note in fig.layout.annotations} == {"as trained", "one", "two"}
    with pytest.raises(FigureError, match="lacks loss"):
        figures.top_k_losses(frame.drop(columns="loss"))


def test_the_rerouting_figure_shows_every_set():
    found = reroute_sweep(tiny(), "abcdefgh", 0, 3)
    fig = figures.rerouting(*found, token="c", after="d", layer=0, model="tiny", dtype="float32")
    bars, heat = fig.data[:2]
    order = found.effects.next_change.argsort(kind="stable").to_numpy()
    np.testing.assert_allclose(bars.x, found.effects.next_change.to_numpy()[order])
    np.testing.assert_allclose(np.array(heat.z), found.moved[order][:, 1:])
    assert [row[0] for row in bars.customdata] == [", ".join(map(str, found.effects.experts[n])) for n in order]
    last = reroute_sweep(tiny(), "abcdefgh", 2, 3)
    assert {trace.type for trace in figures.rerouting(*last).data} == {"bar"}  # no layer comes after
    with pytest.raises(FigureError, match="the same sets"):
        figures.rerouting(found.effects[:2], found.moved, found.own)


def test_the_patching_map_shows_what_came_back():
    found = patch_sweep(tiny(), "abcde", "abxde", "f", "g")
    fig = figures.patching_map(found.recovered, *found.tokens, "f", "g", "tiny", "float32")
    (heat,) = fig.data
    np.testing.assert_allclose(np.array(heat.z), found.recovered[::-1])
    assert list(heat.x) == ["0 &lt;s&gt;", "1 a", "2 b", "3 c → x", "4 d", "5 e"]
    with pytest.raises(FigureError, match="6 positions"):
        figures.patching_map(found.recovered, found.tokens[0][1:], found.tokens[1], "f", "g")


def test_replaying_its_own_routing_changes_nothing_and_another_something():
    lab = mixtral_lab.load("mini-mixtral")
    trace = lab.trace("Once upon a time there was a little robot.")
    same = replay_effect(lab, trace)
    assert len(same) == len(trace) - 1
    assert same["change"].abs().max() < 1e-4
    assert not same[["layers_changed", "first_changed"]].any(axis=None)
    shifted = Trace.from_arrays(trace.tokens, (trace.experts + 1) % 8, ids=trace.ids.tolist())
    other = replay_effect(lab, shifted)
    assert other["change"].abs().max() > 0.1
    assert (other["log_p"] == same["log_p"]).all()
    for position in range(
        1, len(trace)
    ):  # in the first layer nothing was changed before: its own choice is the trace's
        assert other["layers_changed"][position - 1] >= (
            set(shifted.experts[0, position].tolist()) != set(trace.experts[0, position].tolist())
        )
    with pytest.raises(AnalysisError, match="not this model's"):
        replay_effect(lab, Trace.from_arrays(trace.tokens, trace.experts))
