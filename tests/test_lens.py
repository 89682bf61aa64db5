"""The stream read as words, and its parts: they must sum to it, and their shares to the logits that the model gave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab.analysis import AnalysisError
from mixtral_lab.analysis.lens import (
    LENS_SITES,
    TOP1_SITES,
    Attribution,
    attribution,
    attribution_sites,
    expert_lens,
    logit_lens,
    residual_parts,
    top1_similarity,
)
from mixtral_lab.config import Config
from mixtral_lab.figures import FigureError
from mixtral_lab.figures import lens as figures
from mixtral_lab.lab import Lab, load
from mixtral_lab.model import Transformer
from mixtral_lab.trace import Trace, TraceError


class Words:
    vocab, stop_ids = 30, ()

    def pieces(self, ids):
        return [f"w{int(i)}" for i in ids]


def tiny(seed: int = 0, **changes) -> Lab:
    torch.manual_seed(seed)
    shape = dict(dim=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, hidden=8, vocab=30, context=64)
    model = Transformer(Config(**{**shape, "n_experts": 4, "n_choices": 2, **changes})).eval()
    for block in model.blocks:
        block.ffn_norm.weight.data.uniform_(0.5, 2)
    model.final_norm.weight.data.uniform_(0.5, 2)
    lab = Lab.__new__(Lab)
    lab.model, lab.tokenizer, lab.name = model, Words(), "tiny"
    return lab


def everything(lab: Lab, seq: int = 7, positions=None) -> Trace:
    ids = torch.randint(30, (seq,)).tolist()
    sites = {*LENS_SITES, *TOP1_SITES, *attribution_sites(lab.config), "logits"}
    if lab.config.n_experts is None:
        sites -= set(TOP1_SITES)
    return lab.trace_ids(ids, sites=sorted(sites), positions=positions)


@st.composite
def shapes(draw) -> dict:
    kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    experts = draw(st.sampled_from([None, 1, 2, 5]))
    return dict(
        seed=draw(st.integers(0, 999)),
        n_layers=draw(st.integers(1, 3)),
        n_kv_heads=kv,
        n_heads=kv * group,
        n_experts=experts,
        n_choices=experts and draw(st.integers(1, experts)),
        tied=draw(st.booleans()),
    )


def by_hand(lab: Lab, vector: torch.Tensor, size: float) -> torch.Tensor:
    """Logits of one vector of the stream, number by number, where the norm divides by `size`."""
    weight = lab.model.embed.weight if lab.model.unembed is None else lab.model.unembed.weight
    gains = lab.model.final_norm.weight
    scaled = torch.tensor([v / size * g for v, g in zip(vector.tolist(), gains.tolist(), strict=True)])
    return torch.tensor([float((row * scaled).sum()) for row in weight.detach()])


def size_of(lab: Lab, vector: torch.Tensor) -> float:
    return math.sqrt(sum(v * v for v in vector.tolist()) / len(vector) + lab.config.norm_eps)


@given(shapes(), st.integers(1, 6))
def test_the_lens_is_norm_and_unembedding(shape, seq):
    lab = tiny(**shape)
    trace = everything(lab, seq)
    lens = logit_lens(lab.model, trace, top=3)
    streams = [trace["embed"], *trace["layers.*.residual.after"]]
    assert lens.ids.shape == (lab.config.n_layers + 1, seq, 3)
    for depth, stream in enumerate(streams):
        for position in range(seq):
            p = by_hand(lab, stream[position], size_of(lab, stream[position])).softmax(-1)
            np.testing.assert_allclose(p[lens.ids[depth, position]], lens.probabilities[depth, position], atol=1e-5)
            assert lens.probabilities[depth, position, 0] == pytest.approx(p.max().item(), abs=1e-5)
            entropy = -sum(q * math.log2(q) for q in p.tolist() if q > 0)
            assert lens.entropy[depth, position] == pytest.approx(entropy, abs=1e-3)
            if position + 1 < seq:
                assert lens.following[depth, position] == pytest.approx(p[trace.ids[position + 1]].item(), abs=1e-5)
    assert np.isnan(lens.following[:, -1]).all()


def test_the_last_depth_is_the_model():
    lab = tiny()
    trace = everything(lab)
    lens = logit_lens(lab.model, trace, top=30)
    p = trace["logits"].softmax(-1)
    np.testing.assert_allclose(lens.probabilities[-1], p.sort(-1, descending=True).values.numpy(), atol=1e-6)


@given(shapes(), st.integers(1, 6))
def test_the_parts_sum_to_the_stream(shape, seq):
    lab = tiny(**shape)
    trace = everything(lab, seq)
    last = trace[f"layers.{lab.config.n_layers - 1}.residual.after"]
    for row in range(seq):
        labels, parts = residual_parts(lab.model, trace, row)
        assert len(labels) == len(parts)
        assert labels.part.value_counts()["head"] == lab.config.n_layers * lab.config.n_heads
        np.testing.assert_allclose(parts.sum(0), last[row].numpy(), atol=1e-4)


@given(shapes(), st.integers(1, 6), st.booleans())
def test_the_shares_are_the_parts_unembedded(shape, seq, against_one):
    lab = tiny(**shape)
    trace = everything(lab, seq)
    against = 7 if against_one else None
    found = attribution(lab.model, trace, against=against)
    last = trace[f"layers.{lab.config.n_layers - 1}.residual.after"]
    logits = trace["logits"]
    for row in range(seq):
        target = int(trace.ids[row + 1]) if row + 1 < seq else int(logits[row].argmax())
        assert found.targets[row] == target

        def score(all_logits, target=target):
            other = all_logits.mean() if against is None else all_logits[against]
            return (all_logits[target] - other).item()

        labels, parts = residual_parts(lab.model, trace, row)
        frame = found.frame(row)
        assert frame.part.tolist() == [*labels.part, "rounding"]
        for column in ("layer", "head", "expert", "choice"):
            assert frame[column][:-1].equals(labels[column])
        size = size_of(lab, last[row])
        slow = [score(by_hand(lab, torch.tensor(part), size)) for part in parts]
        np.testing.assert_allclose(frame.logit[:-1], slow, atol=1e-4)
        assert abs(found.rounding[row]) < 1e-4
        assert frame.logit.sum() == pytest.approx(score(logits[row]), abs=1e-4)
        assert found.total[row] == pytest.approx(score(logits[row]), abs=1e-4)


def test_attribution_by_hand():
    """Two numbers wide, one layer that writes nothing: the embedding says it all."""
    lab = tiny(dim=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, vocab=30)
    model = lab.model
    for name, weight in model.named_parameters():
        if name.endswith(("output.weight", "down.weight")):
            weight.data.zero_()
    model.final_norm.weight.data.fill_(1)
    model.embed.weight.data[5] = torch.tensor([3.0, 4.0])  # of size sqrt(25 / 2)
    model.unembed.weight.data.zero_()
    model.unembed.weight.data[9] = torch.tensor([1.0, 0.0])
    trace = lab.trace_ids([5], sites=list(attribution_sites(lab.config)))
    against_zero = attribution(model, trace, targets=9, against=0)
    assert against_zero.embed.tolist() == pytest.approx([3 / math.sqrt(12.5)], abs=1e-4)
    assert not against_zero.heads.any() and not against_zero.experts.any()
    against_mean = attribution(model, trace, targets=[9])
    assert against_mean.total.tolist() == pytest.approx([3 / math.sqrt(12.5) * 29 / 30], abs=1e-4)


def test_some_positions_only():
    lab = tiny()
    torch.manual_seed(3)
    whole = everything(lab)
    torch.manual_seed(3)
    torch.randint(30, (1,))
    part = lab.trace_ids(whole.ids.tolist(), sites=list(whole.recorded), positions=[2, 6])
    ours, theirs = attribution(lab.model, part), attribution(lab.model, whole)
    np.testing.assert_allclose(ours.experts, theirs.experts[:, [2, 6]], atol=1e-6)
    assert ours.targets.tolist() == theirs.targets[[2, 6]].tolist()
    np.testing.assert_allclose(
        logit_lens(lab.model, part).following, logit_lens(lab.model, whole).following[:, [2, 6]], atol=1e-6
    )


def test_an_expert_by_itself():
    lab = tiny()
    trace = everything(lab)
    lens = expert_lens(lab.model, trace, top=4)
    shares = attribution(lab.model, trace, targets=lens.ids[1, :, 0, 2].tolist())
    np.testing.assert_allclose(lens.logits[1, :, 0, 2], shares.experts[1, :, 0], atol=1e-4)
    written, last = trace["layers.2.experts.weighted"][3, 1], trace["layers.2.residual.after"][3]
    logits = by_hand(lab, written, size_of(lab, last))
    order = logits.argsort(descending=True)[:4]
    assert lens.ids[2, 3, 1].tolist() == order.tolist()
    np.testing.assert_allclose(lens.logits[2, 3, 1], (logits[order] - logits.mean()).numpy(), atol=1e-4)


def test_the_first_choice_alone_by_hand():
    between = torch.tensor([[[1.0, 0.0]]])
    weighted = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]])
    found = top1_similarity(between, weighted)
    # the stream: (1, 1) against (3, 1); the answer: (0, 1) against (2, 1)
    assert found.stream.item() == pytest.approx(4 / math.sqrt(2 * 10), abs=1e-6)
    assert found.answer.item() == pytest.approx(1 / math.sqrt(5), abs=1e-6)
    trace = everything(tiny())
    found = top1_similarity(trace["layers.*.residual.between"], trace["layers.*.experts.weighted"])
    whole = torch.nn.functional.cosine_similarity(
        trace["layers.*.residual.between"] + trace["layers.*.experts.weighted"][:, :, 0],
        trace["layers.*.residual.after"],
        dim=-1,
    )
    np.testing.assert_allclose(found.stream, whole.numpy(), atol=1e-5)


def test_bfloat16_says_what_rounding_did():
    lab = tiny()
    lab.model.to(torch.bfloat16)
    trace = everything(lab)
    found = attribution(lab.model, trace)
    assert 1e-5 < np.abs(found.rounding).max() < 0.2
    exact = trace["logits"].float()
    score = exact.gather(-1, torch.tensor(found.targets)[:, None])[:, 0] - exact.mean(-1)
    np.testing.assert_allclose(found.total, score.numpy(), atol=0.1)


def test_what_the_trace_lacks():
    lab = tiny()
    with pytest.raises(TraceError, match="embed"):
        logit_lens(lab.model, lab.trace_ids([1, 2]))
    with pytest.raises(TraceError, match=r"no .layers.2.residual.after"):
        attribution(lab.model, lab.trace_ids([1, 2], sites=["embed"]))
    trace = everything(lab)
    with pytest.raises(AnalysisError, match="give the model that made the trace"):
        attribution(tiny(dim=24).model, trace)
    with pytest.raises(AnalysisError, match="below 30"):
        attribution(lab.model, trace, targets=30)
    with pytest.raises(AnalysisError, match="7 recorded positions"):
        attribution(lab.model, trace, targets=[1, 2])
    with pytest.raises(AnalysisError, match="top is 31"):
        logit_lens(lab.model, trace, top=31)


def words(ids) -> np.ndarray:
    return np.array([f"w{i}" for i in ids.ravel()]).reshape(ids.shape)


def test_the_lens_figure_shows_the_lens():
    lab = tiny()
    trace = everything(lab)
    lens = logit_lens(lab.model, trace)
    fig = figures.logit_lens(words(lens.ids), lens.probabilities, trace.tokens, [1, 4], "tiny", "float32")
    (heat,) = fig.data
    np.testing.assert_allclose(np.array(heat.z), lens.probabilities[:, [1, 4], 0])
    assert heat.text[3][1] == f"w{lens.ids[3, 4, 0]}" and heat.y[0] == "embedding"
    assert f"w{lens.ids[2, 1, 4]}" in heat.customdata[2][0]
    with pytest.raises(FigureError, match="no position 7"):
        figures.logit_lens(words(lens.ids), lens.probabilities, trace.tokens, [7])
    with pytest.raises(FigureError, match="6 tokens"):
        figures.logit_lens(words(lens.ids), lens.probabilities, trace.tokens[:6])


@pytest.mark.parametrize("changes", [{}, {"n_experts": None, "n_choices": None}])
def test_the_attribution_figure_shows_every_part(changes):
    lab = tiny(**changes)
    found: Attribution = attribution(lab.model, everything(lab))
    frame = found.frame()
    fig = figures.attribution(frame, "w3", "w1 w2", model="tiny", dtype="float32")
    bars = [trace for trace in fig.data if trace.type == "bar"]
    drawn = sum(sum(trace.x) for trace in bars)
    assert drawn == pytest.approx(frame.logit.sum() - found.rounding[-1], abs=1e-5)
    assert f"{frame.logit.sum():+.2f}" in fig.layout.title.subtitle.text
    experts = frame[frame.part == "expert"]
    for expert, part in experts.groupby("expert"):
        ours = [trace for trace in bars if trace.name.startswith(f"expert {expert} ")]
        assert sorted(x for trace in ours for x in trace.x) == pytest.approx(sorted(part.logit))
        assert {trace.marker.color for trace in ours} == {figures.expert_colour(int(expert))}
    with pytest.raises(FigureError, match="lacks parts"):
        figures.attribution(frame.drop(columns="logit"), "w3")


def test_the_expert_words_figure_shows_words_and_colours():
    lab = tiny()
    trace = everything(lab)
    lens = expert_lens(lab.model, trace, top=2)
    chosen = trace.experts[:, -1].numpy()
    fig = figures.expert_words(words(lens.ids[:, -1]), lens.logits[:, -1], chosen, "w1", "tiny", "float32")
    bars = [bar for bar in fig.data if bar.type == "bar"]
    assert len(bars) == 2
    for choice, bar in enumerate(bars):
        for layer in range(3):
            assert bar.text[layer] == f"{chosen[layer, choice]}: " + "  ".join(
                f"w{i}" for i in lens.ids[layer, -1, choice]
            )


def test_the_top1_figure_shows_quartiles():
    stream, answer = np.linspace(0.9, 1, 20).reshape(2, 10), np.linspace(-0.5, 1, 20).reshape(2, 10)
    fig = figures.top1_similarity(stream, answer, "tiny", "float32")
    lines = [trace for trace in fig.data if trace.fill is None]
    np.testing.assert_allclose(lines[0].y, np.median(stream, axis=1))
    np.testing.assert_allclose(lines[1].y, np.median(answer, axis=1))
    assert fig.layout.yaxis.range[0] == -0.5
    with pytest.raises(FigureError, match="no token"):
        figures.top1_similarity(stream[:, :0], answer[:, :0])


def test_the_trained_model_adds_up():
    lab = load("mini-mixtral", dtype="float32", device="cpu")
    trace = lab.trace("Once upon a time, there was a little", sites=[*attribution_sites(lab.config), "logits"])
    _, parts = residual_parts(lab.model, trace)
    np.testing.assert_allclose(parts.sum(0), trace["layers.7.residual.after"][-1].numpy(), atol=1e-4)
    found = attribution(lab.model, trace)
    logits = trace["logits"]
    score = logits.gather(-1, torch.tensor(found.targets)[:, None])[:, 0] - logits.mean(-1)
    np.testing.assert_allclose(found.total, score.numpy(), atol=1e-4)
    assert np.abs(found.rounding).max() < 1e-4
