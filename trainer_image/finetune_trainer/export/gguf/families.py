"""The model families that GGUF files are written for: one row each, and no class per family.

Source: the model code of transformers (what a weight means) and llama.cpp's graphs (what it expects). A family gets
its row once a parity test against llama.cpp covers it; `tests/trainer/export/gguf/test_families.py` lists what a row
lacks.
"""

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, ExpertGatingFuncType

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.config_checks import check_settings
from finetune_trainer.export.gguf.family_row import GgufFamily, Split

_GATE_UP = ("experts.gate_proj.weight", "experts.up_proj.weight")
_LATENT_SPLIT = Split(
    ("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"), per_head=("qk_nope_head_dim", "v_head_dim")
)
_SHARED_EXPERT_SPLITS = {
    "block_sparse_moe.input_linear.weight": Split(("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")),
    "shared_mlp.input_linear.weight": Split(("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight")),
}
_GRANITE_SCALES = {
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_EXPERT_WIDTHS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_ROUTED = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}
_LATENT: dict[str, Any] = {
    "latent_attention": True,
    "rope_dimensions": True,
    "splits": {"self_attn.kv_b_proj.weight": _LATENT_SPLIT},
    "settings": _ROUTED,
}
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
_ALL_ROUTED = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
TANH_GELU = "gelu_pytorch_tanh"
_LLAMA: dict[str, Any] = {"permuted_heads": True, "rope_dimensions": True, "rope_tensors": True}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": TANH_GELU}
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, **_LLAMA),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, **_LLAMA),
    "ministral3": GgufFamily(
        MODEL_ARCH.MISTRAL3,
        yarn_log="mscale_all_dim",
        settings={"llama_4_scaling_beta": "attn_temperature_scale"},
        **_LLAMA,
    ),
    "smollm3": GgufFamily(MODEL_ARCH.SMOLLM3, no_rope_period=4, **_LLAMA),
    "granite": GgufFamily(
        MODEL_ARCH.GRANITE,
        permuted_heads=True,
        rope_dimensions=True,
        fixed={"head_dim": None},
        settings=_GRANITE_SCALES,
    ),
    "arcee": GgufFamily(MODEL_ARCH.ARCEE, activation="relu2", **_LLAMA),
    "seed_oss": GgufFamily(MODEL_ARCH.SEED_OSS, fixed={"mlp_bias": False}),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "olmo2": GgufFamily(MODEL_ARCH.OLMO2),
    "olmo3": GgufFamily(MODEL_ARCH.OLMO2, window_pattern=True),
    "exaone4": GgufFamily(
        MODEL_ARCH.EXAONE4, rope_tensors=True, window_pattern=True, window_period=4, windowed_layers=64
    ),
    "ernie4_5": GgufFamily(MODEL_ARCH.ERNIE4_5, fixed={"use_bias": False}),
    "hunyuan_v1_dense": GgufFamily(MODEL_ARCH.HUNYUAN_DENSE),
    "glm4": GgufFamily(MODEL_ARCH.GLM4, rope_dimensions=True),
    "cohere2": GgufFamily(
        MODEL_ARCH.COHERE2,
        sliding_window=True,
        window_period=4,
        rope_dimensions=True,
        scaled_rope=False,
        settings={"logit_scale": "logit_scale"},
        fixed={"tie_word_embeddings": True, "attention_bias": False},
    ),
    "starcoder2": GgufFamily(MODEL_ARCH.STARCODER2, activation=TANH_GELU, fixed={"use_bias": True}),
    "apertus": GgufFamily(
        MODEL_ARCH.APERTUS,
        activation="xielu",
        rope_dimensions=True,
        rope_tensors=True,
        arrays={f".act_fn.{name}": f"xielu_{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    "phi": GgufFamily(MODEL_ARCH.PHI2, activation="gelu_new", rope_dimensions=True, fixed={"qk_layernorm": False}),
    "stablelm": GgufFamily(
        MODEL_ARCH.STABLELM,
        rope_dimensions=True,
        settings={"use_parallel_residual": "parallel_residual"},
        fixed={"qk_layernorm": False},
    ),
    "mixtral": GgufFamily(MODEL_ARCH.LLAMA, **_LLAMA),
    "olmoe": GgufFamily(MODEL_ARCH.OLMOE, fixed={"clip_qkv": None, "norm_topk_prob": False, "attention_bias": False}),
    "qwen2_moe": GgufFamily(
        MODEL_ARCH.QWEN2MOE,
        settings=_EXPERT_WIDTHS,
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3_moe": GgufFamily(
        MODEL_ARCH.QWEN3MOE,
        settings=_EXPERT_WIDTHS,
        fixed=_ALL_ROUTED,
    ),
    "qwen3_next": GgufFamily(
        MODEL_ARCH.QWEN3NEXT,
        settings=_EXPERT_WIDTHS | _LINEAR_SIZES,
        fixed=_ALL_ROUTED,
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
        settings=_EXPERT_WIDTHS | _LINEAR_SIZES,
        splits={"experts.gate_up_proj": Split(_GATE_UP)},
        changes=_TILED_HEADS,
        **_LINEAR_ATTENTION,
    ),
    "lfm2": GgufFamily(
        MODEL_ARCH.LFM2,
        state_layers="conv",
        settings={"conv_L_cache": "shortconv_l_cache"},
        changes={".conv.conv.weight": ("flat_kernel",)},
        fixed={"conv_bias": False},
    ),
    "granitemoe": GgufFamily(
        MODEL_ARCH.GRANITE_MOE,
        permuted_heads=True,
        rope_dimensions=True,
        splits=_SHARED_EXPERT_SPLITS,
        fixed={"head_dim": None},
        settings=_GRANITE_SCALES | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
    ),
    "gpt_oss": GgufFamily(
        MODEL_ARCH.GPT_OSS,
        sliding_window=True,
        window_period=2,
        splits={
            "experts.gate_up_proj": Split(_GATE_UP, transposed=True, interleaved=True),
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
            "experts.gate_up_proj": Split(_GATE_UP, transposed=True),
            "experts.down_proj": Split(("experts.down_proj.weight",), transposed=True),
        },
        settings={
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "intermediate_size": "expert_feed_forward_length",
        },
    ),
    "glm4_moe": GgufFamily(
        MODEL_ARCH.GLM4_MOE,
        rope_dimensions=True,
        settings=_ROUTED,
        constants={"expert_gating_func": ExpertGatingFuncType.SIGMOID},
    ),
    "deepseek_v2": GgufFamily(
        MODEL_ARCH.DEEPSEEK2,
        constants={"expert_gating_func": ExpertGatingFuncType.SOFTMAX},
        fixed={"topk_method": "greedy", "norm_topk_prob": False},
        **_LATENT,
    ),
    "deepseek_v3": GgufFamily(
        MODEL_ARCH.DEEPSEEK2, constants={"expert_gating_func": ExpertGatingFuncType.SIGMOID}, **_LATENT
    ),
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, fixed={"tie_word_embeddings": True}, **_GEMMA),
    "gemma2": GgufFamily(MODEL_ARCH.GEMMA2, sliding_window=True, fixed_scale_layers=46, window_period=2, **_GEMMA),
    "gemma3_text": GgufFamily(MODEL_ARCH.GEMMA3, sliding_window=True, fixed_scale_layers=62, window_period=6, **_GEMMA),
    "gemma4_text": GgufFamily(
        MODEL_ARCH.GEMMA4,
        activation=TANH_GELU,
        window_pattern=True,
        rope_tensors=True,
        layer_sizes=True,
        tokenizer="gemma4",
        settings={"moe_intermediate_size": "expert_feed_forward_length"},
        fixed={"attention_bias": False},
    ),
    "phi3": GgufFamily(
        MODEL_ARCH.PHI3,
        sliding_window=True,
        rope_dimensions=True,
        rope_tensors=True,
        names_longrope=False,
        original_context=True,
    ),
}
"""By `model_type` of config.json."""


def find_family(config: Mapping[str, Any]) -> GgufFamily:
    """Find the family of a full config.

    Raises UnsupportedArchitectureError if there is none, or if a setting has no equal in llama.cpp.
    """
    model_type = config.get("model_type")
    family = GGUF_FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} in config.json has no GGUF conversion: use {', '.join(GGUF_FAMILIES)}, "
            "or export without GGUF"
        )

    check_settings(family, config)
    return family


def is_read_back(config: Mapping[str, Any]) -> bool:
    """True if a GGUF file of this model can be read back as the tensors that it was made from, and so be judged.

    Apertus has numbers of its layers as metadata, where they are not read.
    """
    family = GGUF_FAMILIES.get(str(config.get("model_type")))
    return family is not None and not family.arrays
