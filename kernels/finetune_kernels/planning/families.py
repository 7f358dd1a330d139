"""The model families of transformers that the kernels know, one `Family` row each.

To add a family, add a row: the layer builder, patching, packed attention, the loss, the memory plan and preflight all
ask it, and `test_families.py` builds a small model of every row and compares it with transformers. The table imports no
torch, as preflight reads it before a GPU is asked for.
"""

from dataclasses import replace
from typing import Any

from finetune_kernels.planning.family import AFTER_BOTH, Family
from finetune_kernels.planning.family_parts import BranchNorms, Latent, LayerInput, Mixer, Mixture

_AROUND_MLP = ("input_layernorm", "pre_feedforward_layernorm")
_GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_NORMED_QK = ("q_norm", "k_norm")
_SHARED_EXPERTS = Mixture(kind="MoE", shared="mlp.shared_experts", shared_gate=None)
_LATENT: dict[str, Any] = {
    "attention_inputs": ("q_a_proj", "kv_a_proj_with_mqa"), "rope": "pairs", "latent": Latent(),
}  # fmt: skip
_ALONE = Mixture(shared=None, shared_gate=None)
_GRANITE_EXPERTS = replace(_ALONE, block="block_sparse_moe", kind="MoE", router="block_sparse_moe.router")
_BESIDE_MLP = Mixture(
    block="", router="router", shared="mlp", shared_gate=None, option="enable_moe_block", branch_norms=BranchNorms(
        "post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2",
    ),
)  # fmt: skip
_SHORT_CONVOLUTION = Mixer("conv", "ShortConv", packages=("causal_conv1d",), layer_type="conv")
_FALCON = (
    "embedding_multiplier", "lm_head_multiplier", "attention_in_multiplier", "attention_out_multiplier",
    "key_multiplier", "mlp_multipliers", "ssm_out_multiplier",
)  # fmt: skip
_DELTA_NET = Mixer("linear_attn", "GatedDeltaNet", packages=("fla",))

