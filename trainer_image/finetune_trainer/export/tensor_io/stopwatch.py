"""Time that a device spends on work which the caller does not wait for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the time of the work started in `running`: on a GPU, the time between two points of the stream."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._adding = threading.Lock()
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the work of this block."""
        if device.type != "cuda":
            began = time.monotonic()
            yield
            self.add(time.monotonic() - began)
            return

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch
        first.record()
        yield
        last.record()
        self._spans.append((first, last))

    def add(self, seconds: float) -> None:
        """Count work that was measured elsewhere, from any thread."""
        with self._adding:
            self._seconds += seconds

    def seconds(self) -> float:
        """Return the sum; waits for work that is not done yet."""
        for first, last in self._spans:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        self._spans.clear()
        return self._seconds
