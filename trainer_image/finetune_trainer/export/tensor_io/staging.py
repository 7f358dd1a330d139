"""Copies between files and a device, in slices, on several threads; through pinned buffers if the device is a GPU.

The driver stages a copy between a GPU and ordinary memory page by page, at a fraction of the bus's rate, and one thread
fills the page cache at 2 to 3 GB/s. So several threads each own a pinned buffer and a stream; while one copies, others
read or write. On a CPU the same threads read and write without a copy.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

SLICE_BYTES = 32 << 20
CPU_THREADS, GPU_THREADS = 2, 6
# Bytes that may be queued before the caller waits (at least one tensor): enough to keep a bus busy, and no more than a
# few tensors of memory.
MAX_CPU_QUEUED_BYTES, MAX_GPU_QUEUED_BYTES = 8 << 20, 512 << 20


class StagingThreads(ThreadPoolExecutor):
    """Threads that move slices of at most SLICE_BYTES between files and `device`."""

    def __init__(self, device: torch.device, name: str) -> None:
        threads = GPU_THREADS if device.type == "cuda" else max(CPU_THREADS, torch.get_num_threads())
        super().__init__(threads, thread_name_prefix=name)
        self.device = device
        self.max_queued_bytes = MAX_GPU_QUEUED_BYTES if device.type == "cuda" else MAX_CPU_QUEUED_BYTES
        self._own = threading.local()

    def mark(self) -> torch.cuda.Event | None:
        """Record a point of the caller's stream, for slices to wait for; None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self, file: int, offset: int, target: torch.Tensor, after: torch.cuda.Event | None) -> bool:
        """Fill uint8 `target` from `file`; returns False if the file ends before. Runs on one of the threads."""
        if after is None:
            return read_fully(file, offset, target)

        buffer, stream = self._staging()
        if not read_fully(file, offset, buffer[: target.numel()]):
            return False

        with torch.cuda.stream(stream):
            stream.wait_event(after)
            target.copy_(buffer[: target.numel()], non_blocking=True)
        stream.synchronize()
        return True

    def write(self, file: int, offset: int, source: torch.Tensor, after: torch.cuda.Event | None) -> None:
        """Write uint8 `source` into `file`. Runs on one of the threads."""
        if after is not None and source.is_cuda:
            buffer, stream = self._staging()
            with torch.cuda.stream(stream):
                stream.wait_event(after)
                buffer[: source.numel()].copy_(source, non_blocking=True)
            stream.synchronize()
            source = buffer[: source.numel()]

        # One write takes at most 2 GiB, and may take less.
        view = source.numpy().data
        while view:
            count = os.pwrite(file, view, offset)
            view, offset = view[count:], offset + count

    def _staging(self) -> tuple[torch.Tensor, torch.cuda.Stream]:
        """This thread's pinned buffer and stream, made on first use."""
        if not hasattr(self._own, "staging"):
            buffer = torch.empty(SLICE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._own.staging = (buffer, torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]  # torch
        staging: tuple[torch.Tensor, torch.cuda.Stream] = self._own.staging
        return staging


def read_fully(file: int, offset: int, target: torch.Tensor) -> bool:
    """Fill uint8 `target`, on the CPU, from `file`; returns False if the file ends before."""
    view = target.numpy().data
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True
