"""Experts by their weights and by the size of their answers: who is alike, who is loud, and is one of them a giant?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from mixtral_lab.analysis.routing import AnalysisError
from mixtral_lab.model import Transformer

if TYPE_CHECKING:
    import pandas as pd

ROLES = ("gate", "up", "down")
ROWS_AT_ONCE = 256  # of every expert's matrix: bounds the memory that a comparison in float32 takes

MASSIVE, TIMES_THE_MEDIAN = 100.0, 1000.0  # arXiv 2402.17762, section 2
PERCENTILE, SHARE_OF_LARGEST = 99.5, 0.1  # arXiv 2507.23279, equation 6


def cosines(matrices: Sequence[Float[Tensor, "rows columns"]]) -> Float[np.ndarray, "expert expert"]:
    """The cosine of the angle between each two matrices, read as long vectors: 1 if alike up to size, 0 if unrelated.

    [[1, 0]] and [[3, 4]] give 0.6. Independent random matrices of n numbers give 0 plus or minus 1 / sqrt(n).
    """
    products = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
    for start in range(0, len(matrices[0]), ROWS_AT_ONCE):
        part = torch.stack([matrix[start : start + ROWS_AT_ONCE].detach().float().flatten() for matrix in matrices])
        products += (part @ part.T).double().cpu()
    length = products.diagonal().sqrt()
    return (products / (length[:, None] * length)).numpy()


def expert_similarity(model: Transformer) -> Float[np.ndarray, "role layer expert expert"]:
    """How alike the experts of each layer are in their weights: `cosines` of each of `ROLES` (gate, up, down).

    Neurons are compared in the order in which they stand: experts that differ by a permutation of their hidden
    neurons alone compute the same and still come out as unlike. Source: A Closer Look into Mixture-of-Experts in
    Large Language Models (arXiv 2406.18219, section on weight matrices). Raises `AnalysisError` for a dense model.
    """
    _check_sparse(model)
    found = [
        [cosines([getattr(expert, role).weight for expert in block.experts.swiglus]) for block in model.blocks]
        for role in ROLES
    ]
    return np.array(found)


@torch.inference_mode()
def expert_norms(model: Transformer, streams: Float[Tensor, "layer seq dim"]) -> Float[np.ndarray, "layer seq expert"]:
    """The length of every expert's answer to every token, also of those that it did not choose.

    `streams` is what a trace recorded at `layers.*.residual.between`; the model runs on as it did. Source: arXiv
    2406.18219 (section on the norms of expert outputs). Raises `AnalysisError` for a dense model or the stream of
    another one.
    """
    _check_sparse(model)
    if (len(streams), streams.shape[-1]) != (model.config.n_layers, model.config.dim):
        raise AnalysisError(
            f"The stream has {len(streams)} layers of {streams.shape[-1]} numbers, the model {model.config.n_layers} "
            f"of {model.config.dim}."
        )
    found = []
    for block, stream in zip(model.blocks, streams, strict=True):
        x = block.ffn_norm(stream[None].to(block.ffn_norm.weight))[0]
        found.append(torch.stack([expert(x).float().norm(dim=-1) for expert in block.experts.swiglus], dim=-1).cpu())
    return torch.stack(found).numpy()


class NormAndScore(NamedTuple):
    """Rank correlation (Spearman's) of the length of an expert's answer and the router's score for it, per layer.

    `within` ranks the experts of one token against each other and averages over tokens; `pooled` ranks all (token,
    expert) pairs of a layer in one list, so that loud tokens count too. 1: the louder, the higher its score;
    0: unrelated; `nan`: undefined, as `within` is for a single expert.
    """

    within: Float[np.ndarray, " layer"]
    pooled: Float[np.ndarray, " layer"]


def norm_and_score(
    norms: Float[np.ndarray, "layer seq choice"], scores: Float[np.ndarray, "layer seq choice"]
) -> NormAndScore:
    """Whether routers favour experts with large answers. Source: arXiv 2406.18219 (norms of expert outputs).

    Give the chosen experts (norms of `layers.*.experts.out`, scores from `layers.*.router.weights`), or all of them
    (`expert_norms` and `layers.*.router.logits`), as the paper does. With two experts per token, `within` is the
    share of tokens whose louder one scores higher, less the share of the others. Ties share their mean rank; tokens
    whose norms or scores are all equal are left out of `within`.
    """
    within, pooled = [], []
    for norm, score in zip(norms, scores, strict=True):
        pooled.append(float(_spearman(norm.reshape(1, -1), score.reshape(1, -1))[0]))
        each = _spearman(norm, score)
        defined = np.isfinite(each)
        within.append(float(each[defined].mean()) if defined.any() else np.nan)
    return NormAndScore(np.array(within), np.array(pooled))


def output_peaks(
    experts: Integer[Tensor, "layer seq choice"], out: Float[Tensor, "layer seq choice dim"], n_experts: int
) -> Float[np.ndarray, "layer expert"]:
    """The largest magnitude that any number of each expert's answers took: `nan` for an expert that nobody chose.

    `out` is what a trace recorded at `layers.*.experts.out`. Peaks of several texts combine by `np.fmax`. Source:
    Unveiling Super Experts in Mixture-of-Experts Large Language Models (arXiv 2507.23279, section 3.2).
    """
    largest = out.float().abs().amax(-1).flatten(1)
    peaks = torch.full((len(out), n_experts), -torch.inf)
    peaks.scatter_reduce_(1, experts.flatten(1).long(), largest, "amax")
    return torch.where(peaks < 0, torch.nan, peaks).numpy()


def massive_layers(
    before: Float[Tensor, "layer seq dim"], after: Float[Tensor, "layer seq dim"]
) -> Bool[np.ndarray, " layer"]:
    """Which layers write a massive activation into the residual stream.

    `before` and `after` are what a trace recorded at `layers.*.residual.before` and `.after`. A number of the stream
    is massive if its magnitude is above 100 and above 1,000 times the median magnitude of the layer's stream (Massive
    Activations in Large Language Models, arXiv 2402.17762, section 2). A layer forms one if a number is massive after
    it, larger than before it, and the difference is massive itself: this last condition is ours, and leaves out
    layers through which a massive activation only passes, or which take one away again.
    """
    found = []
    for old, new in zip(before.float(), after.float(), strict=True):
        bar = max(MASSIVE, TIMES_THE_MEDIAN * float(new.abs().median()))
        found.append(bool(((new.abs() > bar) & ((new - old).abs() > bar) & (new.abs() > old.abs())).any()))
    return np.array(found)


def super_experts(
    peaks: Float[np.ndarray, "layer expert"], massive: Bool[np.ndarray, " layer"] | None = None
) -> pd.DataFrame:
    """The experts whose answers have outliers that stand far above all others', if there are any.

    An expert is one if its peak (`output_peaks`) is above the 99.5th percentile of all experts' peaks and above a
    tenth of the largest one, and it stands in a layer that writes massive activations (`massive_layers`; None: any
    layer, which leaves out a condition of the source). Columns: layer, expert, peak, times_median (of all peaks);
    the largest first. Source: Unveiling Super Experts in Mixture-of-Experts Large Language Models (arXiv 2507.23279,
    equation 6). Without `massive` the largest peak always qualifies, in any model: where nothing is massive, pass
    that on and get an empty table. Raises `AnalysisError` if no expert was ever chosen.
    """
    import pandas as pd

    known = np.isfinite(peaks)
    if not known.any():
        raise AnalysisError("No expert was chosen by any token, so none has a peak: trace a text first.")
    bar = max(np.percentile(peaks[known], PERCENTILE), SHARE_OF_LARGEST * float(peaks[known].max()))
    eligible = np.ones(len(peaks), dtype=bool) if massive is None else massive
    layer, expert = np.nonzero(known & (np.nan_to_num(peaks) > bar) & eligible[:, None])
    found = pd.DataFrame({"layer": layer, "expert": expert, "peak": peaks[layer, expert]})
    found["times_median"] = found.peak / np.median(peaks[known])
    return found.sort_values("peak", ascending=False, ignore_index=True)


def _spearman(x: Float[np.ndarray, "row value"], y: Float[np.ndarray, "row value"]) -> Float[np.ndarray, " row"]:
    """Pearson's correlation of ranks, row by row; `nan` where one of the two does not vary."""
    import pandas as pd

    ranks = [pd.DataFrame(values).rank(axis=1).to_numpy() for values in (x, y)]
    a, b = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    spread = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), spread, out=np.full(len(x), np.nan), where=spread > 0)


def _check_sparse(model: Transformer) -> None:
    if model.config.n_experts is None:
        raise AnalysisError("A dense model has a single feed-forward per layer: there are no experts to compare.")
