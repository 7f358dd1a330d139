"""The engine of a GPU run, for models of every structure; `make architectures` asks all types."""

import pytest
import torch

from finetune_api.vocabulary import Precision
from finetune_test_models.sweeps.engine_sweep import CARD, build_engine


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft, of GPT-2's transposed layers
@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "falcon", "opt", "bloom", "gpt_neox", "mpt", "gemma3n_text", "mamba", "rwkv", "dbrx"],
)
def test_an_engine_is_found_wherever_a_model_keeps_its_layers(model_type: str) -> None:
    engine = build_engine(model_type)
    assert engine.layers is None, "they run module by module"
    assert engine.batch.size >= 1


def test_fused_layers_are_found_too() -> None:
    engine = build_engine("llama")
    assert engine.layers is not None
    assert engine.plan is not None
    assert engine.plan.rates == CARD.rates, "priced by the machine's own speeds"


@pytest.mark.parametrize(("model_type", "is_wide"), [("llama", False), ("gemma3_text", True), ("gemma4_text", True)])
def test_layers_are_fused_in_fp16_as_well(model_type: str, is_wide: bool) -> None:
    engine = build_engine(model_type, Precision.FP16)
    assert engine.layers is not None
    assert {group.dtype for layer in engine.layers.layers for group in layer.groups} == {torch.float16}
    assert engine.layers.is_wide == is_wide, "the residual stream of Gemma is fp32"
