"""Layer inputs between forward and backward: on the GPU, or in pinned host memory, copied while the GPU computes.

A copy stream takes each input away while the next layer computes. When backward takes an input, the one of the layer
before starts on its way back, so that this copy runs beside the computation (55 GB/s against a layer's milliseconds).
Pinned pieces are kept for the next micro-batch, as pinning takes far longer than copying.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from finetune_kernels.layers.blocks.attention_block import LayerInputs
from finetune_kernels.layers.blocks.projected_heads import CosSin
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.primitives.attention.inputs import PackedSequences
from finetune_kernels.primitives.pinned_memory import copy_from_pieces, copy_to_pieces, pinned_pieces


class HostMemory:
    """Tensors by layer index; each is put once and taken once per micro-batch, last in, first out."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[torch.Tensor]] = {}
        self._waiting: dict[int, torch.Tensor] = {}
        """What was put, without its values."""
        self._coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._device = torch.device("cpu")

    def put(self, index: int, x: torch.Tensor) -> None:
        """Copies `x` to the host; its device memory is free again once the caller releases it."""
        x = x.contiguous()
        if sum(piece.numel() for piece in self._pieces.get(index, ())) < x.nbytes:
            self._pieces[index] = pinned_pieces(x.nbytes, pinned=x.is_cuda)

        pieces = self._pieces[index]

        if x.is_cuda:
            stream = self._copy_stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                copy_to_pieces(pieces, x)
            x.record_stream(stream)
        else:
            copy_to_pieces(pieces, x)

        self._waiting[index] = x.to("meta")
        self._device = x.device

    def take(self, index: int) -> torch.Tensor:
        """Returns the tensor of `index` on its device, and starts to fetch the one before."""
        if self._device.type != "cuda":
            found = torch.empty_like(self._waiting.pop(index), device=self._device)
            copy_from_pieces(self._pieces[index], found)
            return found

        if index not in self._coming:
            self._fetch(index)
        x, arrived = self._coming.pop(index)
        torch.cuda.current_stream(self._device).wait_event(arrived)
        if index - 1 in self._waiting:
            self._fetch(index - 1)
        return x

    def forget(self) -> None:
        """Releases what a pass that ended early has left; buffers are kept."""
        self._waiting.clear()
        self._coming.clear()

    def _fetch(self, index: int) -> None:
        x = torch.empty_like(self._waiting.pop(index), device=self._device)
        stream = self._copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # x's memory may still be read
        with torch.cuda.stream(stream):
            copy_from_pieces(self._pieces[index], x)
            arrived = stream.record_event()
        x.record_stream(stream)
        self._coming[index] = x, arrived

    def _copy_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream


class Saver(Protocol):
    """A layer that saves its inputs."""

    index: int
    policy: ActivationPolicy
    host: HostMemory


def save_inputs(layer: Saver, inputs: LayerInputs) -> list[torch.Tensor | None]:
    """Returns what autograd saves of a layer's inputs, in the order of `take_inputs`; under OFFLOAD x goes to the
    host."""
    if layer.policy is not ActivationPolicy.OFFLOAD:
        return [*inputs.cos_sin, inputs.own, inputs.kv, inputs.x]
    layer.host.put(layer.index, inputs.x)
    return [*inputs.cos_sin, inputs.own, inputs.kv]


def take_inputs(
    layer: Saver, saved: Sequence[torch.Tensor | None], sequences: PackedSequences
) -> tuple[LayerInputs, list[torch.Tensor]]:
    """Returns the inputs, which begin `saved`, and the tensors behind them."""
    cos, sin, query_scale, own, kv, *rest = saved
    x = layer.host.take(layer.index) if layer.policy is ActivationPolicy.OFFLOAD else rest.pop(0)
    return LayerInputs(x, CosSin(cos, sin, query_scale), sequences, own, kv), rest  # type: ignore[arg-type, return-value]
