"""Small configs of many architectures, for what needs no weights: six layers, a vocabulary of a thousand."""

from __future__ import annotations

from typing import Any

SIZES = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}  # fmt: skip
LINEAR_ATTENTION = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4) | dict.fromkeys(
    ("linear_key_head_dim", "linear_value_head_dim"), 32
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
LATENT_ATTENTION = {
    "num_key_value_heads": 8, "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {}, "olmo2": {}, "phi3": {"pad_token_id": 0}, "smollm3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gemma2": {"head_dim": 32}, "gemma3_text": {"head_dim": 32, "sliding_window": 512},
    "gemma4_text": {"head_dim": 32, "sliding_window": 512, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 1000},
    "gemma3n_text": {
        "head_dim": 32, "sliding_window": 512, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 1000,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 3, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "num_dense_layers": 1,
    },
    "qwen3_5_text": {"head_dim": 32, **LINEAR_ATTENTION}, "qwen3_5_moe_text": {"head_dim": 32, **LINEAR_ATTENTION, **EXPERTS},
    "qwen3_next": {"head_dim": 32, **LINEAR_ATTENTION, **EXPERTS},
    "deepseek_v2": {**LATENT_ATTENTION, "first_k_dense_replace": 1}, "glm4_moe_lite": LATENT_ATTENTION,
    "granitemoehybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 256, "mamba_n_heads": 16, "mamba_d_head": 32,
        "mamba_d_state": 16, "layer_types": ["mamba", "attention"] * 3,
    },
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "head_dim": 32,
        "layers_block_type": ["mamba", "attention"] * 3,
    },
}  # fmt: skip


def config(model_type: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**{**SIZES, **SHAPES[model_type], **changes})
