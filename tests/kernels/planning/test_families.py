"""Every row of the kernels' families is complete and true: its classes exist in transformers, a small model of it can
be fused, and fused layers compute what transformers computes, packed and unpacked. A row that is wrong is noticed."""

import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.layers.blocks import tiled_mlp
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.layer_check import why_not_fused
from finetune_kernels.planning import families
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import FAMILIES
from finetune_kernels.planning.family import AFTER_BOTH, Family
from finetune_kernels.planning.family_parts import Latent, Mixer, Mixture
from finetune_kernels.planning.fused_support import REASONS, why_not_described
from finetune_test_kernels.family_settings import (
    FUSED_FAMILIES,
    YARN,
    documents_pass,
    family_config,
    family_model,
    rows_pass,
)
from finetune_test_kernels.small_layers import small_model
from finetune_test_kernels.tensor_checks import DEVICE, largest_error

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_gpu_layers.py")
TOLERANCE = 2e-4  # fp32, as in test_fused_layers.py
DOCUMENTS = (7, 2, 5)
"""Longer than windows, and than the length at which Ministral 3 begins to scale its queries."""
ROWS = {family.prefix: family for family in FAMILIES}
Results = dict[str, torch.Tensor]


def gaps(family: Family, **changes: Any) -> list[str]:
    """Lists what the row lacks or says wrongly; empty for a good one."""
    if family.model_type not in CONFIG_MAPPING:
        return [f"transformers has no {family.model_type}"]
    try:
        model = family_model(family, **changes)
    except ValueError as error:  # peft finds no layer of such a name
        return [str(error)]
    causal = model.get_base_model()

    names = vars(sys.modules[type(causal).__module__]) | {"LayerNorm": torch.nn.LayerNorm}
    is_dense = family.mixture is None or family.mixture.shared is not None
    classes = (family.architecture, family.norm, family.attention, *[family.mlp] * is_dense)
    found = [f"transformers has no {name}" for name in classes if name not in names]
    if family.scales_embedding != (type(causal.get_input_embeddings()) is not torch.nn.Embedding):
        found.append("scales_embedding")
    if family.head_bias != (causal.get_output_embeddings().bias is not None):
        found.append("head_bias")
    if found:
        return found
    return [reason] if (reason := why_not_fused(causal)) else differences(family.model_type, model)


def differences(model_type: str, model: Any) -> list[str]:
    """Says by how much fused layers differ from transformers' own; empty if by no more than rounding."""
    whole, rows = expected(model_type)
    causal = model.get_base_model()
    fused = FusedLayers(
        causal, [ActivationPolicy.SAVE_ALL] * len(causal.model.layers), torch.float32, keep_dequantized=True
    )

    errors = {"rows": largest_error(rows_pass(model, 2, 5), rows)}
    for policy in ActivationPolicy:
        fused.set_policies([policy] * len(fused.layers))
        errors[policy] = largest_error(documents_pass(model, DOCUMENTS, packed=True), whole)
    return [
        f"computes something else, {name}: error {error:.0e}" for name, error in errors.items() if error > TOLERANCE
    ]


@cache
def expected(model_type: str) -> tuple[Results, Results]:
    """The results of transformers, of documents one by one and of rows."""
    model = family_model(next(family for family in FAMILIES if family.model_type == model_type))
    whole, rows = documents_pass(model, DOCUMENTS, packed=False), rows_pass(model, 2, 5)
    for results in (whole, rows):
        assert all(value.abs().max() > 0 for value in results.values())
    return whole, rows


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("family", FUSED_FAMILIES, ids=lambda family: family.prefix)
def test_a_row_lacks_nothing(family: Family) -> None:
    assert gaps(family) == []


