"""Fused layers of mixtures whose experts stream from host memory with their layer: to the bit what resident ones
compute, by every policy; another layer's experts in their place are noticed."""

from typing import Any

import pytest
import torch

from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.host_tensors import Slot
from finetune_test_kernels.quantized_mixtures import quantized_mixture
from finetune_test_kernels.tensor_checks import DEVICE, normal

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="in fp32, by the kernels' formulas"),
    pytest.mark.usefixtures("in_pytorch"),
]
KINDS = ("qwen3_moe", "gpt_oss", "glm4_moe", "gemma4_text")
"""Half a layer's outputs for gate and up each; biases, gate and up in turn; a first layer with an MLP; experts beside
the MLP."""
IDS = torch.arange(3, 40).unsqueeze(0)


def fuse(model: Any) -> FusedLayers:
    return FusedLayers(model, [ActivationPolicy.SAVE_ALL] * 4, torch.float32, keep_dequantized=False)


def results(model: Any, factors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits, and the gradients of the factors."""
    logits = model(input_ids=IDS).logits
    return [logits.detach(), *torch.autograd.grad(logits, list(factors.values()), normal(*logits.shape, seed=5))]


def are_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("model_type", KINDS)
def test_experts_stream_with_their_layer(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, factors = quantized_mixture(model_type)
    fused, codes = fuse(model), [part.gate_up.stack().codes for _, part in stacked_experts(model)]
    expected = {}
    for policy in ActivationPolicy:
        fused.set_policies([policy] * 4)
        expected[policy] = results(model, factors)
    assert any(gradient.abs().max() > 0 for gradient in expected[ActivationPolicy.SAVE_ALL][1:])

    # Layers without NF4 weights of their own have nothing to stream: here those with an MLP.
    layers = [layer for layer in model.model.layers if stacked_experts(layer)]
    host = HostLayers(layers)
    host.stream(len(layers))
    assert not any(each.untyped_storage().nbytes() for each in codes), "no experts are left on the device"
    assert host.slot_bytes * len(layers) == 2 * host.host_bytes
    for policy in ActivationPolicy:
        fused.set_policies([policy] * 4)
        for _ in range(2):
            assert are_equal(results(model, factors), expected[policy]), policy

    # The control: one layer's experts stand in every layer.
    fill, pieces = Slot.fill, host._layers[-1]._pieces
    host.close()
    monkeypatch.setattr(Slot, "fill", lambda slot, _: fill(slot, pieces))
    assert not are_equal(results(model, factors), expected[policy])
