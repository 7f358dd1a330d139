"""Asynchronous file writing: threads write slices while the caller computes the next tensor.

`FileWriters` are the threads, shared by all files of an export. An `AppendedFile` knows the position of its next byte,
so several threads can write slices of one tensor at once.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from finetune_trainer.export.tensor_io.staging import SLICE_BYTES, StagingThreads


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, made on the thread that writes them."""

    size: int
    make: Callable[[], torch.Tensor]
    """Returns uint8 [size]; the memory may be overwritten when the thread makes its next piece."""


def _give(data: torch.Tensor) -> torch.Tensor:
    return data


class FileWriters:
    """Threads that write for any number of files, as a context manager that ends them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads = StagingThreads(device, "export-write")
        self._changed = threading.Condition()
        self._queued = 0  # bytes queued or being written
        self._error: BaseException | None = None

    def __enter__(self) -> "FileWriters":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the threads and drop writes that have not begun; call `wait` first to keep them."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def write(self, file: int, offset: int, data: torch.Tensor) -> None:
        """Queue uint8 `data` to be written at `offset`; raises the error of an earlier write of any file."""
        ready = self._threads.mark()
        for start in range(0, data.numel(), SLICE_BYTES):
            piece = data[start : start + SLICE_BYTES]
            self.put(file, offset + start, Piece(piece.numel(), partial(_give, piece)), ready)

    def put(self, file: int, offset: int, piece: "Piece", ready: torch.cuda.Event | None = None) -> None:
        """Queue a piece to be made and written once the device has reached `ready`.

        Waits while too many bytes are queued; raises the error of an earlier write of any file.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queued < self._threads.max_queued_bytes or self._error is not None)
            self._raise_error()
            self._queued += piece.size

        self._threads.submit(self._write, file, offset, piece, ready).add_done_callback(self._finish)

    def wait(self) -> None:
        """Wait until everything is written; raises the error of any write."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued == 0 or self._error is not None)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, file: int, offset: int, piece: "Piece", ready: torch.cuda.Event | None) -> int:
        self._threads.write(file, offset, piece.make(), ready)
        return piece.size

    def _finish(self, done: Future[int]) -> None:
        with self._changed:
            error = None if done.cancelled() else done.exception()
            if error is not None:
                self._error = self._error or error  # the first one is told
            elif not done.cancelled():
                self._queued -= done.result()
            self._changed.notify_all()


class AppendedFile:
    """A file that grows tensor by tensor; bytes that `path` holds already stay at its beginning."""

    def __init__(self, writers: FileWriters, path: Path) -> None:
        self._writers = writers
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.fstat(self._file).st_size

    @property
    def end(self) -> int:
        """Position of the next byte."""
        return self._end

    def move_to(self, position: int) -> None:
        """Go on at `position`; bytes that are never written are zeros."""
        self._end = position

    def append(self, values: torch.Tensor) -> int:
        """Append the bytes of `values`, which the caller must not change afterwards; returns their number."""
        data = values.contiguous().flatten().view(torch.uint8)
        self._writers.write(self._file, self._end, data)
        self._end += data.numel()
        return data.numel()

    def append_made(self, pieces: Iterable[Piece]) -> int:
        """Append the bytes of pieces that are still to be made; returns their number."""
        began = self._end
        for piece in pieces:
            self._writers.put(self._file, self._end, piece)
            self._end += piece.size
        return self._end - began

    def pad(self, alignment: int) -> None:
        """Append zeros up to a multiple of `alignment`."""
        missing = -self._end % alignment
        if missing:
            self.append(torch.zeros(missing, dtype=torch.uint8))

    def close(self) -> None:
        """Wait until everything is written, and close; raises the error of any write."""
        self._writers.wait()
        self.abandon()

    def abandon(self) -> None:
        """Close without waiting: the writers have ended, or have no more bytes for this file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
