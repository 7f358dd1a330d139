"""SIGTERM: outside training it ends the run at once; during training the step is finished and a checkpoint written
first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune_trainer.errors import InterruptedRunError


class StopSignal:
    """Whether the run was asked to stop. Install it in the main thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._deferred = False

    def install(self) -> None:
        """Listen to SIGTERM and Ctrl-C."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._requested.is_set()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts a signal only sets `requested`: who defers looks at it and stops in order."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()
        if not self._deferred:
            raise InterruptedRunError(f"stopped by {signal.Signals(number).name}")
