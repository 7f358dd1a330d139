"""A model's first decoder layers with their frozen weights in host memory, as many as its memory plan says.

They are the first, as the last ones are those that a plan keeps dequantised. Two places on the GPU are made once.
"""

from collections.abc import Sequence

import torch
from torch import nn

from finetune_kernels.streaming.host_tensors import HostTensors, Slot
from finetune_kernels.streaming.layer_window import LayerWindow

SLOTS = 2
"""Layers on the GPU at a time: one computes, one is copied."""


class HostLayers:
    """The layers of one model that stream from host memory; none to begin with."""

    def __init__(self) -> None:
        self._layers: list[HostTensors] = []
        self._slot_bytes = 0
        self._window = LayerWindow()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the layers take."""
        return sum(layer.kept_bytes for layer in self._layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the GPU that the layers take."""
        return SLOTS * self._slot_bytes

    def attach(self, layers: Sequence[HostTensors], modules: Sequence[nn.Module]) -> None:
        """Has the decoder layers `modules`, which follow those that stream already, use their weights from here."""
        if not layers:
            return

        self.close()
        self._layers += layers
        self._window.attach(layers, modules)
        size = max(layer.whole_bytes for layer in self._layers)
        if size > self._slot_bytes:
            self._make_slots(size)
        else:
            self._assign()

    def close(self) -> None:
        """Leaves both places empty."""
        self._window.close()

    def _make_slots(self, size: int) -> None:
        device = self._layers[0].device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slot_bytes, self._slots = size, [Slot(size, device, stream) for _ in range(SLOTS)]
        self._assign()

    def _assign(self) -> None:
        for index, layer in enumerate(self._layers):
            layer.use_slot(self._slots[index % SLOTS])
