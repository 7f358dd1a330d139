"""SIGTERM and Ctrl-C: outside training they end the run at once; during training the step is finished and a checkpoint
written first.

The way of a signal: `cli/pod.py` installs the handler, `stages/training.py` defers it, `training/callback.py` sees it
at the end of a step and saves, `artifacts/checkpoints.py` uploads, and the run ends with exit code INTERRUPTED, for
which no retry is counted (`finetune_api.failures`). The grace period is `spec.runPolicy.terminationGracePeriodSeconds`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune_trainer.errors import InterruptedRunError


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C has arrived. Install it in the main thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._deferred = False

    def install(self) -> None:
        """Registers the handler of SIGTERM and Ctrl-C (SIGINT)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self._requested.is_set()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts, a signal only sets `requested`: the code inside looks at it and stops in order."""
        self._deferred = True

        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Python runs this in the main thread, between two instructions of whatever happens there.
        self._requested.set()
        if not self._deferred:
            raise InterruptedRunError(f"stopped by {signal.Signals(number).name}")
