"""Likeness, loudness and giants among experts: by hand, against slow versions, and planted in a random model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_lab.analysis import AnalysisError
from mixtral_lab.analysis import weights as analysis
from mixtral_lab.analysis.weights import (
    cosines,
    expert_norms,
    expert_similarity,
    massive_layers,
    norm_and_score,
    output_peaks,
    super_experts,
)
from mixtral_lab.config import Config
from mixtral_lab.figures import FigureError
from mixtral_lab.figures import weights as figures
from mixtral_lab.model import Transformer
from mixtral_lab.sites import recording


def tiny(**changes) -> Transformer:
    shape = dict(dim=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, hidden=8, vocab=30, context=64)
    return Transformer(Config(**{**shape, "n_experts": 4, "n_choices": 2, **changes})).eval()


def run(model: Transformer, sites: list[str], seq: int = 12) -> dict[str, torch.Tensor]:
    """What one text of random tokens leaves at the sites, stacked over layers."""
    with recording(model, [f"layers.*.{site}" for site in sites]) as recorder, torch.inference_mode():
        model(torch.randint(model.config.vocab, (1, seq)))
    values = recorder.values()
    return {s: torch.stack([values[f"layers.{n}.{s}"] for n in range(model.config.n_layers)]) for s in sites}


def test_cosines_by_hand():
    matrices = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[-2.0, 0.0]])]
    np.testing.assert_allclose(cosines(matrices), [[1, 0.6, -1], [0.6, 1, -0.6], [-1, -0.6, 1]], atol=1e-7)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 5), st.integers(1, 8))
def test_cosines_in_parts_are_cosines(experts, rows, columns, at_once):
    matrices = [torch.randn(rows, columns) for _ in range(experts)]
    before, analysis.ROWS_AT_ONCE = analysis.ROWS_AT_ONCE, at_once
    try:
        found = cosines(matrices)
    finally:
        analysis.ROWS_AT_ONCE = before
    for i, one in enumerate(matrices):
        for j, other in enumerate(matrices):
            dot = sum(a * b for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
            assert found[i, j] == pytest.approx(dot / (one.norm() * other.norm()).item(), abs=1e-5)


def test_a_copied_expert_is_alike():
    model = tiny()
    model.blocks[1].experts.ffn[2].load_state_dict(model.blocks[1].experts.ffn[0].state_dict())
    model.blocks[1].experts.ffn[2].up.weight.data *= 3
    found = expert_similarity(model)
    assert found.shape == (3, 3, 4, 4)
    np.testing.assert_allclose(found[:, 1, 0, 2], 1, atol=1e-6)
    unlike = np.abs(found[:, 0][:, ~np.eye(4, dtype=bool)])
    assert unlike.max() < 6 / math.sqrt(16 * 8)
    with pytest.raises(AnalysisError, match="dense"):
        expert_similarity(tiny(n_experts=None, n_choices=None))


def test_norms_of_the_chosen_are_those_recorded():
    model = tiny()
    seen = run(model, ["residual.between", "router.experts", "experts.out"])
    norms = expert_norms(model, seen["residual.between"])
    assert norms.shape == (3, 12, 4)
    chosen = np.take_along_axis(norms, seen["router.experts"].numpy(), -1)
    np.testing.assert_allclose(chosen, seen["experts.out"].norm(dim=-1).numpy(), rtol=1e-4)
    with pytest.raises(AnalysisError, match="The stream has 2 layers"):
        expert_norms(model, seen["residual.between"][:2])


def test_rank_correlation_by_hand():
    norms = np.array([[[1.0, 2.0, 3.0], [5.0, 9.0, 7.0]]])
    scores = np.array([[[0.1, 0.2, 0.7], [0.9, 0.2, 0.5]]])
    found = norm_and_score(norms, scores)
    # Token 0: ranks 1 2 3 and 1 2 3, so 1. Token 1: ranks 1 3 2 and 3 1 2, so -1.
    assert found.within.tolist() == pytest.approx([0])
    # All six: ranks of norms 1 2 3 4 6 5, of scores 1 2.5 5 6 2.5 4.
    norm_ranks, score_ranks = np.array([1, 2, 3, 4, 6, 5]), np.array([1, 2.5, 5, 6, 2.5, 4])
    assert found.pooled.tolist() == pytest.approx([np.corrcoef(norm_ranks, score_ranks)[0, 1]])


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
def test_rank_correlation_is_pearsons_of_slow_ranks(layers, seq, choices, seed):
    rng = np.random.default_rng(seed)
    norms, scores = rng.integers(0, 4, (2, layers, seq, choices)).astype(float)

    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    def spearman(x, y):
        a, b = np.array(ranks(x)), np.array(ranks(y))
        if a.std() == 0 or b.std() == 0:
            return None
        return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))

    found = norm_and_score(norms, scores)
    for layer in range(layers):
        each = [spearman(norms[layer, t].tolist(), scores[layer, t].tolist()) for t in range(seq)]
        each = [value for value in each if value is not None]
        assert found.within[layer] == pytest.approx(sum(each) / len(each) if each else np.nan, nan_ok=True)
        pooled = spearman(norms[layer].ravel().tolist(), scores[layer].ravel().tolist())
        assert found.pooled[layer] == pytest.approx(np.nan if pooled is None else pooled, nan_ok=True)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(0, 999))
def test_peaks_are_the_largest_numbers(layers, seq, choices, seed):
    torch.manual_seed(seed)
    experts = torch.rand(layers, seq, 4).topk(choices, dim=-1).indices
    out = torch.randn(layers, seq, choices, 5)
    peaks = output_peaks(experts, out, 4)
    for layer in range(layers):
        for expert in range(4):
            seen = [out[layer, t, c].abs().max().item() for t in range(seq) for c in range(choices)
                    if experts[layer, t, c] == expert]  # fmt: skip
            assert peaks[layer, expert] == pytest.approx(max(seen) if seen else np.nan, nan_ok=True)


def test_massive_layers_by_hand():
    quiet = torch.full((4, 3, 8), 0.1)
    before, after = quiet.clone(), quiet.clone()
    after[0, 1, 2] = -150  # layer 0 writes it
    before[1, 1, 2] = after[1, 1, 2] = -150  # passes through layer 1
    before[2, 1, 2], after[2, 1, 2] = -150, -400  # grows in layer 2
    before[3, 1, 2] = -400  # taken away in layer 3
    assert massive_layers(before, after).tolist() == [True, False, True, False]
    after[0, 1, 2] = -99  # not above 100
    assert not massive_layers(before, after)[0]
    louder = [torch.where(stream == 0.1, 0.5, stream) for stream in (before, after)]
    assert not massive_layers(*louder).any()  # 400 is less than 1,000 times the median


def test_super_experts_by_hand():
    peaks = np.full((50, 8), 1.0)
    peaks[3, 2], peaks[9, 1], peaks[20, 7] = 500.0, 40.0, 900.0
    found = super_experts(peaks)
    # The 99.5th percentile of these 400 peaks is 40 + 0.005 (500 - 40); 40 is also below 90, a tenth of the largest.
    assert found[["layer", "expert"]].values.tolist() == [[20, 7], [3, 2]]
    assert found.times_median.tolist() == [900, 500]
    massive = np.zeros(50, dtype=bool)
    assert super_experts(peaks, massive).empty
    massive[3] = True
    assert super_experts(peaks, massive)[["layer", "expert"]].values.tolist() == [[3, 2]]
    with pytest.raises(AnalysisError, match="No expert was chosen"):
        super_experts(np.full((2, 4), np.nan))


def test_a_planted_giant_is_found():
    sites = ["residual.before", "residual.after", "router.experts", "experts.out"]
    model = tiny(n_experts=8)

    def found():
        seen = run(model, sites, seq=50)
        massive = massive_layers(seen["residual.before"], seen["residual.after"])
        return massive, super_experts(output_peaks(seen["router.experts"], seen["experts.out"], 8), massive)

    massive, giants = found()
    assert not massive.any() and giants.empty
    model.blocks[1].experts.ffn[5].down.weight.data[3] *= 1e7
    massive, giants = found()
    assert massive.tolist() == [False, True, False]
    assert giants[["layer", "expert"]].values.tolist() == [[1, 5]]


def test_the_map_of_likeness_shows_the_cosines():
    similarity = expert_similarity(tiny())
    fig = figures.expert_similarity(similarity, layers=[0, 2], model="tiny", dtype="float32")
    panels = [np.array(trace.z) for trace in fig.data]
    assert len(panels) == 6 and "tiny, float32" in fig.layout.title.text
    off = ~np.eye(4, dtype=bool)
    for panel, (role, layer) in zip(panels, [(r, n) for r in range(3) for n in (0, 2)], strict=True):
        np.testing.assert_allclose(panel[off], similarity[role, layer][off])
        assert np.isnan(panel[~off]).all()
    with pytest.raises(FigureError, match="layer 9"):
        figures.expert_similarity(similarity, layers=[9])
    with pytest.raises(FigureError, match="between -1 and 1"):
        figures.expert_similarity(2 * similarity)
    with pytest.raises(FigureError, match="nothing to compare"):
        figures.expert_similarity(np.ones((3, 2, 1, 1)))


def test_the_line_of_correlations_shows_both():
    within, pooled = np.array([0.5, -0.25]), np.array([0.125, 1.0])
    fig = figures.norm_and_score(within, pooled, "tiny", "float32")
    assert [list(trace.y) for trace in fig.data] == [within.tolist(), pooled.tolist()]
    with pytest.raises(FigureError, match="One number per layer"):
        figures.norm_and_score(np.array([np.nan]), np.array([np.nan]))


def test_the_map_of_peaks_frames_the_giants():
    peaks = np.array([[1.0, 2.0], [np.nan, 300.0]])
    fig = figures.expert_peaks(peaks, [(1, 1)], "tiny", "float32")
    np.testing.assert_array_equal(np.array(fig.data[0].z), peaks[::-1])  # layer 0 at the bottom
    assert [(s.x0, s.x1, s.y0, s.y1) for s in fig.layout.shapes] == [(0.5, 1.5, -0.5, 0.5)]
    assert "None of them" in figures.expert_peaks(peaks).layout.title.subtitle.text
    with pytest.raises(FigureError, match="no expert 2 in layer 0"):
        figures.expert_peaks(peaks, [(0, 2)])
