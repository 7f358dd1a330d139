"""A step of training through the engine that a run on a GPU would have, for hybrids: on the CPU, in bfloat16, with the
kernels' formulas in their place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.spec.training import DEFAULT_TARGETS, AdapterSpec
from finetune_api.vocabulary import Batching, Precision
from finetune_kernels.experts.replacing import stacked_experts
from finetune_test_kernels.tensor_checks import DEVICE
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.sweeps.engine_sweep import put_engine_into
from finetune_test_models.tiny_architectures import VOCABULARY, make_mixture, tiny_architecture
from finetune_test_models.tiny_runs import texts
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.training.batching.isolation import choose_batching
from finetune_trainer.training.batching.trial import try_step
from finetune_trainer.training.collator import COLLATORS
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs the kernels themselves: test_gpu_families.py"),
    pytest.mark.usefixtures("in_pytorch"),
]
__all__ = ["texts"]
LENGTHS = (20, 33, 40, 27)
NEAR = 0.02
"""Relative difference of losses in bfloat16, of which 0.003 was measured."""
HYBRIDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_5_text", {}),
    ("lfm2", {}),
    ("granitemoehybrid", {"num_local_experts": 0}),
    ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]}),
    ("bamba", {}),
    ("falcon_h1", {"mlp_multipliers": [0.8, 1.2], "attention_in_multiplier": 0.9, "ssm_out_multiplier": 0.8}),
]


def batch(kind: Batching, lengths: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return COLLATORS[kind]([{"input_ids": row, "labels": list(row)} for row in rows])


def loss_of(model: Any, compute: Any, kind: Batching) -> torch.Tensor:
    inputs = batch(kind, LENGTHS)
    labels, positions = inputs.pop("labels"), inputs.pop("supervised")
    with torch.autocast("cpu", torch.bfloat16):
        return compute(model, inputs, labels, positions, None)


@pytest.mark.parametrize(("model_type", "settings"), HYBRIDS, ids=[name for name, _ in HYBRIDS])
def test_a_step_lowers_the_loss_of_packed_documents(model_type: str, settings: dict[str, Any]) -> None:
    check_a_step(tiny_architecture(model_type, **settings).to(torch.bfloat16))


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_next", "nemotron_h"])
def test_a_step_of_a_mixture_in_nf4_lowers_it_too(model_type: str, texts: list[str], tmp_path: Path) -> None:
    settings = minimal_run().model
    loaded = load_model(make_mixture(tmp_path, model_type, texts), settings, Precision.BF16, gpus=0)
    assert all(experts.gate_up.is_quantized for _, experts in stacked_experts(loaded.model))
    weights = check_a_step(loaded.model)
    assert any("experts.adapters.down.lora_B" in name for name in weights)
    assert any(re.search(r"shared_experts?\.up_proj\.lora_B", name) for name in weights)


def check_a_step(base: Any) -> list[str]:
    """Trains adapters on a model for a step, and returns the names of their weights."""
    model = inject_adapter(base, AdapterSpec(target_modules=DEFAULT_TARGETS, rank=4), seed=0).model.train()
    plain = loss_of(model, supervised_loss, Batching.PADDED).item()

    engine = put_engine_into(model)
    assert engine.layers is not None
    loaded = LoadedModel(base, None, type(base).__name__, Precision.BF16, torch.device("cpu"))
    assert choose_batching(model, loaded).kind is Batching.PACKED
    try_step(model, loaded, engine.loss, Batching.PACKED)

    before = loss_of(model, engine.loss, Batching.PACKED)
    assert before.item() == pytest.approx(plain, rel=NEAR)
    before.backward()  # type: ignore[no-untyped-call]
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    untouched = [name for name, weight in weights.items() if "lora_B" in name and not weight.grad.abs().max() > 0]
    assert untouched == [], "every adapter learns, those of the other mixers among them"
    assert any(part in name for name in weights for part in ("linear_attn", "conv", "mamba", "mixer.in_proj"))

    torch.optim.SGD(weights.values(), lr=0.5).step()
    assert loss_of(model, engine.loss, Batching.PACKED) < before - 0.01
    return list(weights)
