"""Layers that stream from host memory compute to the bit what resident ones compute, in whatever order passes end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives import nf4
from finetune_kernels.streaming.frozen_tensors import nf4_tensors_of
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.host_tensors import Slot
from finetune_test_kernels.quantized_layers import linears_of, quantized_model, stream
from finetune_test_kernels.small_layers import one_pass

LAYERS, LENGTH = 5, 12
COUNTS = (3, LAYERS)
"""Layers that stream: some, and all; both odd, so that the last one and the first have the same place."""


def differing(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit. Two models have parameters of their own."""
    return [
        str(index)
        for index, (one, other) in enumerate(zip(found.values(), expected.values(), strict=True))
        if not torch.equal(one, other)
    ]


def layers_of(model: Any) -> Any:
    """The decoder layers of a peft model."""
    return model.get_base_model().model.layers


def evaluate(model: Any) -> torch.Tensor:
    """Logits of a pass without gradients."""
    with torch.no_grad():
        return model.get_base_model()(input_ids=torch.arange(3, 3 + LENGTH).unsqueeze(0), use_cache=False).logits  # type: ignore[no-any-return]


@contextmanager
def broken_off(model: Any, layer: int, *, backward: bool = False) -> Iterator[None]:
    """Lets the next pass run out of memory in a layer, forward or backward."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    module = layers_of(model)[layer].self_attn.o_proj
    hook = module.register_full_backward_hook(fail) if backward else module.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        yield
    hook.remove()


@pytest.mark.parametrize("count", COUNTS)
def test_streamed_weights_decode_to_the_same_bits_in_every_order_of_use(count: int) -> None:
    resident, streamed = quantized_model(LAYERS), quantized_model(LAYERS)
    host = stream(streamed, count)
    window, slots = host._window, {slot.buffer.data_ptr() for slot in host._slots}
    assert len(host) == count
    assert host.slot_bytes == 2 * host.host_bytes // count

    expected = [[linear.weight for linear in linears_of(layer)] for layer in layers_of(resident)]
    found = [[linear.weight for linear in linears_of(layer)] for layer in layers_of(streamed)]
    up = list(range(count))
    orders = [(index, True, False) for index in up] + [(index, True, True) for index in reversed(up)]
    orders += [(index, False, False) for index in up] * 2

    for index, trains, backward in orders:
        window.use(index, trains=trains, backward=backward)
        assert {found[index][0].data_ptr()} <= slots
        for one, other in zip(found[index], expected[index], strict=True):
            assert torch.equal(nf4.reference(one.data, one.quant_state), nf4.reference(other.data, other.quant_state))
        closed = [tensor for place in {*up} - window._opened for tensor in nf4_tensors_of(layers_of(streamed)[place])]
        assert not any(tensor.untyped_storage().nbytes() for tensor in closed), "no layer shows another one's bytes"


@pytest.mark.parametrize("count", COUNTS)
def test_logits_and_gradients_are_those_of_resident_layers_whatever_pass_came_before(count: int) -> None:
    resident, streamed = quantized_model(LAYERS), quantized_model(LAYERS)
    stream(streamed, count)
    expected, logits = one_pass(resident, LENGTH), evaluate(resident)

    assert not differing(one_pass(streamed, LENGTH), expected)
    for _ in range(2):
        assert torch.equal(evaluate(streamed), logits)
    assert not differing(one_pass(streamed, LENGTH), expected)

    for layer, backward in ((0, False), (2, False), (LAYERS - 1, False), (2, True), (0, True)):
        with broken_off(streamed, layer, backward=backward):
            one_pass(streamed, LENGTH)
        assert not differing(one_pass(streamed, LENGTH), expected), (layer, backward)
        assert torch.equal(evaluate(streamed), logits)


@pytest.mark.usefixtures("in_pytorch")
def test_fused_layers_stream() -> None:
    """With the policies of a smallest plan: each layer's input waits in host memory, and is recomputed from."""
    policies = [ActivationPolicy.OFFLOAD, ActivationPolicy.OFFLOAD, ActivationPolicy.RECOMPUTE_MLP]
    resident, streamed = quantized_model(len(policies)), quantized_model(len(policies))
    stream(streamed, len(policies))
    for model in (resident, streamed):
        FusedLayers(model.get_base_model(), policies, torch.float32, keep_dequantized=False)
    expected = one_pass(resident, LENGTH)
    for _ in range(2):
        assert not differing(one_pass(streamed, LENGTH), expected)


def test_layers_below_the_first_adapter_stream() -> None:
    options: dict[str, Any] = {"layers_to_transform": [3, 4]}
    resident, streamed = (quantized_model(LAYERS, **options) for _ in range(2))
    stream(streamed, LAYERS)
    expected = one_pass(resident, LENGTH)
    assert len(expected) == 2 * 2 * 7 + 1
    for _ in range(2):
        assert not differing(one_pass(streamed, LENGTH), expected)


def test_more_layers_stream_from_the_middle_of_a_run_on() -> None:
    """As when memory runs out, and a smaller plan takes over."""
    resident, streamed = quantized_model(LAYERS), quantized_model(LAYERS)
    host = stream(streamed, 3)
    with broken_off(streamed, 1, backward=True):
        one_pass(streamed, LENGTH)
    host.stream(LAYERS)
    assert len(host) == LAYERS
    assert not differing(one_pass(streamed, LENGTH), one_pass(resident, LENGTH))


def test_a_window_that_brings_the_wrong_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, streamed = quantized_model(LAYERS), quantized_model(LAYERS)
    host = stream(streamed, LAYERS)
    fill = Slot.fill

    def fill_with_the_next(slot: Slot, pieces: Sequence[torch.Tensor]) -> Any:
        place = next(index for index, layer in enumerate(host._layers) if layer._pieces is pieces)
        return fill(slot, host._layers[(place + 1) % LAYERS]._pieces)

    monkeypatch.setattr(Slot, "fill", fill_with_the_next)
    assert not torch.allclose(evaluate(streamed), evaluate(resident), atol=1e-2)


def test_layers_out_of_turn_are_refused() -> None:
    host: HostLayers = stream(quantized_model(LAYERS), LAYERS)
    host._window.use(1, trains=True)
    with pytest.raises(RuntimeError, match="have to run in their order"):
        host._window.use(4, trains=True)
    with pytest.raises(RuntimeError, match="is taken"):
        host._layers[3].wait()
