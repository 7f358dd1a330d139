"""Tiny Gemma models."""

from finetune_test_models.tiny_families.family_model import HIDDEN_SIZE, FamilyModel

GEMMA: dict[str, FamilyModel] = {
    "gemma-2": FamilyModel("gemma2", "gemma", ends=("<eos>", "<end_of_turn>")),
    "gemma-3": FamilyModel(
        "gemma3", "gemma",
        {"num_hidden_layers": 6, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        ends=("<eos>", "<end_of_turn>"),
    ),
    "gemma-3n": FamilyModel(
        "gemma3n", "gemma", {"num_hidden_layers": 25, "intermediate_size": 2048}, ends=("<eos>", "<end_of_turn>")
    ),
    "gemma-4-31b": FamilyModel(
        "gemma4", "gemma-4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0},
        ends=("<eos>", "<turn|>"), spare_rows=0,
    ),
    "gemma-4-e2b": FamilyModel(
        "gemma4", "gemma-4",
        {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
         "num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2},
        ends=("<eos>", "<turn|>"), spare_rows=0, seed=5,
    ),
    "gemma-4-26b-a4b": FamilyModel(
        "gemma4", "gemma-4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
         "top_k_experts": 2, "moe_intermediate_size": HIDDEN_SIZE},
        ends=("<eos>", "<turn|>"), spare_rows=0,
    ),
    "gemma": FamilyModel(
        "gemma", "gemma", {"num_key_value_heads": 1, "num_hidden_layers": 3}, ends=("<eos>", "<end_of_turn>")
    ),
}  # fmt: skip