FAMILIES = (
    # Llama and what differs from it by little.
    Family("Llama", "llama"),
    Family("Mistral", "mistral", window="model"),
    Family("Ministral", "ministral", window="layer"),
    Family("Ministral3", "ministral3", window="model", scales_queries=True),
    Family("Qwen2", "qwen2", window="layer"),
    Family("Qwen3", "qwen3", window="layer", head_norms=_NORMED_QK),
    Family(
        "Phi3", "phi3", window="model", attention_inputs=("qkv_proj",), mlp_inputs=("gate_up_proj",),
    ),
    Family("SmolLM3", "smollm3", window="layer", rope_layers="use_rope"),
    Family("SeedOss", "seed_oss"),
    Family("Arcee", "arcee", mlp_inputs=("up_proj",), gated=False),
    Family("Ernie4_5", "ernie4_5", rope="pairs"),
    Family(
        "HunYuanDenseV1", "hunyuan_v1_dense", head_norms=("query_layernorm", "key_layernorm"),
        head_norm_place="rotated head",
    ),
    Family("Cwm", "cwm", window="layer"),
    Family("Helium", "helium", rope="pairs"),
    Family(
        "Apertus", "apertus", pre_norms=("attention_layernorm", "feedforward_layernorm"), head_norms=_NORMED_QK,
        mlp_inputs=("up_proj",), gated=False,
    ),
    # Factors.
    Family("Granite", "granite", factors=_GRANITE),
    Family(
        "GraniteMoeHybrid", "granitemoehybrid", mlp_name="shared_mlp", mlp_inputs=("input_linear",),
        mlp_output="output_linear", feed_forward_field="shared_intermediate_size", factors=_GRANITE,
        mixer=Mixer("mamba", "MambaLayer", packages=("mamba_ssm", "causal_conv1d"), barred=("out_proj",)),
        mixture=replace(_GRANITE_EXPERTS, shared="shared_mlp"),
    ),
    # Mixtures of experts.
    Family("Mixtral", "mixtral", window="model", mixture=_ALONE),
    Family("Qwen3Moe", "qwen3_moe", window="layer", head_norms=_NORMED_QK, mixture=_ALONE),
    Family("Mellum", "mellum", window="layer", head_norms=_NORMED_QK, mixture=_ALONE),
    Family("Olmoe", "olmoe", head_norms=_NORMED_QK, head_norm_place="row", mixture=_ALONE),
    Family(
        "GptOss", "gpt_oss", window="layer", rope="halves once", has_sinks=True,
        mixture=replace(_ALONE, kind="MLP", router="mlp.router"),
    ),
    Family("GraniteMoe", "granitemoe", factors=_GRANITE, mixture=_GRANITE_EXPERTS),
    Family("Qwen2Moe", "qwen2_moe", window="layer type", mixture=Mixture()),
    Family(
        "Glm4Moe", "glm4_moe", head_norms=_NORMED_QK, head_norm_option="use_qk_norm", mixture=_SHARED_EXPERTS,
    ),
    Family("Dots1", "dots1", head_norms=_NORMED_QK, window="layer", mixture=_SHARED_EXPERTS),
    Family(
        "Ernie4_5_Moe", "ernie4_5_moe", rope="pairs",
        mixture=replace(_SHARED_EXPERTS, kind="SparseMoeBlock", shared_option="moe_num_shared_experts"),
    ),
    Family("SolarOpen", "solar_open", mixture=_SHARED_EXPERTS),
    Family(
        "ExaoneMoe", "exaone_moe", head_norms=_NORMED_QK, window="layer type", rope_layers="windowed if any",
        mixture=replace(_SHARED_EXPERTS, kind="SparseMoEBlock"),
    ),
    Family("MiniMaxM2", "minimax_m2", head_norms=_NORMED_QK, head_norm_place="row", mixture=_ALONE),
    Family(
        "HunYuanMoEV1", "hunyuan_v1_moe", head_norms=("query_layernorm", "key_layernorm"),
        head_norm_place="rotated head", mixture=Mixture(kind="Moe", shared="mlp.shared_mlp", shared_gate=None),
    ),
    Family(
        "GraniteMoeShared", "granitemoeshared", mlp_name="shared_mlp", mlp_inputs=("input_linear",),
        mlp_output="output_linear", feed_forward_field="shared_intermediate_size", factors=_GRANITE,
        mixture=replace(_GRANITE_EXPERTS, shared="shared_mlp", shared_option="shared_intermediate_size"),
    ),
    # Latent attention.
    Family("Youtu", "youtu", **_LATENT),
    Family(
        "DeepseekV2", "deepseek_v2", **_LATENT | {"latent": Latent(rope_option=None)},
        mixture=replace(_SHARED_EXPERTS, kind="Moe"),
    ),
    Family("DeepseekV3", "deepseek_v3", **_LATENT, mixture=_SHARED_EXPERTS),
    Family("Glm4MoeLite", "glm4_moe_lite", **_LATENT, mixture=_SHARED_EXPERTS),
    # Hybrids.
    Family(
        "Qwen3_5", "qwen3_5_text", norm_offset=1.0, head_norms=_NORMED_QK, gates_heads=True, mixer=_DELTA_NET,
    ),
    Family(
        "Qwen3Next", "qwen3_next", norm_offset=1.0, head_norms=_NORMED_QK, gates_heads=True, mixer=_DELTA_NET,
        mixture=Mixture(),
    ),
    Family(
        "Lfm2", "lfm2", pre_norms=("operator_norm", "ffn_norm"), attention_output="out_proj",
        head_norms=("q_layernorm", "k_layernorm"), mlp_name="feed_forward", mlp_inputs=("w1", "w3"), mlp_output="w2",
        activation="silu", mixer=_SHORT_CONVOLUTION,
    ),
    Family(
        "Lfm2Moe", "lfm2_moe", pre_norms=("operator_norm", "ffn_norm"), attention_output="out_proj",
        head_norms=("q_layernorm", "k_layernorm"), mlp_name="feed_forward", mlp_inputs=("w1", "w3"), mlp_output="w2",
        activation="silu", mixer=_SHORT_CONVOLUTION,
        mixture=replace(_ALONE, block="feed_forward", router="feed_forward.gate"),
    ),
    Family(
        "Qwen3_5Moe", "qwen3_5_moe_text", norm_offset=1.0, head_norms=_NORMED_QK, gates_heads=True, mixer=_DELTA_NET,
        mixture=Mixture(),
    ),
    Family(
        "NemotronH", "nemotron_h", block="any", pre_norms=("norm",), attention_name="mixer", mlp_name="mixer",
        mlp_inputs=("up_proj",), gated=False, activation_field="mlp_hidden_act",
        mixer=Mixer("mixer", "Mamba2Mixer", packages=("mamba_ssm", "causal_conv1d"), barred=("out_proj",)),
        mixture=Mixture("mixer", "MoE", router="mixer.gate", shared="mixer.shared_experts", shared_gate=None),
    ),
    Family(
        "Bamba", "bamba", pre_norms=("input_layernorm", "pre_ff_layernorm"), mlp_name="feed_forward",
        returns_tuple=True,
        mixer=Mixer("mamba", "Mixer", packages=("mamba_ssm", "causal_conv1d"), barred=("out_proj",)),
    ),
    Family(
        "FalconH1", "falcon_h1", pre_norms=("input_layernorm", "pre_ff_layernorm"), mlp_name="feed_forward",
        factors=_FALCON, returns_tuple=True, mixer=Mixer(
            "mamba", "Mixer", packages=("mamba_ssm", "causal_conv1d"), layer_type="hybrid", barred=("out_proj",),
            beside_attention=True,
        ),
    ),
    # Norms around zero, norms after the blocks.
    Family("Gemma", "gemma", norm_offset=1.0, scales_embedding=True, overflows_fp16=True),
    Family(
        "Gemma2", "gemma2", norm_offset=1.0, window="layer", activation_field="hidden_activation",
        pre_norms=_AROUND_MLP, post_norms=AFTER_BOTH, caps_scores=True,
        scales_embedding=True, overflows_fp16=True,
    ),
    Family(
        "VaultGemma", "vaultgemma", norm_offset=1.0, window="layer", activation_field="hidden_activation",
        pre_norms=_AROUND_MLP, caps_scores=True, scales_embedding=True, overflows_fp16=True,
    ),
    Family(
        "Gemma3", "gemma3_text", norm_offset=1.0, window="layer", activation_field="hidden_activation",
        pre_norms=_AROUND_MLP, post_norms=AFTER_BOTH, head_norms=_NORMED_QK,
        scales_embedding=True, overflows_fp16=True,
    ),
    Family(
        "Gemma4", "gemma4_text", part_prefix="Gemma4Text", layers_differ=True, window="layer",
        activation_field="hidden_activation", pre_norms=_AROUND_MLP, post_norms=AFTER_BOTH, head_norms=_NORMED_QK,
        value_norm="v_norm", layer_input=LayerInput(), layer_scalar="layer_scalar", mixture=_BESIDE_MLP,
        scales_embedding=True, overflows_fp16=True,
    ),
    Family("Olmo2", "olmo2", pre_norms=(), post_norms=AFTER_BOTH, head_norms=_NORMED_QK, head_norm_place="row"),
    Family(
        "Olmo3", "olmo3", pre_norms=(), post_norms=AFTER_BOTH, head_norms=_NORMED_QK, head_norm_place="row",
        window="layer",
    ),
    Family(
        "Exaone4", "exaone4", pre_norms=(), post_norms=AFTER_BOTH, head_norms=_NORMED_QK, window="layer type",
        rope_layers="windowed if any",
    ),
    Family("Glm", "glm", rope="pairs", mlp_inputs=("gate_up_proj",)),
    Family(
        "Glm4", "glm4", rope="pairs", post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        mlp_inputs=("gate_up_proj",),
    ),
    # LayerNorm, and both blocks side by side.
    Family(
        "Cohere", "cohere", norm_kind="layer", pre_norms=("input_layernorm",), rope="pairs in order",
        factors=("logit_scale",),
    ),
    Family(
        "Cohere2", "cohere2", norm_kind="layer", pre_norms=("input_layernorm",), rope="pairs in order",
        rope_layers="windowed", window="layer", factors=("logit_scale",),
    ),
    Family(
        "StableLm", "stablelm", norm_kind="torch layer", parallel_option="use_parallel_residual", passes_bounds=False,
    ),
    Family("Jais2", "jais2", norm_kind="torch layer", mlp_inputs=("up_proj",), gated=False),
    Family(
        "Starcoder2", "starcoder2", norm_kind="torch layer", window="model", mlp_inputs=("c_fc",), mlp_output="c_proj",
        gated=False,
    ),
    Family(
        "Phi", "phi", norm_kind="torch layer", pre_norms=("input_layernorm",), attention_output="dense",
        mlp_inputs=("fc1",), mlp_output="fc2", gated=False, head_bias=True,
    ),
)  # fmt: skip

NORM_OFFSETS = {family.norm: family.norm_offset for family in FAMILIES if family.norm_kind == "rms"}
"""RMS norm's class -> what is added to its weight."""
MLP_FAMILIES = {
    family.mlp: family
    for family in FAMILIES
    if family.gated and "mlp_multipliers" not in family.factors
    and (family.mixture is None or family.mixture.shared is not None)
}  # fmt: skip
"""Class of an MLP with a gate, and without factors of its own, in each layer of a model -> its family."""


def family_of(causal: object) -> Family | None:
    """Returns the row of a transformers model; None if the kernels do not know its architecture."""
    architecture = type(causal).__name__
    found = next((family for family in FAMILIES if family.architecture == architecture), None)
    return None if found is None else found.of(getattr(causal, "config", None))


def family_of_type(model_type: str) -> Family | None:
    """Returns the row of a text configuration's `model_type`; None if the kernels do not know it."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def family_of_config(config: Any) -> Family | None:
    """Returns the row of a text configuration; None if the kernels do not know its `model_type`."""
    found = family_of_type(str(getattr(config, "model_type", "")))
    return None if found is None else found.of(config)
