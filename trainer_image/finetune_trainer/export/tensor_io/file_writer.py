"""Files written behind the back of what computes their content.

`FileWriters` are the threads, shared by all files of an export; an `AppendedFile` knows where its next byte goes, so
slices of one tensor can be written by several threads at once.
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
    """Bytes of a file that are made on the thread that writes them."""

    size: int
    make: Callable[[], torch.Tensor]
    """Gives uint8 [size]; it need not outlast the thread's next piece."""


def _give(data: torch.Tensor) -> torch.Tensor:
    return data


class FileWriters:
    """Threads that write for any number of files, as a context manager that ends them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads = StagingThreads(device, "export-write")
        self._changed = threading.Condition()
        self._waiting = 0
        self._error: BaseException | None = None

    def __enter__(self) -> "FileWriters":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the threads; what they have not begun to write is dropped. `wait` comes before where it is wanted."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def write(self, file: int, offset: int, data: torch.Tensor) -> None:
        """Write uint8 `data` soon; raises what an earlier write of any file met."""
        ready = self._threads.mark()
        for start in range(0, data.numel(), SLICE_BYTES):
            piece = data[start : start + SLICE_BYTES]
            self.put(file, offset + start, Piece(piece.numel(), partial(_give, piece)), ready)

    def put(self, file: int, offset: int, piece: "Piece", ready: torch.cuda.Event | None = None) -> None:
        """Make a piece and write it, soon; its values are there when `ready` is reached."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < self._threads.waiting_bytes or self._error is not None)
            self._raise_error()
            self._waiting += piece.size
        self._threads.submit(self._write, file, offset, piece, ready).add_done_callback(self._finish)

    def wait(self) -> None:
        """Until everything is written; raises what a write met."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting == 0 or self._error is not None)
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
                self._error = self._error or error
            elif not done.cancelled():
                self._waiting -= done.result()
            self._changed.notify_all()


class AppendedFile:
    """A file that grows by tensors; `path` may have a beginning already."""

    def __init__(self, writers: FileWriters, path: Path) -> None:
        self._writers = writers
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.fstat(self._file).st_size

    def append(self, values: torch.Tensor) -> int:
        """Append the bytes of `values`, which must not change any more; returns their number."""
        data = values.contiguous().flatten().view(torch.uint8)
        self._writers.write(self._file, self._end, data)
        self._end += data.numel()
        return data.numel()

    def append_made(self, pieces: Iterable[Piece]) -> int:
        """Append bytes that are still to be made; returns their number."""
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
        """Wait until everything is written; raises what a write met."""
        self._writers.wait()
        self.abandon()

    def abandon(self) -> None:
        """Close a file whose writers have ended or have nothing more for it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
