"""Tiny models of families without experts and without states."""

from typing import Any

from finetune_test_models.tiny_families.family_model import (
    GLM_ENDS,
    HEAD_SIZE,
    HIDDEN_SIZE,
    NAMED_TEMPLATES,
    STRETCHED,
    FamilyModel,
)


def _factors(start: float, step: float, count: int) -> list[float]:
    return [start + step * index for index in range(count)]


def _long_rope(dimensions: int) -> dict[str, Any]:
    short, long = _factors(1.0, 0.01, dimensions // 2), _factors(1.0, 0.5, dimensions // 2)
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}


DENSE: dict[str, FamilyModel] = {
    "llama-2": FamilyModel("llama", "llama-2"),
    "llama-3.1": FamilyModel(
        "llama", "llama-3",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), template=NAMED_TEMPLATES,
    ),
    "llama-linear": FamilyModel(
        "llama", "gpt-2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "smollm": FamilyModel("llama", "smollm", {"tie_word_embeddings": True}),
    "mistral": FamilyModel("mistral", "llama-2", {"sliding_window": 4096}),
    "mistral-nemo": FamilyModel("mistral", "tekken", {"head_dim": 2 * HEAD_SIZE}),
    "qwen2.5": FamilyModel(
        "qwen2", "qwen", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen2.5-yarn": FamilyModel(
        "qwen2", "qwen",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    "qwen3": FamilyModel("qwen3", "qwen", {"head_dim": 2 * HEAD_SIZE}),
    "phi-3": FamilyModel(
        "phi3", "phi-3", {"sliding_window": 2047}, ends=("<|endoftext|>", "<|assistant|>", "<|end|>")
    ),
    "phi-3-long": FamilyModel(
        "phi3", "phi-3",
        {"rope_parameters": _long_rope(HEAD_SIZE), "original_max_position_embeddings": 512, "sliding_window": None},
    ),
    "phi-4": FamilyModel("phi3", "phi-4", {"sliding_window": None}),
    "phi-4-mini": FamilyModel(
        "phi3", "phi-4-mini",
        {"rope_parameters": _long_rope(HEAD_SIZE * 3 // 4) | {"partial_rotary_factor": 0.75},
         "original_max_position_embeddings": 512, "sliding_window": None, "tie_word_embeddings": True},
        ends=("<|endoftext|>", "<|end|>"),
    ),
    "ministral-3": FamilyModel(
        "ministral3", "tekken",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "smollm-3": FamilyModel("smollm3", "llama-3", {"num_hidden_layers": 4}),
    "granite-3": FamilyModel(
        "granite", "smollm",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.22,
         "attention_multiplier": 0.2},
    ),
    "arcee": FamilyModel("arcee", "llama-3"),
    "seed-oss": FamilyModel("seed_oss", "seed", {"attention_bias": True}),
    "olmo-2": FamilyModel("olmo2", "phi-4"),
    "olmo-3": FamilyModel("olmo3", "phi-4", {"num_hidden_layers": 4}),
    "exaone-4": FamilyModel("exaone4", "gpt-2", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone-4-32b": FamilyModel(
        "exaone4", "gpt-2",
        {"num_hidden_layers": 64, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "ernie-4.5": FamilyModel("ernie4_5", "llama-2", {"tie_word_embeddings": True}),
    "hunyuan": FamilyModel("hunyuan", "phi-4", {"eod_token_id": None} | STRETCHED),
    "glm-4": FamilyModel("glm4", "glm-4", ends=GLM_ENDS),
    "glm": FamilyModel("glm", "glm-4", {"attention_bias": True, "rms_norm_eps": 1.5625e-07}, ends=GLM_ENDS),
    "internlm-3": FamilyModel(
        "internlm3", "llama-2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e7, "factor": 6.0}}
    ),
    "iquest-coder": FamilyModel("iquestcoder", "llama-2"),
    "minicpm-3": FamilyModel(
        "minicpm3", "llama-2",
        {"rope_parameters": _long_rope(HEAD_SIZE // 2) | {"original_max_position_embeddings": 2048}},
    ),
    "olmo-1": FamilyModel("olmo", "gpt-2", {"clip_qkv": 1.5, "num_key_value_heads": 4}),
    "nemotron": FamilyModel("nemotron", "llama-2"),
    "jais-2": FamilyModel("jais2", "jais-2"),
    "command-r": FamilyModel("cohere", "smollm", {"logit_scale": 0.5}),
    "command-r-plus": FamilyModel(
        "cohere", "smollm",
        {"use_qk_norm": True, "num_hidden_layers": 64, "hidden_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1, "logit_scale": 0.5},
    ),
    "cohere-2": FamilyModel("cohere2", "smollm", {"num_hidden_layers": 4, "rotary_pct": 1.0, "logit_scale": 0.5}),
    "starcoder-2": FamilyModel("starcoder2", "smollm"),
    "phi-2": FamilyModel("phi", "gpt-2", {"intermediate_size": 4 * HIDDEN_SIZE, "num_key_value_heads": 4}),
    "stablelm": FamilyModel("stablelm", "gpt-2", {"use_qkv_bias": True}),
    "apertus": FamilyModel(
        "apertus", "tekken",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
    ),
}  # fmt: skip
