"""Tiny models with layers that keep a state instead of keys and values."""

from finetune_test_models.tiny_families.family_model import FamilyModel

STATES: dict[str, FamilyModel] = {
    "qwen3-next": FamilyModel("qwen3_next", "qwen", {"num_hidden_layers": 4}),
    "qwen3.5": FamilyModel("qwen3_5", "qwen-3.5", {"num_hidden_layers": 4}),
    "qwen3.5-moe": FamilyModel("qwen3_5_moe", "qwen-3.5", {"num_hidden_layers": 4}),
    "lfm-2": FamilyModel(
        "lfm2", "llama-3", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
    ),
}  # fmt: skip
