"""Shapes of models whose layers differ, or that have no attention: every model that trains on a GPU is planned."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_kernels.planning.described_shape import shape_from_config
from finetune_kernels.planning.model_shape import ParameterCounts, build_shape


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


def test_gemma_4_as_published_is_planned_from_its_configuration() -> None:
    shape = shape_from_config(CONFIG_MAPPING["gemma4_text"](), ["all-linear"], 16, quantized=True)
    assert shape is not None
    assert shape.head_size == 512