LATENT = Latent()
FALCON = ROWS["FalconH1"].factors
MUTANTS: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"model_type": "llama9"}, "transformers has no llama9"),
    ("Llama", {"head_norms": ("q_norm", "k_norm")}, "LlamaDecoderLayer has no self_attn.q_norm"),
    ("Llama", {"attention_inputs": ("qkv_proj",)}, "LlamaDecoderLayer has no self_attn.qkv_proj"),
    ("Llama", {"pre_norms": ("input_layernorm",)}, "post_attention_layernorm is a norm that other Llama"),
    ("Llama", {"rope": "pairs"}, "computes something else"),
    ("Llama", {"norm_kind": "layer"}, "transformers has no LlamaLayerNorm"),
    ("Mistral", {"window": "none"}, "computes something else"),
    ("Ministral", {"window": "model"}, "computes something else"),
    ("Ministral3", {"scales_queries": False}, "computes something else"),
    ("Qwen3", {"head_norms": ()}, "self_attn.q_norm is a norm that other Qwen3 models do not have"),
    ("Qwen3", {"head_norm_place": "rotated head"}, "computes something else"),
    ("SmolLM3", {"rope_layers": "all"}, "computes something else"),
    ("Arcee", {"gated": True}, "activation relu2, not silu"),
    ("Cwm", {"window": "none"}, "computes something else"),
    ("Helium", {"rope": "halves"}, "computes something else"),
    ("Jais2", {"norm_kind": "rms"}, "transformers has no Jais2RMSNorm"),
    ("Mellum", {"window": "none"}, "computes something else"),
    ("VaultGemma", {"caps_scores": False}, "computes something else"),
    ("VaultGemma", {"norm_offset": 0.0}, "computes something else"),
    ("Ernie4_5", {"rope": "halves"}, "computes something else"),
    ("HunYuanDenseV1", {"head_norm_place": "head"}, "computes something else"),
    ("Apertus", {"pre_norms": ("feedforward_layernorm", "attention_layernorm")}, "computes something else"),
    ("Granite", {"factors": ()}, "embedding_multiplier = 1.7 in the configuration, a factor that"),
    (
        "Granite",
        {"factors": ("embedding_multiplier", "attention_multiplier", "logits_scaling")},
        "residual_multiplier = ",
    ),
    ("GraniteMoeHybrid", {"mlp_name": "mlp"}, "GraniteMoeHybridDecoderLayer has no mlp"),
    ("GraniteMoeHybrid", {"mixer": None}, "layers of type linear_attention"),
    ("Qwen3_5", {"norm_offset": 0.0}, "computes something else"),
    ("Qwen3_5", {"gates_heads": False}, "288 outputs for q, k and v, not 192"),
    ("Qwen3_5", {"head_norms": ()}, "self_attn.q_norm is a norm that other Qwen3_5 models do not have"),
    ("Qwen3_5", {"mixer": Mixer("linear_attn", "ShortConv", packages=())}, "linear_attn is Qwen3_5GatedDeltaNet, not"),
    ("Qwen3Next", {"norm_offset": 0.0}, "computes something else"),
    ("Mixtral", {"window": "none"}, "computes something else"),
    ("Qwen3Moe", {"head_norms": ()}, "self_attn.q_norm is a norm that other Qwen3Moe models do not have"),
    ("Olmoe", {"head_norm_place": "head"}, "self_attn.q_norm has 64 weights, not 16"),
    ("GptOss", {"has_sinks": False}, "self_attn is a module that other GptOss models do not have"),
    ("GptOss", {"window": "none"}, "computes something else"),
    ("GptOss", {"rope": "halves"}, "computes something else"),
    ("GraniteMoe", {"factors": ()}, "embedding_multiplier = 1.7 in the configuration"),
    ("Qwen3_5Moe", {"mixture": None}, "4 experts a layer"),
    ("Qwen3_5Moe", {"mixture": Mixture(shared=None)}, "mlp.shared_expert.gate_proj.base_layer is a module"),
    ("Qwen3_5Moe", {"mixture": Mixture(shared_gate=None)}, "mlp.shared_expert_gate.base_layer is a module"),
    ("Qwen3_5Moe", {"mixture": Mixture(router="mlp.shared_expert")}, "mlp.gate is a module that other Qwen3_5Moe"),
    ("Qwen2Moe", {"window": "none"}, "computes something else"),
    ("Glm4Moe", {"head_norm_option": "attention_dropout"}, "use_qk_norm in the configuration: a LayerNorm"),
    ("Dots1", {"mixture": Mixture(kind="MoE", shared=None, shared_gate=None)}, "mlp.shared_experts.gate_proj.base_l"),
    ("Ernie4_5_Moe", {"rope": "halves"}, "computes something else"),
    ("ExaoneMoe", {"rope_layers": "all"}, "computes something else"),
    ("MiniMaxM2", {"head_norm_place": "head"}, "self_attn.q_norm has 96 weights, not 24"),
    ("SolarOpen", {"mixture": ROWS["ExaoneMoe"].mixture}, "mlp is SolarOpenMoE, not SolarOpenSparseMoEBlock"),
    ("GraniteMoeShared", {"mixture": ROWS["GraniteMoe"].mixture}, "shared_mlp.input_linear.base_layer is a module"),
    ("HunYuanMoEV1", {"head_norm_place": "head"}, "computes something else"),
    ("Lfm2Moe", {"mixture": ROWS["Dots1"].mixture}, "layer 1 has an MLP, unlike what the"),
    ("Youtu", {"latent": None}, "self_attn.q_a_layernorm is a norm that other Youtu models do not have"),
    ("Youtu", {"latent": replace(LATENT, rope_option=None)}, "computes something else"),
    ("DeepseekV2", {"rope": "halves"}, "computes something else"),
    ("DeepseekV3", {"latent": replace(LATENT, norms=LATENT.norms[::-1])}, "self_attn.kv_a_layernorm has 12 weights"),
    ("DeepseekV3", {"attention_inputs": LATENT.widening}, "self_attn.q_a_proj is a module that other"),
    ("Glm4MoeLite", {"mixture": ROWS["DeepseekV2"].mixture}, "mlp is Glm4MoeLiteMoE, not Glm4MoeLiteMoe"),
    ("Lfm2", {"mlp_inputs": ("w3", "w1")}, "computes something else"),
    ("Lfm2", {"pre_norms": ("ffn_norm", "operator_norm")}, "computes something else"),
    ("Lfm2", {"activation": None}, "activation None, not silu"),
    ("NemotronH", {"attention_name": "self_attn"}, "NemotronHBlock has no self_attn"),
    ("NemotronH", {"block": None}, "layers of type mlp"),
    ("NemotronH", {"norm_offset": 1.0}, "computes something else"),
    ("Bamba", {"pre_norms": ("pre_ff_layernorm", "input_layernorm")}, "computes something else"),
    ("FalconH1", {"factors": FALCON[:-2]}, "mlp_multipliers = [0.6, 1.3] in the configuration"),
    ("FalconH1", {"factors": FALCON[:-1]}, "ssm_out_multiplier = 0.9 in the configuration"),
    ("Gemma", {"norm_offset": 0.0}, "computes something else"),
    ("Gemma", {"scales_embedding": False}, "scales_embedding"),
    ("Gemma2", {"post_norms": ()}, "post_attention_layernorm is a norm that other Gemma2"),
    ("Gemma2", {"caps_scores": False}, "computes something else"),
    ("Gemma2", {"activation_field": "hidden_act"}, "activation None"),
    ("Gemma3", {"window": "none"}, "computes something else"),
    ("Gemma3", {"norm_offset": 0.0}, "computes something else"),
    ("Gemma4", {"window": "none"}, "computes something else"),
    ("Gemma4", {"value_norm": None}, "computes something else"),
    ("Gemma4", {"layer_scalar": None}, "Gemma4TextDecoderLayer is a module that other Gemma4"),
    ("Gemma4", {"layer_input": None}, "per_layer_input_gate is a module that other Gemma4"),
    ("Gemma4", {"part_prefix": None}, "transformers has no Gemma4Attention"),
    ("Olmo2", {"head_norm_place": "head"}, "self_attn.q_norm has 64 weights, not 16"),
    ("Olmo2", {"pre_norms": AFTER_BOTH, "post_norms": ()}, "computes something else"),
    ("Olmo3", {"window": "none"}, "computes something else"),
    ("Exaone4", {"window": "layer"}, "computes something else"),
    ("Exaone4", {"rope_layers": "all"}, "computes something else"),
    ("Glm4", {"post_norms": ("post_mlp_layernorm", "post_self_attn_layernorm")}, "computes something else"),
    ("Cohere", {"rope": "pairs"}, "computes something else"),
    ("Cohere", {"norm_kind": "rms"}, "transformers has no CohereRMSNorm"),
    ("Cohere2", {"rope_layers": "all"}, "computes something else"),
    ("Cohere2", {"factors": ()}, "logit_scale = 0.3 in the configuration"),
    ("StableLm", {"rope": "pairs"}, "computes something else"),
    ("Starcoder2", {"window": "none"}, "computes something else"),
    ("Phi", {"pre_norms": ("input_layernorm",) * 2}, "computes something else"),
    ("Phi", {"head_bias": False}, "head_bias"),
]


