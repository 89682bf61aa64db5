"""Random small models of transformers, and ours with the same weights."""

from __future__ import annotations

import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from mixtral_lab.config import Config
from mixtral_lab.model import Transformer


def twin(config: Config, seed: int = 0, attention: str = "eager", experts: str = "eager"):
    """A transformers model of this shape with random weights, and ours with the same numbers."""
    torch.manual_seed(seed)
    shared = dict(
        vocab_size=config.vocab,
        hidden_size=config.dim,
        intermediate_size=config.hidden,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        sliding_window=config.window,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    if config.n_experts is None:
        theirs = MistralForCausalLM(MistralConfig(**shared)).eval()
    else:
        mixture = MixtralConfig(
            **shared,
            num_local_experts=config.n_experts,
            num_experts_per_tok=config.n_choices,
            experts_implementation=experts,
        )
        theirs = MixtralForCausalLM(mixture).eval()
    ours = Transformer(config).eval()
    ours.load_state_dict(our_names(theirs, config))
    return theirs, ours


def our_names(theirs, config: Config) -> dict[str, torch.Tensor]:
    """The weights of a transformers model under our names, copied in memory without any file."""
    found = {"embed.weight": theirs.model.embed_tokens.weight, "final_norm.weight": theirs.model.norm.weight}
    if not config.tied:
        found["unembed.weight"] = theirs.lm_head.weight
    for i, layer in enumerate(theirs.model.layers):
        at = f"layers.{i}."
        for role, letter in dict(query="q", key="k", value="v", output="o").items():
            found[f"{at}attention.{role}.weight"] = getattr(layer.self_attn, f"{letter}_proj").weight
        found[at + "attention_norm.weight"] = layer.input_layernorm.weight
        found[at + "ffn_norm.weight"] = layer.post_attention_layernorm.weight
        if config.n_experts is None:
            for role in ("gate", "up", "down"):
                found[f"{at}feed_forward.{role}.weight"] = getattr(layer.mlp, f"{role}_proj").weight
            continue
        found[at + "router.score.weight"] = layer.mlp.gate.weight
        for e in range(config.n_experts):
            gate, up = layer.mlp.experts.gate_up_proj[e].chunk(2)
            found[f"{at}experts.ffn.{e}.gate.weight"] = gate
            found[f"{at}experts.ffn.{e}.up.weight"] = up
            found[f"{at}experts.ffn.{e}.down.weight"] = layer.mlp.experts.down_proj[e]
    return {name: tensor.detach().clone() for name, tensor in found.items()}
