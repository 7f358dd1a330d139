"""Tiny random models of any causal language model of transformers, from its `model_type` alone.

The sizes that configurations commonly have are made small wherever a type has them; what a type needs beyond that
stands in SETTINGS.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_test_models.tiny_model import train_tokenizer
from finetune_trainer.model.configuration.dropout import switch_off_dropout

VOCABULARY = 512
MOST_PARAMETERS = 30e6
"""More than these means that a size was missed."""
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "embedding_size": 64,
    "intermediate_size": 128, "ffn_dim": 128, "decoder_ffn_dim": 128, "d_ff": 128, "n_inner": 128,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 16, "sliding_window": 64, "attention_window": 64,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "index_head_dim": 16,
    "state_size": 16, "n_groups": 1, "ssm_state_size": 16, "mamba_d_state": 16, "mamba_d_head": 16,
    "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_d_ssm": 128,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
    "initializer_range": 1 / 8, "init_std": 1 / 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"per_layer_config": {}, "index_n_heads": 4, "head_dim": 32},
    "gemma3n_text": {
        "intermediate_size": [128] * 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "audio_config": {"hidden_size": 64, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 4},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 16,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3],
    },
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "gptj": {"n_head": 4, "rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "falcon_mamba": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
MADE_MIXTURES: dict[str, dict[str, Any]] = {
    "gemma4_text": {  # as 26B-A4B
        "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
}  # fmt: skip
"""What makes a mixture of a type that is not one by default."""
MIXTURES = (
    "qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3", "llama4_text", "olmoe", "granitemoe", "gemma4_text",
)  # fmt: skip
STACKED = ("gpt_oss", "llama4_text", "granitemoe", "gemma4_text")
"""Those whose files stack the experts of a layer."""
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
MIXTURE_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": TWO_LAYERS | {"norm_topk_prob": True},  # as published
    # Rows of whole NF4 blocks: bitsandbytes decodes others wrongly on some CPUs.
    "deepseek_v3": TWO_LAYERS | {"q_lora_rank": 64, "kv_lora_rank": 64},
    "gpt_oss": TWO_LAYERS | {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": TWO_LAYERS | {"layer_types": ["chunked_attention", "full_attention"]},
    "lfm2_moe": TWO_LAYERS | {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": TWO_LAYERS | {"layer_types": ["mamba", "attention"]},
    "qwen3_next": TWO_LAYERS | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": TWO_LAYERS | {"layer_types": ["linear_attention", "full_attention"]},
    "gemma4_text": TWO_LAYERS | {"layer_types": ["sliding_attention", "full_attention"]},
}
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Returns the configuration of a small model; `changes` are settings of it."""
    make = CONFIG_MAPPING[model_type]
    known = make().to_dict()
    settings = {name: value for name, value in SMALL.items() if name in known or name in make.attribute_map}

    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]  # latent attention has no groups of heads
    if isinstance(kinds := known.get("layer_types"), list):
        different = list(dict.fromkeys(kinds))
        settings["layer_types"] = (different * 4)[: max(4, len(different))]
        settings["num_hidden_layers"] = len(settings["layer_types"])

    return make(**settings | SETTINGS.get(model_type, {}) | changes)


def tiny_architecture(model_type: str, **changes: Any) -> Any:
    """Returns a random model in float32, in evaluation mode and without dropout of its own; `changes` are settings of
    its configuration."""
    config = switch_off_dropout(tiny_config(model_type, **changes))
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in auto.from_config(config).parameters())
    assert parameters < MOST_PARAMETERS, f"{model_type} has {parameters:,} parameters"

    set_seed(0)
    return auto.from_config(config, dtype=torch.float32).eval()


def tiny_mixture(model_type: str, **changes: Any) -> Any:
    """Returns such a model of a type that has experts, with experts."""
    return tiny_architecture(model_type, **MADE_MIXTURES.get(model_type, {}) | changes)


def make_mixture(folder: Path, model_type: str, texts: list[str], dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the model and returns its folder."""
    changes = MIXTURE_SETTINGS.get(model_type, TWO_LAYERS)
    model = tiny_mixture(model_type, **changes).to(dtype)
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder
