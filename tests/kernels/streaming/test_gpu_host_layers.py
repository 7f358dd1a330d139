"""On a GPU: no layer is read before its copy has arrived, and none is overwritten while the GPU still reads it."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.pinned_memory import PIECE
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.host_tensors import HostTensors, Slot
from finetune_test_kernels.quantized_layers import quantized_model, stream
from finetune_test_kernels.small_layers import one_pass

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cudnn_at_once")]
LAYERS, HIDDEN, LENGTH = 7, 512, 40
PASSES = 3
CYCLES = 20_000_000
"""About 10 ms: a hundred times what a layer of this size computes or copies."""


def sleep(*_: Any) -> None:
    torch.cuda._sleep(CYCLES)


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy begins late: whoever does not wait for it reads what was there before."""
    copy = Slot._copy

    def late(self: Slot, pieces: Any) -> None:
        sleep()
        copy(self, pieces)

    monkeypatch.setattr(Slot, "_copy", late)


def make(*, streamed: bool) -> Any:
    model = quantized_model(LAYERS, torch.bfloat16, HIDDEN)
    if streamed:
        stream(model, LAYERS)
    policies = [ActivationPolicy.RECOMPUTE_ALL] * LAYERS
    FusedLayers(model.get_base_model(), policies, torch.bfloat16, keep_dequantized=False)
    return model


def slow_layers(model: Any) -> None:
    """Every layer computes for long after its launch: a copy that does not wait for it overwrites what it reads."""
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(sleep)


def are_equal(model: Any, expected: dict[str, torch.Tensor]) -> bool:
    """True if all passes give the same bits; weights of two models have names of their own."""
    found = [one_pass(model, LENGTH) for _ in range(PASSES)]
    torch.cuda.synchronize()
    pairs = [pair for each in found for pair in zip(each.values(), expected.values(), strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_resident_model_gives_the_same_bits_twice() -> None:
    assert are_equal(make(streamed=False), one_pass(make(streamed=False), LENGTH))


@pytest.mark.usefixtures("slow_copies")
def test_slow_copies_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_pass(make(streamed=False), LENGTH)
    assert are_equal(make(streamed=True), expected)

    def wait_for_nothing(self: HostTensors) -> None:
        self._arrived = None
        wait(self)

    wait: Callable[[HostTensors], None] = HostTensors.wait
    monkeypatch.setattr(HostTensors, "wait", wait_for_nothing)
    assert not are_equal(make(streamed=True), expected), "without the event the difference is seen"


def test_slow_layers_are_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_pass(make(streamed=False), LENGTH)
    model = make(streamed=True)
    slow_layers(model)
    assert are_equal(model, expected)

    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda *_: None)
    model = make(streamed=True)
    slow_layers(model)
    assert not are_equal(model, expected), "without the wait the difference is seen"


def test_two_layers_are_all_that_the_gpu_holds() -> None:
    def allocated_by(count: int) -> tuple[int, HostLayers]:
        gc.collect()  # what other tests have left
        before = torch.cuda.memory_allocated()
        model = quantized_model(LAYERS, torch.bfloat16, HIDDEN)
        streamed = stream(model, count)
        return torch.cuda.memory_allocated() - before, streamed

    for count in (0, LAYERS):  # what other tests of this process left goes, and what a first use leaves comes
        allocated_by(count)
    whole, _ = allocated_by(0)
    kept, streamed = allocated_by(LAYERS)
    saved = streamed.host_bytes - streamed.slot_bytes
    assert saved == streamed.host_bytes * (LAYERS - 2) // LAYERS
    assert whole - kept == pytest.approx(saved, rel=0.05)
    assert all(piece.is_pinned() for layer in streamed._layers for piece in layer._pieces)
    assert PIECE & (PIECE - 1) == 0, "PyTorch rounds pinned buffers up to powers of two"
