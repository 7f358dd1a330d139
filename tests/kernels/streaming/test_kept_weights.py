"""Weights of layers that are whole only while they compute are kept decoded from their next use on."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from finetune_kernels.layers import frozen_weight
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.streaming.frozen_tensors import nf4_tensors_of
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_kernels.streaming.sharded_tensors import ShardedTensors
from finetune_test_kernels.quantized_layers import linears_of, quantized_model
from finetune_test_kernels.small_layers import one_pass

LAYERS, LENGTH = 3, 5


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The packed weights that were decoded."""
    found: list[torch.Tensor] = []
    real = frozen_weight.dequantize

    def note(packed: torch.Tensor, *others: object) -> torch.Tensor:
        assert packed.untyped_storage().size(), "decoded while they are not there"
        found.append(packed)
        return real(packed, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(frozen_weight, "dequantize", note)
    return found


@pytest.mark.usefixtures("alone", "in_pytorch")
@pytest.mark.parametrize("policy", [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_ALL])
def test_a_sharded_layer_is_decoded_once_and_computes_the_same_bits(
    policy: ActivationPolicy, decoded: list[torch.Tensor]
) -> None:
    resident, model = quantized_model(LAYERS), quantized_model(LAYERS)
    FusedLayers(resident.get_base_model(), [policy] * LAYERS, torch.float32, keep_dequantized=False)
    expected = one_pass(resident, LENGTH)

    causal, window = model.get_base_model(), LayerWindow()
    layers = causal.model.layers
    window.attach([ShardedTensors(nf4_tensors_of(layer), 0, 1) for layer in layers], layers)
    fused = FusedLayers(causal, [policy] * LAYERS, torch.float32, keep_dequantized=False)
    each = len(linears_of(layers[0]))

    counts = []
    for kept in (0, 1, 1, LAYERS, LAYERS):
        decoded.clear()
        fused.keep_weights(kept)
        found = one_pass(model, LENGTH)
        assert all(torch.equal(one, other) for one, other in zip(found.values(), expected.values(), strict=True))
        counts.append(len(decoded))

    assert counts[0] > LAYERS * each, "forward, and again in backward"
    assert counts[1] - counts[2] == each, "once, in the first pass"
    assert counts[3:] == [2 * each, 0]


def test_a_group_keeps_what_is_there_at_once_and_else_from_its_next_use() -> None:
    linear = linears_of(quantized_model(1).get_base_model().model.layers[0])[0]
    storage = linear.weight.untyped_storage()
    frozen = LinearGroup([linear], torch.float32, keep_dequantized=True).frozen
    expected, packed = frozen.tensor().clone(), linear.weight.data.clone()
    assert frozen.dequantized_bytes == expected.numel() * 4

    frozen.release()
    storage.resize_(0)
    frozen.keep()
    assert frozen.dequantized_bytes == 0
    storage.resize_(packed.numel())
    linear.weight.data.copy_(packed)
    assert torch.equal(frozen.tensor(), expected)

    storage.resize_(0)
    with frozen.dequantized():
        assert torch.equal(frozen.tensor(), expected)
    assert torch.equal(frozen.tensor(), expected), "what is kept stays"
