"""A model's first decoder layers with their frozen weights in host memory, as many as its memory plan says.

They are the first, as the last ones are those that a plan keeps dequantised. Two places on the GPU are made once.
"""

from collections.abc import Sequence

import torch
from torch import nn

from finetune_kernels.planning.loaded_weights import WHOLE_LAYERS
from finetune_kernels.streaming.frozen_tensors import nf4_tensors_of
from finetune_kernels.streaming.host_tensors import HostTensors, Slot
from finetune_kernels.streaming.layer_window import LayerWindow


class HostLayers:
    """The first of a model's decoder layers `modules`, which stream from host memory; none to begin with."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._layers: list[HostTensors] = []
        self._slots: list[Slot] = []
        self._window = LayerWindow()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def limit(self) -> int:
        """Layers that could stream."""
        return len(self._modules)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the layers take."""
        return sum(layer.kept_bytes for layer in self._layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the GPU that the layers take."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def stream(self, count: int) -> None:
        """Moves weights in NF4 to host memory until the first `count` layers stream. Those that do already stay. Raises
        ValueError if the model has fewer."""
        if count > self.limit:
            raise ValueError(f"{count} layers are to stream, and {self.limit} are known")
        self.adopt([HostTensors(nf4_tensors_of(module)) for module in self._modules[len(self) : count]])

    def adopt(self, layers: Sequence[HostTensors]) -> None:
        """Lets the next of the model's layers use their weights `layers`, which are in host memory already."""
        if not layers:
            return

        self.close()
        first = len(self)
        self._layers += layers
        self._window.attach(layers, self._modules[first : len(self)])
        size = max(layer.whole_bytes for layer in self._layers)
        if not self._slots or size > self._slots[0].buffer.numel():
            if self._slots and layers[0].device.type == "cuda":
                torch.cuda.synchronize(layers[0].device)  # a copy may still be on its way to a place that is given up
            self._slots = _slots(size, layers[0].device)
        for index, layer in enumerate(self._layers):
            layer.use_slot(self._slots[index % len(self._slots)])

    def close(self) -> None:
        """Leaves both places empty, and the layers without weights until they are used."""
        self._window.close()


def _slots(size: int, device: torch.device) -> list[Slot]:
    """Places for layers of `size` bytes, which one stream fills."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    return [Slot(size, device, stream) for _ in range(WHOLE_LAYERS)]
