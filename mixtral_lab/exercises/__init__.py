"""Checkers for the exercises of the lessons: each says whether an answer is right, and if not, what went wrong.

One module for each lesson; a lesson imports its checkers from here.
"""

from mixtral_lab.exercises.attention import check_grouped_scores, check_kept_bytes, check_rotate_by_hand
from mixtral_lab.exercises.attribution import check_contribution, check_expert_share, check_opponent
from mixtral_lab.exercises.big import check_int4, check_lru_hits, check_rows_sent
from mixtral_lab.exercises.both_ways import check_fused_expert, check_our_name, check_shared_head
from mixtral_lab.exercises.breaking import check_flipped, check_safe, check_weights_without
from mixtral_lab.exercises.cache import check_cache_bytes, check_oldest_first, check_ring_after
from mixtral_lab.exercises.chat import check_stream, check_temperature, check_trim
from mixtral_lab.exercises.fine_tuning import check_adapter_numbers, check_masked_loss, check_merge
from mixtral_lab.exercises.inference import check_experts_awake, check_intensity, check_nucleus
from mixtral_lab.exercises.mixture import check_feed_forward_numbers, check_mixture, check_swiglu
from mixtral_lab.exercises.reading import check_either, check_information, check_uneven_chance
from mixtral_lab.exercises.router import check_repetition, check_route_by_hand
from mixtral_lab.exercises.serving import check_ask_again, check_read_events, check_routed_rows
from mixtral_lab.exercises.start import check_decisions, check_first_choice
from mixtral_lab.exercises.tokens import check_apply_merges, check_bytes_per_token, check_chat_by_hand
from mixtral_lab.exercises.training import check_balance_loss, check_importance_and_load
from mixtral_lab.exercises.upcycling import check_low_rank, check_unnormalised, check_upcycled_size
from mixtral_lab.exercises.verdict import Verdict
from mixtral_lab.exercises.whole_model import check_gigabytes_and_speed, check_rms_norm, check_wrong_part, miswired
from mixtral_lab.exercises.window import check_layers_needed, check_packed_mask, check_visible_keys

__all__ = [
    "Verdict",
    "check_adapter_numbers",
    "check_apply_merges",
    "check_ask_again",
    "check_balance_loss",
    "check_bytes_per_token",
    "check_cache_bytes",
    "check_chat_by_hand",
    "check_contribution",
    "check_decisions",
    "check_either",
    "check_expert_share",
    "check_experts_awake",
    "check_feed_forward_numbers",
    "check_first_choice",
    "check_flipped",
    "check_fused_expert",
    "check_gigabytes_and_speed",
    "check_grouped_scores",
    "check_importance_and_load",
    "check_information",
    "check_int4",
    "check_intensity",
    "check_kept_bytes",
    "check_layers_needed",
    "check_low_rank",
    "check_lru_hits",
    "check_masked_loss",
    "check_merge",
    "check_mixture",
    "check_nucleus",
    "check_oldest_first",
    "check_opponent",
    "check_our_name",
    "check_packed_mask",
    "check_read_events",
    "check_repetition",
    "check_ring_after",
    "check_rms_norm",
    "check_rotate_by_hand",
    "check_route_by_hand",
    "check_routed_rows",
    "check_rows_sent",
    "check_safe",
    "check_shared_head",
    "check_stream",
    "check_swiglu",
    "check_temperature",
    "check_trim",
    "check_uneven_chance",
    "check_unnormalised",
    "check_upcycled_size",
    "check_visible_keys",
    "check_weights_without",
    "check_wrong_part",
    "miswired",
]
