"""Tiny mixtures of experts."""

from finetune_test_models.tiny_families.family_model import GLM_ENDS, FamilyModel

MIXTURES: dict[str, FamilyModel] = {
    "mixtral": FamilyModel("mixtral", "llama-2", {"num_hidden_layers": 3}),
    "olmoe": FamilyModel("olmoe", "gpt-2"),
    "qwen1.5-moe": FamilyModel("qwen2_moe", "qwen"),
    "qwen3-moe": FamilyModel("qwen3_moe", "qwen"),
    "granite-3-moe": FamilyModel(
        "granitemoe", "smollm",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.22,
         "attention_multiplier": 0.2},
    ),
    "gpt-oss": FamilyModel(
        "gpt_oss", "phi-4-mini",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}},
    ),
    "llama-4": FamilyModel("llama4", "phi-4-mini", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
    "glm-4.5": FamilyModel("glm4_moe", "glm-4", {"num_nextn_predict_layers": 0}, ends=GLM_ENDS),
    "deepseek-v2": FamilyModel("deepseek_v2", "gpt-2"),
    "deepseek-v3": FamilyModel("deepseek_v3", "deepseek-3", {"n_routed_experts": 8, "n_group": 2}),
}  # fmt: skip
