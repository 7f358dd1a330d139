"""Rows of mixtures of experts."""

from typing import Any

from gguf import MODEL_ARCH, ExpertGatingFuncType

from finetune_trainer.export.gguf.families.common import (
    ALL_ROUTED,
    EXPERT_WIDTHS,
    GATE_UP,
    GRANITE_SCALES,
    LLAMA,
    ROUTED,
    SHARED_EXPERT_SPLITS,
    SIGMOID,
)
from finetune_trainer.export.gguf.family_row import GgufFamily, Split

_LATENT_SPLIT = Split(
    ("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"), per_head=("qk_nope_head_dim", "v_head_dim")
)
_LATENT: dict[str, Any] = {
    "latent_attention": True,
    "leading_dense": True,
    "rope_dimensions": True,
    "splits": {"self_attn.kv_b_proj.weight": _LATENT_SPLIT},
    "settings": ROUTED,
}
_LATENT_SIGMOID: dict[str, Any] = _LATENT | {
    "constants": SIGMOID,
    "fixed": {"rope_interleave": True, "attention_bias": False},
}
_GRANITE: dict[str, Any] = {
    "permuted_heads": True,
    "rope_dimensions": True,
    "splits": SHARED_EXPERT_SPLITS,
    "fixed": {"head_dim": None},
    "settings": GRANITE_SCALES | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
}
MIXTURES: dict[str, GgufFamily] = {
    "mixtral": GgufFamily(MODEL_ARCH.LLAMA, **LLAMA),
    "olmoe": GgufFamily(MODEL_ARCH.OLMOE, fixed={"clip_qkv": None, "norm_topk_prob": False, "attention_bias": False}),
    "qwen2_moe": GgufFamily(
        MODEL_ARCH.QWEN2MOE,
        settings=EXPERT_WIDTHS,
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3_moe": GgufFamily(
        MODEL_ARCH.QWEN3MOE,
        splits={"experts.gate_up_proj": Split(GATE_UP)},
        settings=EXPERT_WIDTHS,
        fixed=ALL_ROUTED,
    ),
    "granitemoe": GgufFamily(MODEL_ARCH.GRANITE_MOE, **_GRANITE),
    "granitemoeshared": GgufFamily(MODEL_ARCH.GRANITE_MOE, **_GRANITE),
    "gpt_oss": GgufFamily(
        MODEL_ARCH.GPT_OSS,
        sliding_window=True,
        window_period=2,
        splits={
            "experts.gate_up_proj": Split(GATE_UP, transposed=True, interleaved=True),
            "experts.gate_up_proj_bias": Split(("experts.gate_proj.bias", "experts.up_proj.bias"), interleaved=True),
            "experts.down_proj": Split(("experts.down_proj.weight",), transposed=True),
        },
        settings={"intermediate_size": "expert_feed_forward_length"},
        cut_ramp=False,
    ),
    "llama4_text": GgufFamily(
        MODEL_ARCH.LLAMA4,
        rope_dimensions=True,
        rope_tensors=True,
        no_rope_period=4,
        feed_forward="intermediate_size_mlp",
        splits={
            "experts.gate_up_proj": Split(GATE_UP, transposed=True),
            "experts.down_proj": Split(("experts.down_proj.weight",), transposed=True),
        },
        settings={
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "intermediate_size": "expert_feed_forward_length",
        },
    ),
    "glm4_moe": GgufFamily(
        MODEL_ARCH.GLM4_MOE, rope_dimensions=True, leading_dense=True, settings=ROUTED, constants=SIGMOID
    ),
    "solar_open": GgufFamily(
        MODEL_ARCH.GLM4_MOE,
        rope_dimensions=True,
        settings=ROUTED,
        constants=SIGMOID | {"leading_dense_block_count": 0},
    ),
    "dots1": GgufFamily(
        MODEL_ARCH.DOTS1,
        leading_dense=True,
        settings=ROUTED,
        constants=SIGMOID,
        fixed={"tie_word_embeddings": False, "attention_bias": False},
        same={"num_key_value_heads": "num_attention_heads"},
    ),
    "ernie4_5_moe": GgufFamily(
        MODEL_ARCH.ERNIE4_5_MOE,
        leading_dense=True,
        settings={
            "moe_intermediate_size": "expert_feed_forward_length",
            "moe_num_shared_experts": "expert_shared_count",
            "moe_layer_interval": "interleave_moe_layer_step",
        },
        products={"expert_shared_feed_forward_length": ("moe_intermediate_size", "moe_num_shared_experts")},
        changes={".moe_statics.e_score_correction_bias": ("only_row",)},
        fixed={"use_bias": False, "moe_norm_min": 1e-12},
    ),
    "hunyuan_v1_moe": GgufFamily(
        MODEL_ARCH.HUNYUAN_MOE,
        rope_tensors=True,
        stretched_rope=True,
        products={
            "expert_feed_forward_length": ("intermediate_size",),
            "expert_shared_feed_forward_length": ("intermediate_size",),
        },
        constants={"expert_shared_count": 1},
        fixed={"attention_bias": False},
    ),
    "exaone_moe": GgufFamily(
        MODEL_ARCH.EXAONE_MOE,
        leading_dense=True,
        window_pattern=True,
        scaled_rope=False,
        settings=ROUTED | {"num_shared_experts": "expert_shared_count"},
        products={"expert_shared_feed_forward_length": ("moe_intermediate_size", "num_shared_experts")},
        constants=SIGMOID,
    ),
    "minimax_m2": GgufFamily(
        MODEL_ARCH.MINIMAXM2,
        rope_dimensions=True,
        settings={"intermediate_size": "expert_feed_forward_length"},
        constants=SIGMOID,
        fixed={"tie_word_embeddings": False},
    ),
    "deepseek_v2": GgufFamily(
        MODEL_ARCH.DEEPSEEK2,
        constants={"expert_gating_func": ExpertGatingFuncType.SOFTMAX},
        fixed={"topk_method": "greedy", "norm_topk_prob": False, "attention_bias": False},
        **_LATENT,
    ),
    "deepseek_v3": GgufFamily(MODEL_ARCH.DEEPSEEK2, **_LATENT_SIGMOID),
    "glm4_moe_lite": GgufFamily(MODEL_ARCH.DEEPSEEK2, **_LATENT_SIGMOID),
}
