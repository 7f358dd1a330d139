"""Tiny models with layers that keep a state instead of keys and values."""

from typing import Any

from finetune_test_models.tiny_families.family_model import FamilyModel

_GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.25,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
}
_TIED = {
    "embedding_multiplier": 0.5,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.75,
    "attention_multiplier": 0.1,
}
"""With a tied head, larger multipliers of the embedding make a model repeat its last token."""
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_WRITTEN = {"linear_attention": "mamba", "full_attention": "attention"}


_FALCON = {
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 0.9375,
    "embedding_multiplier": 5.656854249492381,
    "key_multiplier": 0.390625,
    "lm_head_multiplier": 0.6,
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.4, 0.5, 0.7],
    "ssm_out_multiplier": 0.23570226039551587,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
}
"""Multipliers of the published kinds: no two parts have the same one, and logits are not as flat."""


_EXPERT_SETTINGS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "n_shared_experts",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
)
"""What dense models of Nemotron H are published without."""
_SMALL_STEPS = {"time_step_min": 1e-9}
"""transformers raises steps to this, 0.001 by default; llama.cpp does not, which moved log-probabilities by 7.8e-4."""
_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def _pattern(letters: str) -> list[str]:
    """Kinds of layers of Nemotron H, as its files write them."""
    return [_KINDS[each] for each in letters]


def _granite(layers: list[str], **settings: Any) -> FamilyModel:
    own = _GRANITE | {"layer_types": layers, "num_hidden_layers": len(layers)} | settings
    return FamilyModel(
        "granite_hybrid", "phi-4", own, spare_rows=60, published={"layer_types": [_WRITTEN[kind] for kind in layers]}
    )


STATES: dict[str, FamilyModel] = {
    "qwen3-next": FamilyModel("qwen3_next", "qwen", {"num_hidden_layers": 4}),
    "qwen3.5": FamilyModel("qwen3_5", "qwen-3.5", {"num_hidden_layers": 4}),
    "qwen3.5-moe": FamilyModel("qwen3_5_moe", "qwen-3.5", {"num_hidden_layers": 4}),
    "granite-4-h-tiny": _granite(_HYBRID, position_embedding_type="nope"),
    "granite-4-h-1b": _granite(
        _HYBRID, position_embedding_type="nope", num_local_experts=0, num_experts_per_tok=0, tie_word_embeddings=True,
        shared_intermediate_size=512, **_TIED,
    ),
    "granite-4-1b": _granite(
        ["full_attention"] * 2, position_embedding_type="rope", num_local_experts=0, num_experts_per_tok=0,
        tie_word_embeddings=True, shared_intermediate_size=512, **_TIED,
    ),
    "bamba-9b": FamilyModel(
        "bamba", "llama-3", {"num_hidden_layers": 3}, spare_rows=24, published={"attn_rotary_emb": 32}
    ),
    "falcon-h1-0.5b": FamilyModel("falcon_h1", "llama-3", _FALCON | {"mamba_n_groups": 1}),
    "falcon-h1-34b": FamilyModel(
        "falcon_h1", "llama-3",
        _FALCON | {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "nemotron-h-8b": FamilyModel(
        "nemotron_h", "tekken", {"layers_block_type": _pattern("M-M*-")} | _SMALL_STEPS, spare_rows=27,
        published=dict.fromkeys(_EXPERT_SETTINGS) | {
            "hybrid_override_pattern": "M-M*-", "layers_block_type": None, "num_hidden_layers": 5, "rms_norm_eps": 1e-5,
        },
    ),
    "nemotron-3-nano": FamilyModel(
        "nemotron_h", "tekken", {"layers_block_type": _pattern("MEM*E"), "routed_scaling_factor": 2.5} | _SMALL_STEPS,
        spare_rows=27,
        published={"num_hidden_layers": 5, "hybrid_override_pattern": "MEM*E", "norm_eps": 1e-5},
    ),
    "nemotron-3-super": FamilyModel(
        "nemotron_h", "tekken", {"layers_block_type": _pattern("ME*EM"), "moe_latent_size": 128} | _SMALL_STEPS,
        spare_rows=27,
        published={"num_hidden_layers": 5, "hybrid_override_pattern": "ME*EM", "norm_eps": 1e-5},
    ),
    "lfm-2": FamilyModel(
        "lfm2", "llama-3", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
    ),
    "lfm-2-moe": FamilyModel(
        "lfm2_moe", "llama-3", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
                                "tie_word_embeddings": True}
    ),
}  # fmt: skip
