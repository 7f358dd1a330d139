"""Asynchronous reading: threads read the next tensors of a checkpoint to the device while the caller uses this one."""

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.buffers import BufferPool
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.export.tensor_io.staging import SLICE_BYTES, StagingThreads


@dataclass
class _Reading:
    tensor: StoredTensor
    values: torch.Tensor
    slices: list[Future[bool]]
    file: int

    def finish(self) -> torch.Tensor:
        """Wait for all slices; returns the values."""
        wait(self.slices)
        os.close(self.file)
        if not all(piece.result() for piece in self.slices):
            raise InvalidBaseError(f"{self.tensor.path} ended while {self.tensor.name} was read: get the file again")
        return self.tensor.to_values(self.values)


def read_tensors(
    tensors: Sequence[StoredTensor], device: torch.device
) -> Generator[tuple[StoredTensor, torch.Tensor], None, None]:
    """Yield each tensor with its values on `device`, in order, while the next ones are read.

    Raises InvalidBaseError if a file ends before its last tensor does.
    """
    upcoming: deque[_Reading] = deque()
    buffers = BufferPool()

    with StagingThreads(device, "export-read") as threads:
        try:
            for tensor in tensors:
                upcoming.append(_begin(threads, buffers, tensor))
                # One tensor is always read ahead, however large.
                while len(upcoming) > 1 and sum(reading.tensor.size for reading in upcoming) > threads.max_queued_bytes:
                    first = upcoming.popleft()
                    yield first.tensor, first.finish()

            while upcoming:
                first = upcoming.popleft()
                yield first.tensor, first.finish()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            for reading in upcoming:  # the caller stopped early
                os.close(reading.file)


def _begin(threads: StagingThreads, buffers: BufferPool, tensor: StoredTensor) -> _Reading:
    if threads.device.type == "cpu":
        values = buffers.take(tensor.size)
    else:
        values = torch.empty(tensor.size, dtype=torch.uint8, device=threads.device)
    allocated = threads.mark()  # work that used the same memory before may still read it

    file = os.open(tensor.path, os.O_RDONLY)
    slices = [
        threads.submit(threads.read, file, tensor.offset + start, values[start : start + SLICE_BYTES], allocated)
        for start in range(0, tensor.size, SLICE_BYTES)
    ]
    return _Reading(tensor, values, slices, file)
