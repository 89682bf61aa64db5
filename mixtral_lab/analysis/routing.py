"""Who reads what: how often each expert is chosen, and how much that depends on the kind of text.

Counts come first, measures second. Every function named `..._counts` takes the chosen experts of one text, a numpy
array `layer seq choice` (best first), and the number of experts: `choices(trace)` makes the pair. It returns whole
numbers that may be added over texts, so a corpus of any length can be counted without keeping its traces. The measures
take the sums. To look at first choices alone, give `experts[:, :, :1]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, Shaped

from mixtral_lab.config import LabError
from mixtral_lab.trace import Trace, TraceError

Experts = Integer[np.ndarray, "layer seq choice"]


class AnalysisError(LabError, ValueError):
    """The numbers given to a measure are not what it measures."""


class Choices(NamedTuple):
    """The chosen experts of one text, `layer seq choice`, best first, and how many experts there are to choose from."""

    experts: Experts
    n_experts: int


def choices(trace: Trace) -> Choices:
    """A trace's choices as every `..._counts` function takes them: `assignment_counts(*choices(trace))`.

    Raises `TraceError` if the chosen experts are not known, `AnalysisError` if they are known for some tokens only.
    """
    experts = trace.experts.cpu().numpy()
    if trace.n_experts is None or experts.shape[1] != len(trace):
        raise AnalysisError(
            f"The trace has {len(trace)} tokens but decisions for {experts.shape[1]}: each token needs its own. "
            "Record the whole text, not some positions of it."
        )
    return Choices(experts, trace.n_experts)


def checked(experts: Experts, n_experts: int) -> Int[np.ndarray, "layer seq choice"]:
    """The same experts as 64-bit integers, also of a tensor. Raises `AnalysisError` if one is not among the `n_experts`."""
    if isinstance(experts, Trace):
        raise AnalysisError("This is a whole trace: its choices alone are wanted, ..._counts(*choices(trace)).")
    experts = np.asarray(experts)
    if experts.size and not (experts.min() >= 0 and experts.max() < n_experts):
        outside = int(experts.max()) if experts.max() >= n_experts else int(experts.min())
        raise AnalysisError(f"There is no expert {outside}: {n_experts} experts are numbered 0 to {n_experts - 1}.")
    return experts.astype(np.int64)


def tally(index: Int[np.ndarray, "layer *rest"], n: int) -> Int[np.ndarray, "layer n"]:
    """How often each number from 0 to `n` - 1 occurs in every layer."""
    rows = index.reshape(len(index), -1) + n * np.arange(len(index))[:, None]
    return np.bincount(rows.ravel(), minlength=n * len(index)).reshape(len(index), n)


def assignment_counts(experts: Experts, n_experts: int) -> Int[np.ndarray, "layer expert"]:
    """How many tokens chose each expert, be it first or last: every token counts once for each of its choices."""
    return tally(checked(experts, n_experts), n_experts)


def rank_counts(experts: Experts, n_experts: int) -> Int[np.ndarray, "layer choice expert"]:
    """The same, first choices, second choices and so on apart; their sum over `choice` is `assignment_counts`.

    Source: Mixtral of Experts (arXiv 2401.04088, Figure 9).
    """
    at_rank = checked(experts, n_experts)
    ranks = at_rank.shape[2]
    at_rank = at_rank + n_experts * np.arange(ranks)
    return tally(at_rank, ranks * n_experts).reshape(-1, ranks, n_experts)


def as_shares(counts: Integer[np.ndarray, "*axes expert"]) -> Float[np.ndarray, "*axes expert"]:
    """Counts as shares of the sum over their last axis; a row without any count becomes not-a-number.

    Of `assignment_counts` this is each expert's share of the assignments: with N tokens and k choices the denominator
    is k N, so that experts ((0, 1), (0, 2)) of four give (1/2, 1/4, 1/4, 0). Source: Mixtral of Experts (arXiv
    2401.04088, Figure 7). Raises `AnalysisError` if nothing was counted at all.
    """
    if not counts.any():
        raise AnalysisError("Nothing was counted, so there are no shares: trace a text first.")
    totals = counts.sum(-1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)


def domain_counts(
    traces_by_domain: Mapping[str, Sequence[Trace]],
    count: Callable[[np.ndarray, int], np.ndarray] = assignment_counts,
) -> tuple[tuple[str, ...], Int[np.ndarray, "domain ..."]]:
    """The names of the domains, and what `count` counts (here: `layer expert`), summed over all texts of each.

    Raises `TraceError` for a domain without texts, and unless one model in one dtype made all traces.
    """
    traces = [trace for several in traces_by_domain.values() for trace in several]
    if not traces:
        raise TraceError("There are no traces: give {domain: [trace, ...]} with at least one of each.")
    shapes = [(len(experts), n_experts) for experts, n_experts in map(choices, traces)]
    makers = {(trace.model, trace.dtype, *shape) for trace, shape in zip(traces, shapes, strict=True)}
    if len(makers) > 1:
        names = "; ".join(f"{m} in {d}, {layers} layers of {e} experts" for m, d, layers, e in sorted(makers))
        raise TraceError(f"The traces of one comparison must come from one model in one dtype, but these are: {names}.")
    counts = []
    for domain, several in traces_by_domain.items():
        if not any(len(trace) for trace in several):
            raise TraceError(f"The domain {domain!r} has no text: give it at least one trace, or leave it out.")
        counts.append(sum(count(*choices(trace)) for trace in several))
    return tuple(traces_by_domain), np.stack(counts)


def domain_shares(
    traces_by_domain: Mapping[str, Sequence[Trace]],
) -> tuple[tuple[str, ...], Float[np.ndarray, "domain layer expert"]]:
    """The names of the domains, and each expert's share of the assignments of each: what `expert_shares` draws.

    The tokens of a domain's texts are counted together, so a long text weighs more than a short one. Source:
    Mixtral of Experts (arXiv 2401.04088, Figure 7). Raises `TraceError` as `domain_counts` does.
    """
    domains, counts = domain_counts(traces_by_domain)
    return domains, as_shares(counts)


def domain_specialisation(
    counts: Integer[np.ndarray, "domain layer expert"], n_choices: int
) -> Float[np.ndarray, "domain layer expert"]:
    """N(e, D) / N(D): of a domain's tokens, the share that chose the expert; k / E if all experts are used alike.

    `counts` are those of `domain_counts`. Every row sums to k, the `n_choices` of a token. Source: OLMoE (arXiv
    2409.02060, section 5).
    """
    return n_choices * as_shares(counts)


def domain_information(counts: Shaped[np.ndarray, "domain expert"]) -> float:
    """Bits that the chosen expert tells about the domain: the mutual information of the two, from a table of counts.

    0 if every domain uses the experts alike; log2 of the number of domains if each keeps to its own, equally
    often: [[1, 1], [1, 1]] gives 0 and [[2, 0], [0, 2]] gives 1. Chance alone makes it larger than 0, by about
    (domains - 1)(experts - 1) / (2 ln 2 · assignments) bits, so compare tables of like size, or with
    `shuffled_information`. A domain with more tokens weighs more. Source: Shannon 1948, section 12; the correction is
    Miller's (1955). Raises `AnalysisError` for an empty table or a negative count.
    """
    table = np.asarray(counts, dtype=np.float64)
    if not np.isfinite(table).all() or (table < 0).any() or table.sum() <= 0:
        raise AnalysisError("Counts must be 0 or more, finite, and not all of them 0.")
    joint = table / table.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    bits = float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())
    return max(bits, 0.0)  # rounding can leave -1e-17


def shuffled_information(
    counts: Integer[np.ndarray, "text layer expert"], domains: Sequence[str], shuffles: int = 100, seed: int = 0
) -> Float[np.ndarray, "shuffle layer"]:
    """`domain_information` of every layer after dealing the domains out to the texts at random, `shuffles` times.

    This is what chance gives: a domain is no more than some texts. `counts` are `assignment_counts` of every text,
    `domains` the domain of each. Whole texts change their domain, not single tokens, because the tokens of a text are alike for
    many reasons; shuffling tokens would call almost any difference real. Raises `AnalysisError` if the two differ in
    length or there is one domain only.
    """
    names, labels = np.unique(np.asarray(domains, dtype=str), return_inverse=True)
    if len(labels) != len(counts) or len(names) < 2:
        raise AnalysisError(
            f"There are counts of {len(counts)} texts and {len(labels)} labels of {len(names)} domains: "
            "give each text one label, of two domains at least."
        )
    random = np.random.default_rng(seed)
    found = np.empty((shuffles, counts.shape[1]))
    for shuffle in found:
        dealt = random.permutation(labels)
        table = np.stack([counts[dealt == domain].sum(0) for domain in range(len(names))])
        shuffle[:] = [domain_information(table[:, layer]) for layer in range(counts.shape[1])]
    return found
