"""How sure the routers are: the spread of their probabilities, and how close the last choice was.

These need the routers' logits, which a trace imported from a serving engine does not have.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Integer

from mixtral_lab.analysis.routing import AnalysisError
from mixtral_lab.trace import Trace

BINS = 100
NEAR_TIE = 0.01  # probability between the last expert chosen and the first one left out


def router_logits(trace: Trace) -> Float[np.ndarray, "layer seq expert"]:
    """A trace's router logits as an array. Raises `TraceError` if they were not recorded."""
    return trace.routing.logits.float().cpu().numpy()


def router_probabilities(logits: Float[np.ndarray, "layer seq expert"]) -> Float[np.ndarray, "layer seq expert"]:
    """Softmax over all experts, chosen or not, in float64. Raises `AnalysisError` where a logit is not a number.

    An expert that was shut out, with a logit of minus infinity, gets probability 0.
    """
    logits = logits.astype(np.float64)
    best = logits.max(-1, keepdims=True, initial=-np.inf)
    if np.isnan(logits).any() or not np.isfinite(best).all():
        raise AnalysisError(
            "A router's logits are not numbers, or all minus infinity: they say nothing about its choice."
        )
    powers = np.exp(logits - best)
    return powers / powers.sum(-1, keepdims=True)


def router_entropy(logits: Float[np.ndarray, "layer seq expert"]) -> Float[np.ndarray, "layer seq"]:
    """-Σ p log2 p in bits: 0 if the router is certain of one expert, log2 E if all are alike to it."""
    p = router_probabilities(logits)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1) + 0.0  # no -0


def near_tie_margin(logits: Float[np.ndarray, "layer seq expert"], n_choices: int) -> Float[np.ndarray, "layer seq"]:
    """p(k) - p(k+1), the probability between the last expert chosen and the best one left out: 0 to 1/k.

    Where it is tiny, another dtype or another machine may choose differently. Raises `AnalysisError` if every expert is
    chosen, so that none is left out.
    """
    n_experts = logits.shape[-1]
    if not 1 <= n_choices < n_experts:
        raise AnalysisError(f"A margin needs 1 to {n_experts - 1} choices of {n_experts} experts, not {n_choices}.")
    best_first = -np.sort(-router_probabilities(logits), axis=-1)
    return best_first[..., n_choices - 1] - best_first[..., n_choices]


def binned_counts(values: Float[np.ndarray, "layer seq"], top: float) -> Int[np.ndarray, "layer bin"]:
    """How many tokens of every layer fall into each of `BINS` equal bins from 0 to `top`; may be added over texts.

    `top` is log2 E for `router_entropy`, 1/k for `near_tie_margin`.
    """
    bins = np.clip((values * (BINS / top)).astype(np.int64), 0, BINS - 1)
    rows = bins + BINS * np.arange(len(bins))[:, None]
    return np.bincount(rows.ravel(), minlength=BINS * len(bins)).reshape(len(bins), BINS)


def binned_quantile(counts: Integer[np.ndarray, "layer bin"], top: float, share: float) -> Float[np.ndarray, " layer"]:
    """The value that `share` of a layer's tokens stay below, to within a bin (top / 100); 0.5 gives the median."""
    upto = np.cumsum(counts, axis=1)
    if not upto[:, -1].all():
        raise AnalysisError("A layer has no token, so it has no median: trace a text first.")
    wanted = share * upto[:, -1:]
    at = np.minimum((upto < wanted).sum(1), BINS - 1)
    inside = counts[np.arange(len(counts)), at]
    before = upto[np.arange(len(counts)), at] - inside
    return (at + (wanted[:, 0] - before) / np.maximum(inside, 1)) * top / BINS


def near_ties(margins: Integer[np.ndarray, "layer bin"], n_choices: int) -> Float[np.ndarray, " layer"]:
    """The share of tokens whose margin is below `NEAR_TIE`, 0.01, from `binned_counts(near_tie_margin(...), 1 / k)`.

    That bound is a bin's edge, so the share is exact.
    """
    total = margins.sum(1)
    if not total.all():
        raise AnalysisError("A layer has no token, so it has no near ties: trace a text first.")
    return margins[:, : round(NEAR_TIE * n_choices * BINS)].sum(1) / total
