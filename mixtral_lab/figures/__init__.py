"""Recorded decisions as pictures: a trace or an array goes in, a plotly figure comes out.

Every figure is returned, never shown, and says which model and dtype it is about. An expert has one colour
in all of them. The background is white on purpose, so that a figure reads alike in a light notebook, in a dark
one and on paper.
"""

from mixtral_lab.figures.bench import cost_by_length, time_by_site
from mixtral_lab.figures.causal import ablation_map, patching_map, rerouting, top_k_losses
from mixtral_lab.figures.certainty import router_certainty
from mixtral_lab.figures.colours import (
    EXPERT_COLOURS,
    FAINTEST,
    MOST_EXPERTS,
    FigureError,
    expert_colour,
    text_colour,
)
from mixtral_lab.figures.company import coactivation, saturation, transitions
from mixtral_lab.figures.lens import attribution, expert_words, logit_lens, top1_similarity
from mixtral_lab.figures.machine import what_fits
from mixtral_lab.figures.neighbours import repetition
from mixtral_lab.figures.offload import expert_cache, expert_cache_by_layer
from mixtral_lab.figures.routing import domain_experts, expert_shares, rank_shares
from mixtral_lab.figures.specialisation import domain_divergence, domain_information, language_or_topic, vocabulary
from mixtral_lab.figures.tokens import COLUMNS, Decisions, decisions, token_layer_map, tokens_by_expert
from mixtral_lab.figures.tuning import moved_choices, tuning_losses
from mixtral_lab.figures.weights import expert_peaks, expert_similarity, norm_and_score

__all__ = [
    "COLUMNS",
    "EXPERT_COLOURS",
    "FAINTEST",
    "MOST_EXPERTS",
    "Decisions",
    "FigureError",
    "ablation_map",
    "attribution",
    "coactivation",
    "cost_by_length",
    "decisions",
    "domain_divergence",
    "domain_experts",
    "domain_information",
    "expert_cache",
    "expert_cache_by_layer",
    "expert_colour",
    "expert_peaks",
    "expert_shares",
    "expert_similarity",
    "expert_words",
    "language_or_topic",
    "logit_lens",
    "moved_choices",
    "norm_and_score",
    "patching_map",
    "rank_shares",
    "repetition",
    "rerouting",
    "router_certainty",
    "saturation",
    "text_colour",
    "time_by_site",
    "token_layer_map",
    "tokens_by_expert",
    "top1_similarity",
    "top_k_losses",
    "transitions",
    "tuning_losses",
    "vocabulary",
    "what_fits",
]
