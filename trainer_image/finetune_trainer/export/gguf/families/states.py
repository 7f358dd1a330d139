"""Rows of families with layers that keep a state instead of keys and values."""

import math
from typing import Any

from gguf import MODEL_ARCH

from finetune_trainer.export.gguf.families.common import (
    ALL_ROUTED,
    EXPERT_WIDTHS,
    GATE_UP,
    GRANITE_SCALES,
    ROUTED,
    SHARED_EXPERT_SPLITS,
    SIGMOID,
)
from finetune_trainer.export.gguf.family_row import Form, GgufFamily, Split

_LINEAR_ATTENTION: dict[str, Any] = {
    "norm_offset": 1.0,
    "plain_norms": ("linear_attn.norm.weight",),
    "rope_dimensions": True,
    "state_layers": "linear_attention",
    "attention_interval": 4,
    "products": {"ssm_inner_size": ("linear_value_head_dim", "linear_num_value_heads")},
}
_LINEAR_SIZES = {
    "linear_conv_kernel_dim": "ssm_conv_kernel",
    "linear_key_head_dim": "ssm_state_size",
    "linear_num_key_heads": "ssm_group_count",
    "linear_num_value_heads": "ssm_time_step_rank",
}
_TILED_HEADS = {
    ".linear_attn.A_log": ("decay", "tile_rows"),
    ".linear_attn.dt_bias": ("tile_rows",),
    ".linear_attn.conv1d.weight": ("flat_kernel", "tile_rows"),
    ".linear_attn.in_proj_qkv.weight": ("tile_rows",),
    ".linear_attn.in_proj_z.weight": ("tile_rows",),
    ".linear_attn.in_proj_a.weight": ("tile_rows",),
    ".linear_attn.in_proj_b.weight": ("tile_rows",),
    ".linear_attn.out_proj.weight": ("tile_columns",),
}
_MAMBA_SIZES = {
    "mamba_d_conv": "ssm_conv_kernel",
    "mamba_d_state": "ssm_state_size",
    "mamba_n_groups": "ssm_group_count",
    "mamba_n_heads": "ssm_time_step_rank",
}
_MAMBA_CHANGES = {
    ".mamba.A_log": ("decay", "column"),
    ".mamba.D": ("column",),
    ".mamba.conv1d.weight": ("flat_kernel",),
    ".mamba.norm.weight": ("by_group",),
}
_INNER_SIZE = {"ssm_inner_size": ("mamba_n_heads", "mamba_d_head")}
_MAMBA_FIXED = {
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": [0.0, math.inf],
}
_SHARED_MLP = {
    "splits": {"shared_mlp.input_linear.weight": Split(("mlp.gate_proj.weight", "mlp.up_proj.weight"))},
    "spellings": {".shared_mlp.output_linear.weight": ".mlp.down_proj.weight"},
    "feed_forward": "shared_intermediate_size",
}
_NEMOTRON_SIZES = {
    "conv_kernel": "ssm_conv_kernel",
    "ssm_state_size": "ssm_state_size",
    "n_groups": "ssm_group_count",
    "mamba_num_heads": "ssm_time_step_rank",
}
_NEMOTRON_DENSE = {
    "architecture": MODEL_ARCH.NEMOTRON_H,
    "feed_forward": "intermediate_size",
    "settings": _NEMOTRON_SIZES,
}
_MULTIPLIERS = {
    ".embed_tokens.weight": ("embedding_multiplier",),
    "lm_head.weight": ("lm_head_multiplier",),
    ".q_proj.weight": ("attention_in_multiplier",),
    ".k_proj.weight": ("key_multiplier", "attention_in_multiplier"),
    ".v_proj.weight": ("attention_in_multiplier",),
    ".o_proj.weight": ("attention_out_multiplier",),
    ".gate_proj.weight": (("mlp_multipliers", 0),),
    ".down_proj.weight": (("mlp_multipliers", 1),),
    ".in_proj.weight": ("ssm_in_multiplier",),
    ".out_proj.weight": ("ssm_out_multiplier",),
}
STATES: dict[str, GgufFamily] = {
    "qwen3_next": GgufFamily(
        MODEL_ARCH.QWEN3NEXT,
        settings=EXPERT_WIDTHS | _LINEAR_SIZES,
        fixed=ALL_ROUTED,
        splits={
            "linear_attn.in_proj_qkvz.weight": Split(
                ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"), projected=True
            )
        },
        changes={".linear_attn.A_log": ("decay",), ".linear_attn.conv1d.weight": ("flat_kernel",)},
        **_LINEAR_ATTENTION,
    ),
    "qwen3_5_text": GgufFamily(
        MODEL_ARCH.QWEN35, rope_sections=True, settings=_LINEAR_SIZES, changes=_TILED_HEADS, **_LINEAR_ATTENTION
    ),
    "qwen3_5_moe_text": GgufFamily(
        MODEL_ARCH.QWEN35MOE,
        rope_sections=True,
        settings=EXPERT_WIDTHS | _LINEAR_SIZES,
        splits={"experts.gate_up_proj": Split(GATE_UP)},
        changes=_TILED_HEADS,
        **_LINEAR_ATTENTION,
    ),
    "granitemoehybrid": GgufFamily(
        MODEL_ARCH.GRANITE_HYBRID,
        permuted_heads=True,
        rope_dimensions=True,
        rope_switch=True,
        splits=SHARED_EXPERT_SPLITS,
        settings=GRANITE_SCALES | _MAMBA_SIZES | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
        fixed=_MAMBA_FIXED | {"mamba_expand": 2, "head_dim": None},
        forms=(
            Form(has_states=True, has_experts=False, differences=_SHARED_MLP),
            Form(has_states=False, has_experts=True, differences={"architecture": MODEL_ARCH.GRANITE_MOE}),
            Form(has_states=False, has_experts=False, differences={"architecture": MODEL_ARCH.GRANITE} | _SHARED_MLP),
        ),
        state_layers="linear_attention",
        products=_INNER_SIZE,
        changes=_MAMBA_CHANGES,
    ),
    "bamba": GgufFamily(
        MODEL_ARCH.GRANITE_HYBRID,
        permuted_heads=True,
        rope_dimensions=True,
        rope_switch=True,
        state_layers="linear_attention",
        settings=_MAMBA_SIZES,
        products=_INNER_SIZE,
        changes=_MAMBA_CHANGES,
        fixed=_MAMBA_FIXED | {"mamba_expand": 2, "attention_bias": False, "mlp_bias": False},
    ),
    "falcon_h1": GgufFamily(
        MODEL_ARCH.FALCON_H1,
        settings=_MAMBA_SIZES,
        products=_INNER_SIZE,
        changes=_MAMBA_CHANGES | {".mamba.in_proj.weight": ("scale_parts",)},
        scales=_MULTIPLIERS,
        fixed=_MAMBA_FIXED | {"attention_bias": False, "mlp_bias": False, "projectors_bias": False},
    ),
    "nemotron_h": GgufFamily(
        MODEL_ARCH.NEMOTRON_H_MOE,
        permuted_heads=True,
        rope_dimensions=True,
        rope_switch=True,
        state_layers="linear_attention",
        rms_epsilon="layer_norm_epsilon",
        step_floor="time_step_min",
        feed_forward="moe_intermediate_size",
        products={"ssm_inner_size": ("mamba_num_heads", "mamba_head_dim")},
        changes={end.replace("mamba", "mixer"): changes for end, changes in _MAMBA_CHANGES.items()},
        spellings={f".mixer.experts.{part}.weight": f".mlp.experts.{part}.weight" for part in ("up_proj", "down_proj")},
        settings=_NEMOTRON_SIZES
        | ROUTED
        | {
            "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
            "moe_latent_size": "moe_latent_size",
        },
        fixed={
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "use_conv_bias": True,
            "use_bias": False,
            "mlp_bias": False,
            "attention_bias": False,
        },
        forms=tuple(Form(has_states=each, has_experts=False, differences=_NEMOTRON_DENSE) for each in (True, False)),
    ),
    "lfm2": GgufFamily(
        MODEL_ARCH.LFM2,
        state_layers="conv",
        settings={"conv_L_cache": "shortconv_l_cache"},
        changes={".conv.conv.weight": ("flat_kernel",)},
        fixed={"conv_bias": False},
    ),
    "lfm2_moe": GgufFamily(
        MODEL_ARCH.LFM2MOE,
        state_layers="conv",
        leading_dense=True,
        settings={"conv_L_cache": "shortconv_l_cache", "moe_intermediate_size": "expert_feed_forward_length"},
        constants=SIGMOID,
        changes={".conv.conv.weight": ("flat_kernel",)},
        fixed={"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True},
    ),
}
