"""A mixture whose weights are drawn where they are used is the one that the loader makes of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.run_config import RunConfig
from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_kernels.experts.replacing import stacked_experts
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from speed.models import on_device
from speed.models.checkpoint import write, write_frame
from speed.rows import ROWS, SHAPES
from speed.systems import run_config

SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "vocab_size": 320,
}  # fmt: skip


def shape(model: str) -> dict[str, Any]:
    own: dict[str, Any] = {"moe_intermediate_size": 64} if "qwen3" in model else {}
    if "qwen3.5" in model:
        own |= {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 64}
        own |= {"num_experts": 6}
    if "gemma4" in model:
        own |= {"num_experts": 6, "num_global_key_value_heads": 1, "global_head_dim": 64, "top_k_experts": 2}
        own |= {"moe_intermediate_size": 64, "layer_types": ["sliding_attention", "full_attention"]}
    return SHAPES[model] | SMALL | own


def described(model: Any) -> dict[str, Any]:
    """Type of each module, and size and type of each tensor."""
    found: dict[str, Any] = {name: type(module).__name__ for name, module in model.named_modules()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return found | {name: (tuple(value.shape), value.dtype, value.requires_grad) for name, value in tensors}


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "qwen3.5-35b-a3b", "gemma4-26b-a4b"])
def test_it_has_the_modules_and_tensors_of_a_loaded_checkpoint(model: str, tmp_path: Path) -> None:
    write_frame(shape(model), tmp_path / "frame")
    write(shape(model), tmp_path / "whole", "cpu", quantized=False)
    spec = ModelSpec(source=f"file://{tmp_path}/whole")
    loaded = load_model(tmp_path / "whole", spec, Precision.BF16, gpus=0)
    made = on_device.load(tmp_path / "frame", "cpu")

    names = [[each.stored_experts for _, each in stacked_experts(one.model)] for one in (made, loaded)]
    assert names[0] == names[1]
    config: RunConfig = run_config("ours", ROWS["qwen3-30b-a3b-2048-bs1"], tmp_path, 3)
    counts = [inject_adapter(one.model, config.adapter, 0).trainable_parameters for one in (made, loaded)]
    assert counts[0] == counts[1]
    assert described(made.model) == described(loaded.model)

    logits = made.model(input_ids=torch.arange(3, 40)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01
