"""Where a router changed its mind: the choices for one text, before something happened to the model and after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from mixtral_lab.analysis.routing import AnalysisError, choices
from mixtral_lab.trace import Trace


def moved(before: Trace, after: Trace) -> Bool[np.ndarray, "layer seq"]:
    """Which tokens of a text are read by another set of experts than before; their order and weights do not matter.

    Experts (2, 5) before and (5, 2) after are the same; (5, 6) are not. Raises `AnalysisError` unless the two traces are of the
    same tokens and of as many layers, experts and choices.
    """
    (old, n_old), (new, n_new) = choices(before), choices(after)
    if not np.array_equal(before.ids.cpu().numpy(), after.ids.cpu().numpy()):
        raise AnalysisError("The two traces are of different tokens: trace the same text twice, without writing on.")
    if old.shape != new.shape or n_old != n_new:
        raise AnalysisError(
            f"The two traces have {old.shape[0]} and {new.shape[0]} layers with {old.shape[2]} of {n_old} and "
            f"{new.shape[2]} of {n_new} experts for each token: they cannot be compared."
        )
    return (np.sort(old, axis=-1) != np.sort(new, axis=-1)).any(-1)


def moved_share(before: Sequence[Trace], after: Sequence[Trace]) -> Float[np.ndarray, " layer"]:
    """The share of tokens that `moved`, by layer, over several texts together. Raises `AnalysisError` as `moved` does."""
    if not before or len(before) != len(after):
        raise AnalysisError(
            f"There are {len(before)} traces before and {len(after)} after: give one of each for every text."
        )
    return np.concatenate([moved(*pair) for pair in zip(before, after, strict=True)], axis=1).mean(1)
