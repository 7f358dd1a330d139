"""Experts of a checkpoint that also reads images are loaded in NF4, also where the language model is loaded as another
family and where files have rows and columns swapped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision, Quantization
from finetune_kernels.experts.replacing import stacked_experts
from finetune_test_models.published.multimodal_models import make_multimodal_model
from finetune_trainer.stages.model_loading import load_model

MIXTURES = ("gemma4_moe", "glm4v_moe", "llama4", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_vl_moe_resaved")
NF4_ERROR = 0.1
"""Of the weights' standard deviation; 0.092 was measured for all."""


def weights_of(folder: Path, quantization: Quantization) -> dict[str, Any]:
    """The stacked weights of every layer's experts as training has them."""
    spec = ModelSpec(source=f"file://{folder}", quantization=quantization, double_quantization=False)
    model = load_model(folder, spec, Precision.FP32, gpus=0).model
    return {
        f"{path}.{part}": getattr(experts, part)
        for path, experts in stacked_experts(model)
        for part in ("gate_up", "down")
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_all_experts_are_in_nf4(name: str, tmp_path: Path, texts: list[str]) -> None:
    folder = make_multimodal_model(name, tmp_path / "m", texts)
    whole, packed = (weights_of(folder, each) for each in (Quantization.NONE, Quantization.NF4))
    assert whole.keys() == packed.keys()
    assert len(whole) == (2 if name in ("glm4v_moe", "llama4") else 4), "the first layer of two has no experts"

    for path, weight in packed.items():
        assert weight.is_quantized, path
        expected = whole[path].tensor(torch.float32)
        error = (weight.tensor(torch.float32) - expected).std() / expected.std()
        assert 0.05 < error < NF4_ERROR, path


def test_swapped_stacks_are_the_same_experts(tmp_path: Path, texts: list[str]) -> None:
    of_published, of_resaved = (
        weights_of(make_multimodal_model(name, tmp_path / name, texts), Quantization.NF4)
        for name in ("qwen3_vl_moe", "qwen3_vl_moe_resaved")
    )
    for path, weight in of_resaved.items():
        assert torch.equal(of_published[path].tensor(torch.float32), weight.tensor(torch.float32)), path
