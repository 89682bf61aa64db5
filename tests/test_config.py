"""The published shapes, against the config.json that Mistral put beside each model's weights."""

from __future__ import annotations

import json

import pytest

from mixtral_lab.checkpoint import read_config
from mixtral_lab.config import PRESETS, Config, ConfigError

USUAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8, "sliding_window": None, "tie_word_embeddings": False, "rope_theta": 1000000.0,
    "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
}  # fmt: skip
_22B = {
    "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56,
    "max_position_embeddings": 32768, "vocab_size": 32768,
}  # fmt: skip
# As on huggingface.co in 2024 and 2025 (of gated repositories: as copies and fine-tuned models of them repeat it)
PUBLISHED = {
    "mixtral-8x22b": _22B | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 65536, "router_aux_loss_coef": 0.001, "output_router_logits": False,
    },
    "mistral-nemo-12b": {
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 40,
        "max_position_embeddings": 131072, "vocab_size": 131072,
    },
    "mistral-small-22b": _22B | {"head_dim": 128},
    "codestral-22b": _22B,
    "mistral-small-24b": {
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32, "num_hidden_layers": 40,
        "max_position_embeddings": 32768, "rope_theta": 100000000.0, "vocab_size": 131072,
    },
    "mistral-large-123b": {
        "head_dim": 128, "hidden_size": 12288, "intermediate_size": 28672, "num_attention_heads": 96, "num_hidden_layers": 88,
        "max_position_embeddings": 131072, "vocab_size": 32768,
    },
}  # fmt: skip
BILLIONS = {
    "mixtral-8x22b": 141, "mistral-nemo-12b": 12.2, "mistral-small-22b": 22.2, "codestral-22b": 22.2,
    "mistral-small-24b": 23.6, "mistral-large-123b": 123,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_config(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(USUAL | PUBLISHED[name]))
    assert read_config(tmp_path) == PRESETS[name].config


@pytest.mark.parametrize("name", BILLIONS)
def test_a_preset_has_as_many_parameters_as_its_model(name):
    assert PRESETS[name].config.parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


def test_every_preset_names_its_source():
    for name, preset in PRESETS.items():
        assert (
            "data/README.md" in preset.source
            if name.startswith("mini")
            else "config.json of mistralai/" in preset.source
        )


def test_heads_need_not_fill_the_stream():
    nemo = PRESETS["mistral-nemo-12b"].config
    assert nemo.n_heads * nemo.head_dim == 4096 < nemo.dim == 5120
    with pytest.raises(ConfigError, match="must be a multiple"):
        Config(dim=8, n_layers=1, n_heads=3, n_kv_heads=2, head_dim=2, hidden=4, vocab=9, context=9)
