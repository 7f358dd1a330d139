"""Shapes of models whose layers differ, or that have no attention: every model that trains on a GPU is planned."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.described_shape import shape_from_config
from finetune_kernels.planning.loaded_weights import let_stream, loaded_bytes
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape
from finetune_kernels.planning.streamed_weights import streamed_bytes, window_bytes


@pytest.mark.parametrize(
    ("model_type", "heads", "key_value_heads", "size"),
    [
        ("gemma4_text", 8, 4, 512),  # 256 in layers with windows
        ("dots3_note_text", 128, 128, 256),  # 64 heads in some layers
        ("mamba", 1, 1, 768),
        ("falcon_mamba", 1, 1, 768),
        ("rwkv", 1, 1, 4096),
    ],
)
def test_what_differs_between_layers_is_planned_by_its_largest(
    model_type: str, heads: int, key_value_heads: int, size: int
) -> None:
    shape = build_shape(CONFIG_MAPPING[model_type](), ParameterCounts(1000, 10, True, 0))
    assert (shape.heads, shape.key_value_heads, shape.head_size) == (heads, key_value_heads, size)


GEMMA4: dict[str, dict[str, Any]] = {
    "default": {"num_hidden_layers": 6},
    "E2B": {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1,
        "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    },
    "31B": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 12, "num_attention_heads": 32,
        "num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
}  # fmt: skip
GEMMA4_26B: dict[str, Any] = {
    "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
    "moe_intermediate_size": 704,
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma_4_as_published_is_planned_from_its_configuration(name: str) -> None:
    config = CONFIG_MAPPING["gemma4_text"](**GEMMA4[name])
    shape = shape_from_config(config, ["all-linear"], 16, quantized=True)
    assert shape is not None

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    linears = [part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]
    assert shape.linear_parameters == sum(part.weight.numel() for part in linears)
    assert shape.adapter_parameters == sum(16 * (part.in_features + part.out_features) for part in linears)

    # In 16 bits; norms of heads are left out.
    loaded = loaded_bytes(config, replace(shape, quantized=False, adapter_parameters=0), double_quantized=True)
    assert loaded == pytest.approx(2 * sum(part.numel() for part in model.parameters()), rel=1e-4)


def linears_of(model: Any) -> int:
    """Parameters of linear layers, without routers, which are modules of their own in other families than Gemma 4."""
    parts = ((path, part) for path, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    return sum(part.weight.numel() for path, part in parts if "router" not in path)


def experts_of(layer: Any) -> int:
    found = (value for path, value in layer.named_parameters() if "experts." in path and value.ndim == 3)
    return sum(value.numel() for value in found)


STREAMED: dict[str, tuple[str, dict[str, Any], float]] = {
    "Gemma 4 E2B": ("gemma4_text", GEMMA4["E2B"], 1.3),
    "Gemma 4 31B": ("gemma4_text", GEMMA4["31B"], 1.05),
    "Gemma 4 26B-A4B": ("gemma4_text", GEMMA4_26B, 1.005),
    "Qwen 3.5": ("qwen3_5_text", {}, 1.005),
    "GLM 4.5": ("glm4_moe", {"num_hidden_layers": 6}, 1.15),
}
"""Model type, settings, and how much larger the largest layer is than the mean one."""


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_layers_are_planned_each_by_its_own_weights(name: str) -> None:
    """The places on the GPU take the largest layer. Of E2B, the first 15 layers are smaller than the other 20."""
    model_type, settings, above_mean = STREAMED[name]
    config = CONFIG_MAPPING[model_type](**settings)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    layers = [linears_of(layer) + experts_of(layer) for layer in model.model.layers]
    counts = ParameterCounts(linears_of(model.model), 1, quantized=True, movable_bytes=0)
    shape = let_stream(build_shape(config, counts), double_quantized=True)

    nf4 = [count * (1 / 2 + 1 / 64 + 4 / 64 / 256) for count in layers]
    assert [*shape.streamable_bytes] == pytest.approx(nf4, rel=1e-3)
    assert streamed_bytes(shape, 3) == pytest.approx(sum(nf4[:3]), rel=1e-3)
    largest, mean = max(nf4), sum(nf4) / len(nf4)
    print(f"{name}: the largest layer takes {largest / 2**20:.1f} MiB, the mean one {mean / 2**20:.1f}")
    assert window_bytes(shape) == pytest.approx(2 * largest, rel=1e-3)
    assert largest > above_mean * mean, "the control: places for the mean layer are too small"


def test_layers_of_gemma_4_are_planned_each_by_its_own_sizes() -> None:
    """Bytes a token of E2B: 15 layers with keys and values of their own, and 20 that reuse those of two."""
    config = CONFIG_MAPPING["gemma4_text"](**GEMMA4["E2B"])
    shape = build_shape(config, ParameterCounts(1000, 10, True, 0))
    windowed, full = 8 * 256, 8 * 512

    kept = 35 * (1536 + 256) + 2 * (256 + 512)  # layers' inputs; keys and values that others reuse
    assert shape.saved_by([ActivationPolicy.RECOMPUTE_ALL] * 35) == 2 * kept
    assert shape.saved_by([ActivationPolicy.OFFLOAD] * 35) == 2 * (kept - 35 * 1536)

    each = 1536 + 4 + 2 * (1536 + 2)  # h, both norms' rstd, and the second norms' inputs
    attention = 28 * (2 * windowed + 16) + 7 * (2 * full + 16) + 12 * 2 * 256 + 3 * 2 * 512
    assert shape.saved_by([ActivationPolicy.RECOMPUTE_MLP] * 35) == 2 * (kept + 35 * each + attention)
    mlp = 15 * 2 * 6144 + 20 * 2 * 12288
    assert shape.saved_by([ActivationPolicy.SAVE_ALL] * 35) == 2 * (kept + 35 * each + attention + mlp)
