"""Layer inputs in pinned host memory between forward and backward, copied beside the computation.

A copy stream takes each input away while the next layer computes; backward asks for the layer before its own when it
takes its own, so that the copy back runs beside it (55 GB/s against a layer's milliseconds). Pinned buffers are kept
for the next micro-batch: pinning costs far more than copying.
"""

import torch


class HostMemory:
    """Tensors by layer index; each is put once and taken once per micro-batch, last in, first out."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        self._waiting: dict[int, torch.Tensor] = {}
        self._coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._device = torch.device("cpu")

    def put(self, index: int, x: torch.Tensor) -> None:
        """Copy `x` away; its device memory may be used again as soon as the caller lets go of it."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.numel() < x.numel() or buffer.dtype != x.dtype:
            buffer = torch.empty(x.numel(), dtype=x.dtype, pin_memory=x.is_cuda)
            self._buffers[index] = buffer
        target = buffer[: x.numel()].view(x.shape)
        if x.is_cuda:
            stream = self._copying(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                target.copy_(x, non_blocking=True)
            x.record_stream(stream)
        else:
            target.copy_(x)
        self._waiting[index] = target
        self._device = x.device

    def take(self, index: int) -> torch.Tensor:
        """The tensor of `index`, on its device; starts to fetch the one before."""
        if self._device.type != "cuda":
            return self._waiting.pop(index).clone()
        if index not in self._coming:
            self._fetch(index)
        x, arrived = self._coming.pop(index)
        torch.cuda.current_stream(self._device).wait_event(arrived)
        if index - 1 in self._waiting:
            self._fetch(index - 1)
        return x

    def forget(self) -> None:
        """Let go of what a pass that ended early has left; buffers stay."""
        self._waiting.clear()
        self._coming.clear()

    def _fetch(self, index: int) -> None:
        source = self._waiting.pop(index)
        x = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        stream = self._copying(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # x's memory may still be read
        with torch.cuda.stream(stream):
            x.copy_(source, non_blocking=True)
            arrived = stream.record_event()
        x.record_stream(stream)
        self._coming[index] = x, arrived

    def _copying(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream
