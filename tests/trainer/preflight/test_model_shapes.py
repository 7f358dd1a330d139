"""The shape that preflight reads from a configuration is that of the model itself, for every fused family."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.spec.training import DEFAULT_TARGETS, AdapterSpec
from finetune_kernels.planning.described_shape import shape_from_config
from finetune_kernels.planning.fused_support import fused_families
from finetune_kernels.planning.loaded_weights import loaded_bytes
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.training.memory.loaded_shape import model_shape

LAYERS = ["linear_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "shared_intermediate_size": 512, "num_local_experts": 0, "layer_types": LAYERS, "mamba_n_heads": 8,
        "mamba_d_head": 64,
    },
    "qwen3_5_text": {"layer_types": LAYERS},
    "falcon_h1": {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 64},
    "nemotron_h": {
        "layers_block_type": [*LAYERS, "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 16,
        "n_groups": 2,
    },
}  # fmt: skip
"""What a family's configuration needs besides; hybrids have a layer of each kind."""
OPTIONS: list[dict[str, Any]] = [{}, {"dropout": 0.1}, {"variant": "DoRA"}]
PARTS, ALL = ("q_proj", "down_proj"), ("all-linear",)
FIRST = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
SHAPES = [(family, targets, options) for family in FIRST for targets in (PARTS, ALL) for options in OPTIONS]
# Planned from the files: test_mixture_gpu.py.
MIXTURES = ("qwen3_5_moe_text", "qwen3_next", "mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
MIXTURES += ("qwen2_moe", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "lfm2_moe", "solar_open", "exaone_moe")
MIXTURES += ("minimax_m2", "granitemoeshared", "mellum", "deepseek_v2", "deepseek_v3", "glm4_moe_lite")
SHAPES += [(family, ALL, {}) for family in fused_families() if family not in (*FIRST, *MIXTURES)]
SHAPES += [(hybrid, DEFAULT_TARGETS, {}) for hybrid in OWN]


@pytest.mark.parametrize(("family", "targets", "options"), SHAPES, ids=str)
def test_the_shape_is_that_of_the_model_itself(family: str, targets: tuple[str, ...], options: dict[str, Any]) -> None:
    config = AutoConfig.for_model(
        family,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        head_dim=64,
        pad_token_id=0,
        **OWN.get(family, {}),
    )
    adapter = AdapterSpec.model_validate({"rank": 4, "targetModules": list(targets)} | options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapted = inject_adapter(model, adapter, seed=0)
    whole = model_shape(adapted.model)
    extra = {"dropout": "dropout" in options, "magnitudes": "variant" in options}
    assert shape_from_config(config, targets, 4, quantized=False, **extra) == whole
    base = loaded_bytes(config, whole, double_quantized=True)
    weights = sum(parameter.numel() for parameter in adapted.model.parameters() if not parameter.requires_grad)
    assert base == pytest.approx(2 * weights + 4 * whole.adapter_parameters, rel=0.01)  # biases and more norms
