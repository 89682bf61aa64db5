"""Do neighbours share an expert? Table 5 of the Mixtral paper, for every layer and with its uncertainty."""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from mixtral_lab.analysis.routing import AnalysisError, Experts, checked

DEFINITIONS = ("first", "either")  # the same first choice; any choice in common
QUANTILE = 1.959964  # of the normal distribution: 95 % lie within as many deviations
RESAMPLES = 1000


class Repetition(NamedTuple):
    """The share of neighbouring tokens that repeat an expert, between the ends of its 95 % interval.

    The axis `definition` is `DEFINITIONS`. `texts` and `pairs` say how many of them it comes from.
    """

    share: Float[np.ndarray, "definition layer"]
    low: Float[np.ndarray, "definition layer"]
    high: Float[np.ndarray, "definition layer"]
    texts: int
    pairs: int


def repetition_counts(experts: Experts, n_experts: int) -> Int[np.ndarray, "3 layer"]:
    """In one text: pairs of neighbours with the same first choice, pairs with any choice in common, and all pairs.

    Pairs lie within a text; count each text by itself, and the end of one is never paired with the start of the next.
    """
    experts = checked(experts, n_experts)
    here, after = experts[:, :-1], experts[:, 1:]
    first = (here[..., 0] == after[..., 0]).sum(1)
    either = (here[..., :, None] == after[..., None, :]).any((-1, -2)).sum(1)
    return np.stack([first, either, np.full_like(first, here.shape[1])])


def repetition(counts: Integer[np.ndarray, "text 3 layer"], seed: int = 0) -> Repetition:
    """The share of neighbours that repeat an expert over all texts, by both definitions, with 95 % intervals.

    `counts` stacks the `repetition_counts` of the texts. Where there are several texts, texts were drawn, not tokens:
    the interval is the bootstrap's, 1,000 draws of as many texts with replacement (percentiles; `seed` makes it
    repeatable), and with fewer than about ten texts it is too narrow. Of a single text it is Wilson's (1927), which takes
    pairs for independent; they are not quite. Source: Mixtral of Experts (arXiv 2401.04088, Table 5 and Figure 10).
    Raises `AnalysisError` if no text has two tokens.
    """
    counts = counts[counts[:, 2, 0] > 0].astype(np.int64)
    if not len(counts):
        raise AnalysisError("No text has two tokens, so there are no neighbours to compare.")
    repeats, pairs = counts[:, :2], counts[:, 2, 0]
    share = repeats.sum(0) / pairs.sum()
    if len(counts) == 1:
        low, high = _wilson(share, int(pairs.sum()))
    else:
        draws = np.random.default_rng(seed).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), RESAMPLES)
        drawn = np.einsum("dt,tpl->dpl", draws, repeats) / (draws @ pairs)[:, None, None]
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return Repetition(share, low, high, len(counts), int(pairs.sum()))


def random_repetition(n_experts: int, n_choices: int) -> tuple[float, float]:
    """What either definition gives if every token draws `n_choices` of `n_experts` blindly: 1/E and 1 - C(E-k, k)/C(E, k).

    Of 8 experts and 2 choices: 0.125 and 1 - 15/28 = 0.464. Experts that are used unevenly repeat more often by
    chance. Source: Mixtral of Experts (arXiv 2401.04088, section 5).
    """
    return 1 / n_experts, 1 - comb(n_experts - n_choices, n_choices) / comb(n_experts, n_choices)


def _wilson(share: Float[np.ndarray, "*axes"], n: int) -> tuple[Float[np.ndarray, "*axes"], Float[np.ndarray, "*axes"]]:
    """The 95 % score interval of a share of `n` independent draws."""
    z2 = QUANTILE**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = QUANTILE / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return np.maximum(middle - reach, 0), np.minimum(middle + reach, 1)
