"""SIGTERM and Ctrl-C: a flag that all code looks at, and a watchdog that ends the process in order when code does not.

The way of a signal: Python's C handler writes a byte into a pipe, whatever the main thread is doing. A thread reads it,
sets the flag (`stopping`), calls listeners, and watches the clock from there. The main path sees the flag at its next
`stop_point`: while nothing has to be finished it ends at once; in training it finishes the step and stores a
checkpoint. If it does neither in time, the thread calls the last resort, which writes the outcome, and ends the
process with its exit code, for which no retry is counted (`finetune_api.failures`).

In time means: within PATIENCE seconds while nothing has to be finished (a library that imports, a store that is
silent), else before the pod's grace period is over (`spec.runPolicy.terminationGracePeriodSeconds`).
"""

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from finetune_api.failures import ExitCode
from finetune_trainer import stopping

log = logging.getLogger(__name__)
NUMBERS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0
"""Seconds that code has, to see the flag where nothing has to be finished."""
COMMIT_PATIENCE = 5.0
"""Seconds for which the end of a stalled run waits for a commit, which may be what is stuck."""
TICK = 0.1
MAX_RESERVE = 10.0
"""Seconds of the grace period that are kept for the outcome; a quarter of a grace period below 40 s."""


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C has arrived, and sees to it that the process ends. One a process."""

    def __init__(self) -> None:
        stopping.reset()
        self._listeners: list[Callable[[int], None]] = []
        self._last_resort: Callable[[bool], int] | None = None
        self._grace: float | None = None
        self._arrived: list[float] = []
        """Times (monotonic) of the signals."""
        self._last_word = threading.Lock()
        self._concluded = False

    def install(self) -> None:
        """Registers the handler of SIGTERM and Ctrl-C (SIGINT). Call it in the main thread."""
        for number in NUMBERS:
            signal.signal(number, _request_stop)

        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(received,), name="stop-signal", daemon=True).start()

    def listen(self, listener: Callable[[int], None]) -> None:
        """Calls `listener` with 1 at the first signal, 2 at the second ...: at once, on another thread."""
        self._listeners.append(listener)

    def guard(self, last_resort: Callable[[bool], int]) -> None:
        """Sets what ends a run that does not end by itself: it returns the exit code, with which the process ends.

        It is called with True if a second signal asks to stop now, which only a person at a terminal does (Ctrl-C).
        """
        self._last_resort = last_resort

    def allow(self, grace_seconds: float) -> None:
        """Sets the time from the signal to SIGKILL."""
        self._grace = grace_seconds

    def conclude(self) -> None:
        """Ends the watch: the run has its outcome, which the last resort must not replace."""
        with self._last_word:
            self._concluded = True

    def end_stalled(self, last_word: Callable[[], int]) -> None:
        """Ends the process with the exit code that `last_word` returns, because the run no longer gets on.

        Does nothing if the run has its outcome, or if a signal has arrived: then its own clock runs.
        """
        with self._last_word:
            if self._concluded or self.requested:
                return
            with stopping.committing(COMMIT_PATIENCE):
                os._exit(last_word())

    def exit(self, code: int) -> NoReturn:
        """Ends the process; after a signal without waiting for threads, as their requests may take minutes."""
        if self.requested:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return stopping.is_requested()

    def _watch(self, pipe: int) -> None:
        while True:
            ready, _, _ = select.select([pipe], [], [], TICK if self._arrived else None)
            # The pipe names every signal that has a handler.
            for number in os.read(pipe, 64) if ready else b"":
                if number in NUMBERS:
                    self._receive(signal.Signals(number))

            if self._is_overdue():
                self._end(now=False)

    def _receive(self, number: signal.Signals) -> None:
        stopping.request_stop(number.name)
        self._arrived.append(time.monotonic())
        for listener in self._listeners:
            listener(len(self._arrived))
        if number is signal.SIGINT and len(self._arrived) > 1:
            self._end(now=True)

    def _is_overdue(self) -> bool:
        if not self._arrived:
            return False

        now, first, since = time.monotonic(), self._arrived[0], stopping.interruptible_since()
        if self._grace is not None and now > first + self._grace - min(MAX_RESERVE, self._grace / 4):
            return True
        return since is not None and now > max(first, since) + PATIENCE

    def _end(self, *, now: bool) -> None:
        """Ends the process by the last resort, unless the run has concluded; the locks are never released then."""
        with self._last_word:
            if self._concluded or self._last_resort is None:
                return

            with stopping.committing():  # what is committed is a result by now; nothing else can become one
                try:
                    code = self._last_resort(now)
                except BaseException:  # the process ends, whatever happens
                    log.exception("the last resort failed")
                    code = ExitCode.INTERRUPTED
                os._exit(code)


def _request_stop(number: int, _: FrameType | None) -> None:
    # In the main thread, so that its own next look sees the flag; the pipe's reader may come later.
    stopping.request_stop(signal.Signals(number).name)
