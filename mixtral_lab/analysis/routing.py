"""Who reads what: how often each expert is chosen, and how much that depends on the kind of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from mixtral_lab.config import LabError
from mixtral_lab.model import Routing
from mixtral_lab.trace import Trace, TraceError


class AnalysisError(LabError, ValueError):
    """The numbers given to a measure are not what it measures."""


def assignment_counts(routing: Routing) -> Int[np.ndarray, "layer expert"]:
    """How many tokens chose each expert, be it first or last: every token counts once for each of its choices."""
    layers, n_experts = routing.logits.shape[0], routing.logits.shape[-1]
    chosen = routing.experts.flatten(1)
    counts = torch.zeros(layers, n_experts, dtype=torch.long, device=chosen.device)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen)).cpu().numpy()


def assignment_shares(routing: Routing) -> Float[np.ndarray, "layer expert"]:
    """Each expert's share of the assignments of its layer, so that every layer sums to 1.

    With N tokens and k choices the denominator is k N: experts ((0, 1), (0, 2)) of four give (1/2, 1/4, 1/4, 0).
    Source: Mixtral of Experts (arXiv 2401.04088, Figure 7). Raises `TraceError` if there is no token.
    """
    counts = assignment_counts(routing)
    if not counts.sum():
        raise TraceError("There is no token, so no expert has a share: trace a text first.")
    return counts / counts.sum(-1, keepdims=True)


def domain_counts(
    traces_by_domain: Mapping[str, Sequence[Trace]],
) -> tuple[tuple[str, ...], Int[np.ndarray, "domain layer expert"]]:
    """The names of the domains, and how often each expert was chosen over all texts of each domain.

    Raises `TraceError` for a domain without texts, and unless one model in one dtype made all traces.
    """
    traces = [trace for several in traces_by_domain.values() for trace in several]
    if not traces:
        raise TraceError("There are no traces: give {domain: [trace, ...]} with at least one of each.")
    makers = {(t.model, t.dtype, t.routing.logits.shape[0], t.routing.logits.shape[-1]) for t in traces}
    if len(makers) > 1:
        names = "; ".join(f"{m} in {d}, {layers} layers of {e} experts" for m, d, layers, e in sorted(makers))
        raise TraceError(f"The traces of one comparison must come from one model in one dtype, but these are: {names}.")
    counts = []
    for domain, several in traces_by_domain.items():
        if not any(len(trace) for trace in several):
            raise TraceError(f"The domain {domain!r} has no text: give it at least one trace, or leave it out.")
        counts.append(sum(assignment_counts(trace.routing) for trace in several))
    return tuple(traces_by_domain), np.stack(counts)


def domain_shares(
    traces_by_domain: Mapping[str, Sequence[Trace]],
) -> tuple[tuple[str, ...], Float[np.ndarray, "domain layer expert"]]:
    """The names of the domains, and each expert's share of the assignments of each: what `expert_shares` draws.

    The tokens of a domain's texts are counted together, so a long text weighs more than a short one. Source:
    Mixtral of Experts (arXiv 2401.04088, Figure 7). Raises `TraceError` as `domain_counts` does.
    """
    domains, counts = domain_counts(traces_by_domain)
    return domains, counts / counts.sum(-1, keepdims=True)


def domain_information(counts: Shaped[np.ndarray, "domain expert"]) -> float:
    """Bits that the chosen expert tells about the domain: the mutual information of the two, from a table of counts.

    0 if every domain uses the experts alike; log2 of the number of domains if each keeps to its own, equally
    often: [[1, 1], [1, 1]] gives 0 and [[2, 0], [0, 2]] gives 1. Chance alone makes it larger than 0, by about
    (domains - 1)(experts - 1) / (2 ln 2 · assignments) bits, so compare tables of like size. A domain with more
    tokens weighs more. Source: Shannon 1948, section 12; the correction is Miller's (1955).
    Raises `AnalysisError` for an empty table or a negative count.
    """
    table = np.asarray(counts, dtype=np.float64)
    if not np.isfinite(table).all() or (table < 0).any() or table.sum() <= 0:
        raise AnalysisError("Counts must be 0 or more, finite, and not all of them 0.")
    joint = table / table.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    bits = float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())
    return max(bits, 0.0)  # rounding can leave -1e-17
