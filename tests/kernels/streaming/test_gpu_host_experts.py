"""On a GPU: no expert is read before its layer's copy has arrived, and streamed ones give the resident ones' bits."""

from typing import Any

import pytest
import torch

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.host_tensors import HostTensors, Slot
from finetune_test_kernels.quantized_mixtures import quantized_mixture
from finetune_test_kernels.tensor_checks import normal

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cudnn_at_once")]
CYCLES = 20_000_000
"""About 10 ms: far longer than a layer of this size computes."""


def results(model: Any, factors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits, and the gradients of the factors."""
    logits = model(input_ids=torch.arange(3, 40, device="cuda").unsqueeze(0)).logits
    gradient = normal(*logits.shape, seed=5).to(logits)
    found = [logits.detach(), *torch.autograd.grad(logits, list(factors.values()), gradient)]
    torch.cuda.synchronize()
    return found


def are_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma4_text"])
def test_slow_copies_of_experts_are_waited_for(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, factors = quantized_mixture(model_type, torch.bfloat16)
    FusedLayers(model, [ActivationPolicy.RECOMPUTE_ALL] * 4, torch.bfloat16, keep_dequantized=False)
    expected = results(model, factors)
    assert are_equal(results(model, factors), expected), "resident layers give the same bits twice"

    copy = Slot._copy

    def late(self: Slot, pieces: Any) -> None:
        torch.cuda._sleep(CYCLES)
        copy(self, pieces)

    monkeypatch.setattr(Slot, "_copy", late)
    host = HostLayers(model.model.layers)
    before = torch.cuda.memory_allocated()
    host.stream(4)
    assert torch.cuda.memory_allocated() < before, "two places are smaller than four layers"
    for _ in range(3):
        assert are_equal(results(model, factors), expected)

    wait = HostTensors.wait

    def wait_for_nothing(self: HostTensors) -> None:
        self._arrived = None
        wait(self)

    monkeypatch.setattr(HostTensors, "wait", wait_for_nothing)
    assert not are_equal(results(model, factors), expected), "without the event the difference is seen"
