"""A small configuration of every family, in which nothing is at its default: windows shorter than documents, factors
that are not 1, biases, layers without RoPE. What is at its default a wrong row would hide.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.experts.replacing import replace_experts, stacked_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.families import FAMILIES
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.fused_support import REASONS
from finetune_test_kernels.expert_adapters import draw_router_biases, parts_of
from finetune_test_kernels.small_layers import CENTERED
from finetune_test_kernels.tensor_checks import DEVICE, normal
from finetune_trainer.stages.expert_injection import peft_without_experts

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 48, "pad_token_id": 0, "max_position_embeddings": 64, "head_dim": 24,
}  # fmt: skip
DERIVED_HEADS = (
    "granite", "granitemoehybrid", "lfm2", "phi", "phi3", "stablelm", "starcoder2", "olmo2", "olmo3", "cohere",
    "granitemoe", "mixtral", "olmoe", "qwen2_moe", "lfm2_moe", "granitemoeshared",
    "youtu", "deepseek_v2", "deepseek_v3", "glm4_moe_lite",
)  # fmt: skip
"""Families whose heads have hidden_size / heads elements."""
WINDOW = 3
SLIDING = ["sliding_attention", "full_attention"]
_WINDOWS = {"sliding_window": WINDOW, "layer_types": SLIDING}
_FACTORS = {
    "embedding_multiplier": 1.7, "residual_multiplier": 0.6, "attention_multiplier": 0.35, "logits_scaling": 1.3,
}  # fmt: skip
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "attention_bias": True,
}  # fmt: skip
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = ["linear_attention", "full_attention"]
_DELTA_NET = {
    "layer_types": HYBRID, "attention_bias": True, "rope_parameters": _PARTIAL, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 4,
    "mscale_all_dim": 1.0, "mscale": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.4,
}  # fmt: skip

OTHER_LINEARS = (
    "in_proj",
    "in_proj_qkv",
    "in_proj_qkvz",
    "in_proj_z",
    "shared_expert_gate",
    "per_layer_model_projection",
)
"""Linear layers beside those of attention and MLPs that get an adapter."""

FUSED_FAMILIES = [family for family in FAMILIES if family.model_type not in REASONS]
"""Families of whose small model the layers are fused. The rows of others serve single modules."""

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _BIASES,
    "mistral": {"sliding_window": WINDOW},
    "ministral": _WINDOWS,
    "ministral3": {"sliding_window": None, "rope_parameters": YARN},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "attention_bias": True},
    "phi3": {"sliding_window": WINDOW, "rope_parameters": _PARTIAL},
    "smollm3": _WINDOWS | _BIASES | {"use_sliding_window": True, "no_rope_layers": [1, 0]},
    "seed_oss": _BIASES | {"attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "arcee": _BIASES,
    "cwm": _WINDOWS,
    "jais2": _BIASES,
    "helium": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "mellum": _EXPERTS | _WINDOWS | {
        "attention_bias": True, "mlp_layer_types": ["dense", "sparse"], "rope_parameters": _TWO_ROPES,
    },
    "vaultgemma": {"sliding_window": WINDOW, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 32},
    "ernie4_5": {"use_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True},
    "apertus": {"attention_bias": True},
    "granite": _FACTORS | _BIASES,
    "granitemoehybrid": _FACTORS | {
        "shared_intermediate_size": 40, "intermediate_size": 8, "num_local_experts": 0, "attention_bias": True,
        "layer_types": HYBRID, "position_embedding_type": "rope", "mamba_n_heads": 4, "mamba_d_head": 32,
        "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4,
    },
    "mixtral": _LOCAL_EXPERTS | {"sliding_window": WINDOW},
    "qwen3_moe": _EXPERTS | {"use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True},
    "olmoe": _EXPERTS | {"attention_bias": True},
    "gpt_oss": _LOCAL_EXPERTS | _WINDOWS | {"attention_bias": True},
    "granitemoe": _FACTORS | _LOCAL_EXPERTS | {"attention_bias": True},
    "qwen2_moe": _EXPERTS | _WINDOWS | {
        "use_sliding_window": True, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1],
    },
    "glm4_moe": _ROUTED_EXPERTS | {"use_qk_norm": True, "attention_bias": True, "rope_parameters": _PARTIAL},
    "dots1": _ROUTED_EXPERTS | _WINDOWS | {"attention_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 1], "attention_bias": True, "use_qk_norm": True},
    "solar_open": _ROUTED_EXPERTS | {"attention_bias": True, "first_k_dense_replace": 0},
    "exaone_moe": _ROUTED_EXPERTS | _EXPERTS | _WINDOWS | {"num_shared_experts": 2},
    "minimax_m2": _LOCAL_EXPERTS | {"rotary_dim": 12},
    "granitemoeshared": _FACTORS | _LOCAL_EXPERTS | {"attention_bias": True, "shared_intermediate_size": 24},
    "youtu": _LATENT | {"rope_interleave": False},
    "deepseek_v2": _LATENT | _ROUTED_EXPERTS | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | _ROUTED_EXPERTS,
    "glm4_moe_lite": _LATENT | _ROUTED_EXPERTS | {"mlp_layer_types": ["dense", "sparse"], "v_head_dim": 24},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": _DELTA_NET | {"mlp_only_layers": [0, 1], "num_experts": 4},
    "qwen3_5_moe_text": _DELTA_NET | _EXPERTS | {"shared_expert_intermediate_size": 24},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "norm_eps": 1e-3},
    "nemotron_h": _ROUTED_EXPERTS | {
        "layers_block_type": [*HYBRID, "mlp", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
        "ssm_state_size": 8, "chunk_size": 4, "moe_shared_expert_intermediate_size": 24,
    },
    "bamba": _BIASES | {
        "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 2,
        "mamba_chunk_size": 4,
    },
    "falcon_h1": {
        "embedding_multiplier": 1.7, "lm_head_multiplier": 0.6, "attention_in_multiplier": 0.8, "key_multiplier": 0.7,
        "attention_out_multiplier": 1.4, "mlp_multipliers": [0.6, 1.3], "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.9, "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2], "mamba_d_ssm": 128,
        "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4,
        "mamba_rms_norm": True,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "norm_eps": 1e-3},
    "gemma": {"attention_bias": True},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 32},
    "gemma3_text": _WINDOWS | {"query_pre_attn_scalar": 32},
    "gemma4_text": _WINDOWS | {
        "attention_bias": True, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 48,
    },
    "olmo2": {"attention_bias": True},
    "olmo3": _WINDOWS | {"attention_bias": True, "rope_parameters": _TWO_ROPES},
    "exaone4": _WINDOWS,
    "glm": {"rope_parameters": _PARTIAL, "attention_bias": True},
    "glm4": {"rope_parameters": _PARTIAL, "attention_bias": True},
    "cohere": {"attention_bias": True, "logit_scale": 0.3},
    "cohere2": _WINDOWS | {"attention_bias": True, "logit_scale": 0.3},
    "stablelm": {"use_qkv_bias": True, "rope_parameters": _PARTIAL},
    "starcoder2": {"sliding_window": WINDOW},
    "phi": {"rope_parameters": _PARTIAL},
}  # fmt: skip
"""`model_type` -> what its configuration says beyond the common sizes."""


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a small configuration of the family."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim" or model_type not in DERIVED_HEADS}
    return sizes | SETTINGS.get(model_type, {}) | changes


def family_model(family: Family, seed: int = 0, **changes: Any) -> Any:
    """A peft model in fp32 over a small random base, with adapters on every linear layer. Every number is drawn: norms
    around what is usual, biases and adapters away from zero."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family.model_type](**family_config(family.model_type, **changes))
    base: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    has_experts = replace_experts(base) == keep_routers_in_fp32(base) > 0
    targets = {name.split(".")[-1] for name in family.linears} | set(OTHER_LINEARS)
    with warnings.catch_warnings(), peft_without_experts(has_ours=has_experts):
        warnings.simplefilter("ignore", RuntimeWarning)  # peft expects Qwen3-Next to have experts
        model: Any = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=sorted(targets)))
    known = expert_family_of_type(family.model_type)
    for _, experts in stacked_experts(model):
        assert known is not None
        experts.add_adapters(parts_of(known), rank=2, scale=1.5)
        for name, weight in experts.named_buffers():
            torch.nn.init.normal_(weight, std=0.25 if "weight" in name else 0.0)

    usual = 0.0 if family.model_type in CENTERED else 1.0
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=usual if "norm" in name and "bias" not in name else 0.0, std=0.25)
    for index, scalar in enumerate(value for name, value in model.named_buffers() if name.endswith("layer_scalar")):
        scalar.fill_(0.7 + 0.4 * index)
    return draw_router_biases(model).to(DEVICE)


