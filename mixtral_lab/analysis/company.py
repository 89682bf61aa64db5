"""Which experts go together: in one token, from layer to layer, and between two states of one model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Integer

from mixtral_lab.analysis.routing import AnalysisError, Experts, as_shares, checked, choices, tally
from mixtral_lab.trace import Trace


def coactivation_counts(experts: Experts, n_experts: int) -> Int[np.ndarray, "layer expert other"]:
    """N(i, j): how many tokens chose both expert i and expert j; on the diagonal N(i), how many chose i.

    Raises `AnalysisError` if a token chose one expert twice.
    """
    experts = checked(experts, n_experts)
    ordered = np.sort(experts, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise AnalysisError("A token has chosen the same expert twice: its choices must differ.")
    pairs = experts[..., :, None] * n_experts + experts[..., None, :]
    return tally(pairs, n_experts**2).reshape(-1, n_experts, n_experts)


def coactivation(
    counts: Integer[np.ndarray, "layer expert other"],
) -> Float[np.ndarray, "layer expert other"]:
    """N(i, j) / N(i): of the tokens that chose expert i, the share that also chose j.

    Not symmetric. A row sums to k, its own 1 on the diagonal included, so blind choice gives (k - 1) / (E - 1) beside it.
    The row of an expert that no token chose is not-a-number. Source: OLMoE (arXiv 2409.02060, section 5).
    """
    alone = np.diagonal(counts, axis1=1, axis2=2)[:, :, None]
    return np.where(alone > 0, counts / np.maximum(alone, 1), np.nan)


def transition_counts(experts: Experts, n_experts: int, step: int = 1) -> Int[np.ndarray, "pair expert next"]:
    """How many tokens go from each expert of a layer to each expert of the layer `step` above: (0, 1), (1, 2), ...

    Every choice of the one layer is paired with every choice of the other, k² pairs a token; give
    `experts[:, :, :1]` to count first choices alone. Raises `AnalysisError` if there are not so many layers.
    """
    if not 1 <= step < len(experts):
        raise AnalysisError(f"There is no layer {step} above another: the model has {len(experts)} layers.")
    experts = checked(experts, n_experts)
    pairs = experts[:-step, :, :, None] * n_experts + experts[step:, :, None, :]
    return tally(pairs, n_experts**2).reshape(-1, n_experts, n_experts)


def transitions(counts: Integer[np.ndarray, "pair expert next"]) -> Float[np.ndarray, "pair expert next"]:
    """P(next | expert): of the assignments that come from an expert, the share that goes to each of the layer above.

    Rows sum to 1; that of an expert that no token chose is not-a-number. If the layers chose independently, every row
    would be the share of assignments of the layer above.
    """
    return as_shares(counts)


def saturation_counts(
    experts: Experts, n_experts: int, final: Integer[np.ndarray, "_ _ _"]
) -> Int[np.ndarray, " layer"]:
    """Σ |S ∩ S_final| over the tokens of one text: how many choices two states of a model have in common.

    Raises `AnalysisError` if the two have not read the same number of tokens, with as many layers and choices.
    """
    if experts.shape != final.shape:
        raise AnalysisError(
            f"The choices to compare must be of one text and shape, but are {experts.shape} and {final.shape} "
            "(layer, seq, choice)."
        )
    experts, final = checked(experts, n_experts), checked(final, n_experts)
    return (experts[..., :, None] == final[..., None, :]).sum((1, 2, 3))


def saturation(traces: Sequence[Trace], finals: Sequence[Trace]) -> Float[np.ndarray, " layer"]:
    """The mean of |S ∩ S_final| / k: the share of choices that were already the final model's, by layer.

    `traces` and `finals` are what two checkpoints made of the same texts; 1 if all choices agree, k / E if they have
    nothing to do with each other. Two dtypes of one checkpoint compare as well. Source: OLMoE (arXiv 2409.02060,
    section 5). Raises `AnalysisError` unless both read the same ids.
    """
    if len(traces) != len(finals) or not traces:
        raise AnalysisError(
            f"Two checkpoints must read the same texts, but these read {len(traces)} and {len(finals)}."
        )
    shared: np.ndarray | int = 0
    assigned = 0
    for trace, final in zip(traces, finals, strict=True):
        if trace.ids.tolist() != final.ids.tolist():
            raise AnalysisError(
                f"{trace.model} and {final.model} have not read the same ids: trace one text with both."
            )
        experts, n_experts = choices(trace)
        shared = shared + saturation_counts(experts, n_experts, choices(final).experts)
        assigned += experts[0].size
    if not assigned:
        raise AnalysisError("There is no token to compare: trace a text first.")
    return np.asarray(shared / assigned)