def test_rows_that_have_no_wrong_one_beside_them_are_like_others() -> None:
    alike = {"Qwen2", "Phi3", "SeedOss", "Glm"}
    assert {family.prefix for family in FUSED_FAMILIES} - {prefix for prefix, _, _ in MUTANTS} == alike


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("prefix", ["Olmo2", "Cohere2", "Arcee", "Glm4", "Granite", "Starcoder2", "Phi", "Qwen3_5"])
@pytest.mark.parametrize("policy", [ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.OFFLOAD])
def test_tiles_change_nothing(prefix: str, policy: ActivationPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_mlp, "TILE_ROWS", 4)
    model = family_model(ROWS[prefix])
    causal = model.get_base_model()
    fused = FusedLayers(causal, [policy] * len(causal.model.layers), torch.float32, keep_dequantized=False)
    assert fused.layers[0].is_tiled(sum(DOCUMENTS))
    found = documents_pass(model, DOCUMENTS, packed=True)
    assert largest_error(found, expected(ROWS[prefix].model_type)[0]) < TOLERANCE


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize(("prefix", "change", "gap"), MUTANTS, ids=str)
def test_a_wrong_row_is_noticed(prefix: str, change: dict[str, Any], gap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(ROWS[prefix], **change)
    monkeypatch.setattr(families, "FAMILIES", (wrong,))
    assert any(gap in found for found in gaps(wrong))


GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
CONFIGURATIONS: list[tuple[str, dict[str, Any], str | None]] = [
    ("stablelm", {"use_parallel_residual": True}, None),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm in the configuration: a LayerNorm of q and k"),
    ("cohere", {"use_qk_norm": True}, "use_qk_norm in the configuration: a LayerNorm of q and k"),
    ("granitemoehybrid", {"position_embedding_type": None}, None),
    ("granitemoehybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}, None),
    ("granitemoehybrid", {"layer_types": ["full_attention"] * 2}, None),
    ("granitemoehybrid", {"layer_types": ["linear_attention"] * 2}, None),
    ("qwen3_5_text", {"layer_types": ["full_attention", "conv"]}, "layers of type conv"),
    ("qwen3_next", {"mlp_only_layers": [0], "num_experts_per_tok": 2, "moe_intermediate_size": 16}, None),
    ("qwen3_next", {"mlp_only_layers": [], "num_experts_per_tok": 2, "moe_intermediate_size": 16}, None),
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, None),
    ("glm4_moe", {"use_qk_norm": False, "n_group": 1}, None),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_interval": 2}, None),
    ("deepseek_v2", {"q_lora_rank": 20, "topk_method": "greedy", "first_k_dense_replace": 0}, None),
    ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None, "rope_parameters": YARN}, None),
    ("deepseek_v3", {"v_head_dim": 32}, "heads of 32 values, more than the 24 elements of q and k"),
    ("granitemoeshared", {"shared_intermediate_size": 0}, None),
    ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 in the configuration: noise before"),
    ("lfm2_moe", {"use_expert_bias": False, "num_dense_layers": 0}, None),
    ("qwen3_5_moe_text", {"output_router_logits": True}, "output_router_logits in the configuration: the load-"),
    ("nemotron_h", {"layers_block_type": ["mlp", "full_attention"], "mlp_bias": True, "use_bias": True}, None),
    ("nemotron_h", {"moe_latent_size": 16}, "moe_latent_size = 16 in the configuration: a projection around"),
    ("falcon_h1", {"mamba_rms_norm": False}, None),
    ("falcon_h1", {"attention_bias": True}, "attention_bias in the configuration: biases beside factors"),
    ("lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 8}, None),
    ("seed_oss", {"residual_dropout": 0.1}, "residual_dropout = 0.1 in the configuration: dropout in the base model"),
    ("starcoder2", {"hidden_act": "gelu"}, "activation gelu, not "),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}, None),
    ("arcee", {"hidden_act": "silu"}, None),
    ("llama", {"head_dim": 520}, "heads of 520 elements, not of a multiple of 8 up to 512"),
    ("gemma2", {"head_dim": 264}, "heads of 264 elements, not of a multiple of 8 up to 256"),
    ("gemma4_text", {"use_bidirectional_attention": "vision"}, None),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "attention in both directions"),
    ("gemma4_text", GEMMA4_EXPERTS, None),
    ("gemma4_text", GEMMA4_EXPERTS | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}, None),
    ("gemma4_text", GEMMA4_EXPERTS | {"output_router_logits": True}, "output_router_logits in the configuration"),
]


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize(("model_type", "change", "reason"), CONFIGURATIONS, ids=str)
def test_preflight_and_the_builder_give_one_answer(model_type: str, change: dict[str, Any], reason: str | None) -> None:
    family = next(family for family in FAMILIES if family.model_type == model_type)
    config = CONFIG_MAPPING[model_type](**family_config(model_type, **change))
    said = why_not_described(config)
    assert (said is None) if reason is None else (said is not None and said.startswith(reason)), said

    model = family_model(family, **change) if reason is None else None
    if model is not None:
        whole = documents_pass(model, DOCUMENTS, packed=False)
        causal = model.get_base_model()
        assert why_not_fused(causal) is None
        FusedLayers(causal, [ActivationPolicy.SAVE_ALL] * 2, torch.float32, keep_dequantized=True)
        assert largest_error(documents_pass(model, DOCUMENTS, packed=True), whole) < TOLERANCE


def test_a_row_whose_experts_have_a_norm_behind_them_is_none() -> None:
    row = next(family for family in FAMILIES if family.mixture is not None)
    with pytest.raises(ValueError, match=f"{row.model_type}: the output of experts has no norm"):
        replace(row, post_norms=AFTER_BOTH)


def test_families_that_were_left_say_why() -> None:
    for model_type, reason in REASONS.items():
        assert why_not_described(CONFIG_MAPPING[model_type]()) == reason
    assert why_not_described(CONFIG_MAPPING["gpt2"]()) == "the kernels do not know the layers of model type gpt2"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("input_layernorm", "input_layernorm is Renamed, not LlamaRMSNorm"),
        ("mlp", "mlp is Renamed, not LlamaMLP"),
        ("self_attn", "self_attn is Renamed, not LlamaAttention"),
    ],
)
def test_a_layer_that_passes_the_check_can_be_built(place: str, reason: str) -> None:
    """A norm class under another name once passed `why_not_fused` and was a KeyError in the builder."""
    causal = small_model("llama", torch.float32).get_base_model()
    assert why_not_fused(causal) is None
    part = getattr(causal.model.layers[0], place)
    part.__class__ = type("Renamed", (type(part),), {})
    assert why_not_fused(causal) == reason


def test_a_part_that_the_row_does_not_name_is_a_reason() -> None:
    causal = small_model("llama", torch.float32).get_base_model()
    attention = causal.model.layers[0].self_attn
    attention.sinks = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    assert why_not_fused(causal) == "self_attn is a module that other Llama models do not have"
    del attention.sinks
    causal.model.layers[0].extra = torch.nn.Dropout(0.1)
    assert why_not_fused(causal) == "extra drops activations of the base model"
