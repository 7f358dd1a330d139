"""Tiny mixtures of experts."""

from typing import Any

from finetune_test_models.tiny_families.family_model import GLM_ENDS, STRETCHED, FamilyModel

_GRANITE_SCALES = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.25,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
}


def _latent_yarn(weight: float, factor: float = 40.0) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "original_max_position_embeddings": 64,
            "beta_fast": 32, "beta_slow": 1, "mscale": weight, "mscale_all_dim": weight}  # fmt: skip


MIXTURES: dict[str, FamilyModel] = {
    "mixtral": FamilyModel("mixtral", "llama-2", {"num_hidden_layers": 3}),
    "olmoe": FamilyModel("olmoe", "gpt-2"),
    "qwen1.5-moe": FamilyModel("qwen2_moe", "qwen"),
    "qwen3-moe": FamilyModel("qwen3_moe", "qwen"),
    "granite-3-moe": FamilyModel("granitemoe", "smollm", _GRANITE_SCALES),
    "gpt-oss": FamilyModel(
        "gpt_oss", "phi-4-mini",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}},
    ),
    "llama-4": FamilyModel("llama4", "phi-4-mini", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
    "glm-4.5": FamilyModel("glm4_moe", "glm-4", {"num_nextn_predict_layers": 0}, ends=GLM_ENDS),
    "deepseek-v2": FamilyModel("deepseek_v2", "gpt-2", {"rope_parameters": _latent_yarn(0.707)}),
    "deepseek-v2-lite": FamilyModel(
        "deepseek_v2", "gpt-2",
        {"num_hidden_layers": 27, "q_lora_rank": None, "moe_intermediate_size": 64,
         "rope_parameters": _latent_yarn(0.707)},
    ),
    "deepseek-v3": FamilyModel(
        # The published factor, 40, sharpens attention so much that F16 rounds farther than in other families.
        "deepseek_v3", "deepseek-3", {"n_routed_experts": 8, "n_group": 2, "rope_parameters": _latent_yarn(1.0, 8.0)}
    ),
    "granite-3-moe-shared": FamilyModel("granitemoeshared", "smollm", _GRANITE_SCALES),
    "glm-4.7-flash": FamilyModel(
        "glm4_moe_lite", "glm-4", {"num_hidden_layers": 3, "num_nextn_predict_layers": 0}, ends=GLM_ENDS
    ),
    "solar-open": FamilyModel(
        "solar_open", "solar",
        {"first_k_dense_replace": 0, "routed_scaling_factor": 2.5, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    ),
    "ernie-4.5-moe": FamilyModel("ernie4_5_moe", "llama-2", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "hunyuan-a13b": FamilyModel(
        "hunyuan_moe", "qwen",
        {"moe_topk": [2] * 2, "moe_intermediate_size": [512] * 2, "num_shared_expert": [1] * 2, "eod_token_id": None}
        | STRETCHED,
    ),
    "k-exaone": FamilyModel(
        "exaone_moe", "k-exaone",
        {"num_hidden_layers": 4, "routed_scaling_factor": 2.5, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6}},
    ),
    "minimax-m2": FamilyModel("minimax_m2", "phi-4-mini", {"scoring_func": "sigmoid"}),
    "dots.llm1": FamilyModel(
        "dots1", "qwen",
        {"num_key_value_heads": 4, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "num_hidden_layers": 3},
    ),
}  # fmt: skip
