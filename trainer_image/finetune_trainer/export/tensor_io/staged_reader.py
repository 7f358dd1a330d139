"""Reads tensors of a file to a device as they are asked for, and shows every byte on the way.

To a GPU they go through pinned buffers of the calling thread, two in turn: while one is copied, the next is filled. The
driver would stage a copy from ordinary memory itself, at a fraction of the bus's rate, and fresh memory costs as much
as reading into it.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.export.tensor_io.staging import read_fully

PIECE_BYTES = 8 << 20
"""Bytes of a buffer: what was read is in the CPU's caches when it is looked at."""
Look = Callable[[memoryview], None]


class StagedReader:
    """Reads to `device`, on any number of threads at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, threading.local()

    def read(self, tensor: StoredTensor, look: Look) -> torch.Tensor:
        """Returns the tensor's values on the device. `look` is shown all bytes, in order; on a GPU, before the values
        may be used. Raises OSError, or InvalidBaseError if the file ends before the tensor does."""
        if self._device.type == "cpu":
            data = tensor.read_bytes()
            look(memoryview(data.numpy().data))
            return tensor.to_values(data)

        data = torch.empty(tensor.size, dtype=torch.uint8, device=self._device)
        with tensor.path.open("rb", buffering=0) as file:
            for at in range(0, tensor.size, PIECE_BYTES):
                self._copy(file.fileno(), tensor, at, data[at : at + PIECE_BYTES], look)
        return tensor.to_values(data)

    def _copy(self, file: int, tensor: StoredTensor, at: int, target: torch.Tensor, look: Look) -> None:
        """Reads the bytes of `tensor` from `at` on to `target`, through the buffer whose turn it is."""
        buffers = self._buffers()

        buffer, copied = buffers.pop(0)
        copied.synchronize()
        piece = buffer[: target.numel()]
        if not read_fully(file, tensor.offset + at, piece):
            raise InvalidBaseError(f"{tensor.path} ended while {tensor.name} was read: get the file again")

        look(memoryview(piece.numpy().data))
        target.copy_(piece, non_blocking=True)
        copied.record(torch.cuda.current_stream(self._device))
        buffers.append((buffer, copied))

    def _buffers(self) -> list[tuple[torch.Tensor, Any]]:
        """This thread's buffers, with the event after which each may be filled again; the next one comes first."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = [
                (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]
        found: list[tuple[torch.Tensor, Any]] = self._own.buffers
        return found