def rows_pass(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Logits and gradients of adapters and inputs for `rows` documents of one length, a row each."""
    inputs, positions = _inputs(model, rows, length), torch.arange(length, device=DEVICE).expand(rows, -1)
    return _results(model, inputs, [model.get_base_model()(**inputs, position_ids=positions, use_cache=False).logits])


def documents_pass(model: Any, documents: Sequence[int], *, packed: bool) -> dict[str, torch.Tensor]:
    """The same for documents of these lengths: in one row, end to end, or each in a pass of its own."""
    causal, whole = model.get_base_model(), _inputs(model, 1, sum(documents))
    places = [torch.arange(length, device=DEVICE)[None] for length in documents]
    if not packed:
        parts = {name: torch.split(value, list(documents), dim=1) for name, value in whole.items()}
        logits = [
            causal(**{name: each[index] for name, each in parts.items()}, position_ids=at, use_cache=False).logits
            for index, at in enumerate(places)
        ]
        return _results(model, whole, logits)

    ends = torch.tensor([0, *documents], device=DEVICE).cumsum(0).to(torch.int32)
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends} | dict.fromkeys(
        ("max_length_q", "max_length_k"), max(documents)
    )
    found = causal(**whole, position_ids=torch.cat(places, dim=1), use_cache=False, **options).logits
    return _results(model, whole, [found])


def _inputs(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random embeddings of so many tokens, and the inputs that layers have of their own."""
    config, dtype = model.config, model.get_input_embeddings().weight.dtype
    found = {"inputs_embeds": normal(rows, length, config.hidden_size, seed=3, dtype=dtype)}
    if own := getattr(config, "hidden_size_per_layer_input", 0):
        found["per_layer_inputs"] = normal(rows, length, config.num_hidden_layers, own, seed=4, dtype=dtype)
    return {name: value.requires_grad_() for name, value in found.items()}


def _results(model: Any, inputs: dict[str, torch.Tensor], logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    whole = torch.cat(logits, dim=1)
    found = torch.autograd.grad(whole, [*inputs.values(), *weights.values()], normal(*whole.shape, dtype=whole.dtype))
    return dict(zip([*inputs, *weights], found, strict=True)) | {"logits": whole.detach()}
