"""Settings of each family of tiny models, beyond the sizes that all have."""

from collections.abc import Callable
from typing import Any


def _gemma(head: int) -> dict[str, Any]:
    return {"tie_word_embeddings": True, "head_dim": head, "query_pre_attn_scalar": head, "sliding_window": 64}


def _gemma3n(head: int) -> dict[str, Any]:
    """All that llama.cpp hard-codes as published, with layers of both kinds that read the keys of others."""
    return {"tie_word_embeddings": True, "head_dim": head, "sliding_window": 64, "num_hidden_layers": 25,
            "num_kv_shared_layers": 5, "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 15,
            "vocab_size_per_layer_input": 650}  # fmt: skip


def _gemma4(head: int) -> dict[str, Any]:
    return {"tie_word_embeddings": True, "head_dim": head, "global_head_dim": 2 * head, "sliding_window": 64,
            "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


def _experts(head: int) -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4 * head}


def _routed(head: int) -> dict[str, Any]:
    return {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4 * head, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip


def _latent(head: int) -> dict[str, Any]:
    return {"q_lora_rank": 2 * head, "kv_lora_rank": 4 * head, "qk_nope_head_dim": head, "qk_rope_head_dim": head // 2,
            "v_head_dim": head, "num_key_value_heads": 4}  # fmt: skip


def _linear_attention(head: int) -> dict[str, Any]:
    """Twice as many heads of values as of keys, as published."""
    return {"linear_key_head_dim": head, "linear_value_head_dim": head, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "head_dim": head}  # fmt: skip


def _mamba(head: int) -> dict[str, Any]:
    """Layers of Mamba 2: 8 heads, 2 in each group."""
    return {"mamba_n_heads": 8, "mamba_d_head": head, "mamba_n_groups": 4, "mamba_d_state": head // 2}


# Settings of a family's config beyond the common sizes: family -> (model_type, settings by head size).
TINY_FAMILIES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "llama": ("llama", lambda head: {}),
    "mistral": ("mistral", lambda head: {"sliding_window": None, "head_dim": head}),
    "qwen2": ("qwen2", lambda head: {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", lambda head: {"head_dim": head}),
    "gemma2": ("gemma2", _gemma),
    "gemma3": ("gemma3_text", _gemma),
    "phi3": ("phi3", lambda head: {"sliding_window": None}),
    "ministral3": ("ministral3", lambda head: {"head_dim": head}),
    "smollm3": ("smollm3", lambda head: {}),
    "granite": ("granite", lambda head: {}),
    "arcee": ("arcee", lambda head: {"head_dim": head}),
    "seed_oss": ("seed_oss", lambda head: {"head_dim": head}),
    "olmo2": ("olmo2", lambda head: {}),
    "olmo3": ("olmo3", lambda head: {"sliding_window": 64}),
    "exaone4": ("exaone4", lambda head: {"sliding_window": 64}),
    "ernie4_5": ("ernie4_5", lambda head: {"head_dim": head}),
    "hunyuan": ("hunyuan_v1_dense", lambda head: {"head_dim": head}),
    "glm": ("glm", lambda head: {"head_dim": head}),
    "cohere": ("cohere", lambda head: {"tie_word_embeddings": True}),
    "internlm3": ("internlm3", lambda head: {"head_dim": head}),
    "iquestcoder": ("iquestcoder", lambda head: {"head_dim": head}),
    "olmo": ("olmo", lambda head: {}),
    "minicpm3": ("minicpm3", lambda head: {**_latent(head), "tie_word_embeddings": True}),
    "nemotron": ("nemotron", lambda head: {"head_dim": head}),
    "jais2": ("jais2", lambda head: {"head_dim": head, "num_key_value_heads": 4}),
    "glm4": ("glm4", lambda head: {"head_dim": head}),
    "cohere2": ("cohere2", lambda head: {"tie_word_embeddings": True, "head_dim": head, "sliding_window": 64}),
    "starcoder2": ("starcoder2", lambda head: {}),
    "phi": ("phi", lambda head: {}),
    "stablelm": ("stablelm", lambda head: {}),
    "apertus": ("apertus", lambda head: {}),
    "mixtral": ("mixtral", lambda head: {"num_local_experts": 4, "sliding_window": None}),
    "olmoe": ("olmoe", lambda head: {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "qwen2_moe": ("qwen2_moe", lambda head: _experts(head) | {"shared_expert_intermediate_size": 4 * head}),
    "qwen3_moe": ("qwen3_moe", lambda head: _experts(head) | {"head_dim": head, "norm_topk_prob": True}),
    "qwen3_next": (
        "qwen3_next",
        lambda head: _experts(head) | _linear_attention(head) | {"shared_expert_intermediate_size": 4 * head},
    ),
    "qwen3_5": ("qwen3_5_text", _linear_attention),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        lambda head: _experts(head) | _linear_attention(head) | {"shared_expert_intermediate_size": 4 * head},
    ),
    "lfm2": ("lfm2", lambda head: {"block_multiple_of": head}),
    "granite_hybrid": (
        "granitemoehybrid",
        lambda head: _mamba(head) | {"num_local_experts": 4, "shared_intermediate_size": 6 * head},
    ),
    "bamba": ("bamba", lambda head: _mamba(head) | {"mamba_n_groups": 1, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "falcon_h1",
        lambda head: _mamba(head) | {"mamba_n_heads": 12, "mamba_d_ssm": 12 * head, "head_dim": head},
    ),
    "nemotron_h": (
        "nemotron_h",
        lambda head: {
            "head_dim": head,
            "mamba_num_heads": 12,
            "mamba_head_dim": head,
            "n_groups": 4,
            "ssm_state_size": head // 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 4 * head,
            "moe_shared_expert_intermediate_size": 8 * head,
        },
    ),
    "granitemoe": ("granitemoe", lambda head: {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": (
        "granitemoeshared",
        lambda head: {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 4 * head},
    ),
    "gpt_oss": (
        "gpt_oss",
        lambda head: {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": head, "sliding_window": 64},
    ),
    "llama4": (
        "llama4_text",
        lambda head: {"num_local_experts": 4, "intermediate_size_mlp": 8 * head, "head_dim": head},
    ),
    "glm4_moe": ("glm4_moe", lambda head: _routed(head) | {"head_dim": head}),
    "deepseek_v2": ("deepseek_v2", lambda head: _routed(head) | _latent(head)),
    "deepseek_v3": ("deepseek_v3", lambda head: _routed(head) | _latent(head)),
    "glm4_moe_lite": ("glm4_moe_lite", lambda head: _routed(head) | _latent(head)),
    "solar_open": ("solar_open", lambda head: _routed(head) | {"head_dim": head}),
    "dots1": ("dots1", lambda head: _routed(head) | {"norm_topk_prob": True}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        lambda head: {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 2 * head, "moe_num_shared_experts": 2},
    ),
    "hunyuan_moe": ("hunyuan_v1_moe", lambda head: {"num_experts": 4, "moe_topk": 2, "head_dim": head}),
    "exaone_moe": (
        "exaone_moe",
        lambda head: _experts(head) | {"head_dim": head, "sliding_window": 64, "n_group": 1, "topk_group": 1},
    ),
    "minimax_m2": (
        "minimax_m2",
        lambda head: {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": head, "rotary_dim": head // 2},
    ),
    "lfm2_moe": ("lfm2_moe", lambda head: _experts(head) | {"num_dense_layers": 1}),
    "gemma3n": ("gemma3n_text", _gemma3n),
    "gemma4": ("gemma4_text", _gemma4),
    "gemma": ("gemma", lambda head: {"tie_word_embeddings": True, "head_dim": head}),
}
