"""Ends a run that no longer gets on, with the stacks of all threads in the log: better than a GPU that idles for days.

A thread counts the seconds since the last sign of life (signs_of_life.py; traffic of files and disks counts as well).
At the limit it has the stacks written by faulthandler, which reads no file and so cannot get stuck on the disk that the
run may be waiting for, writes the outcome, and ends the process by `os._exit`, which waits for no thread.

What it covers: Python code and native code that lets other threads run (GIL released), in any thread, as nearly all of
PyTorch, CUDA, sockets and disks do. Native code that holds the GIL stops this thread too: then a timer of faulthandler,
a thread in C, writes the stacks all the same, and the operator ends the pod, which has become silent. A process that is
frozen as a whole can write nothing: the operator sees the silence. If it was frozen for longer than the limit and goes
on, that timer, whose clock went on as well, writes the stacks, and ends a process that nobody else watches.
"""

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.pod_ends.stalls import StallLimit
from finetune_trainer import signs_of_life
from finetune_trainer.job.stacks import innermost_frame, name_threads

log = logging.getLogger(__name__)

MAX_TICK_SECONDS = 5.0
PAUSES = 3
"""A run that came through a pause may make one so many times as long."""

MAX_ADAPTED_SECONDS = 4 * 3600
TRAFFIC_BYTES = 256 << 10
"""Bytes a tick that show work where code of others gives no sign: 50 kB/s. A report to the operator has about 10 kB."""

IO_COUNTERS = Path("/proc/self/io")
_COUNTED = ("rchar:", "wchar:", "read_bytes:", "write_bytes:")


@dataclass(frozen=True)
class Stall:
    """A run without a sign of life."""

    seconds: int
    """Time without a sign of life."""

    frame: str
    """The place where the main thread waits, as qlora_trainer.py:91 in training_step."""


class Watchdog:
    """Thread that watches one run."""

    def __init__(self, limit: StallLimit, on_stall: Callable[[Stall], None], *, is_watched: bool = True) -> None:
        """`on_stall` ends the process. `is_watched`: an operator ends it where this thread cannot."""
        self._limit = limit
        self._on_stall = on_stall
        self._is_watched = is_watched
        self._tick = min(MAX_TICK_SECONDS, limit.seconds / 20)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        signs_of_life.beat()
        self._thread.start()

    def close(self) -> None:
        """Ends the watch. The thread takes its timer with it, also if it is too busy to end at once."""
        self._closing.set()
        self._thread.join(1)

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        silence = Silence(self._limit)
        traffic = read_traffic()
        looked, beat = time.monotonic(), signs_of_life.last_beat()

        while not self._closing.wait(self._tick):
            self._set_timer(silence.limit)
            moved, now, last = read_traffic(), time.monotonic(), signs_of_life.last_beat()
            is_alive = last != beat or moved - traffic >= TRAFFIC_BYTES

            # A tick that took long is one in which the whole process was stopped: nobody could have got on.
            silence.add(min(now - looked, 2 * self._tick), is_alive=is_alive)
            traffic, looked, beat = moved, now, last
            if silence.seconds >= silence.limit:
                self._end(silence)
                return

    def _set_timer(self, seconds: float) -> None:
        """Has the stacks written if this thread does not come back in time. Without an operator, the process ends too,
        as one that crashed."""
        faulthandler.dump_traceback_later(seconds + self._tick, exit=not self._is_watched)

    def _end(self, silence: "Silence") -> None:
        faulthandler.cancel_dump_traceback_later()
        stall = Stall(int(silence.seconds), innermost_frame())
        log.error("no sign of life for %d s: the stacks of all threads follow (%s)", stall.seconds, name_threads())
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        self._on_stall(stall)


class Silence:
    """Seconds since the last sign of life, and how many there may be."""

    def __init__(self, limit: StallLimit) -> None:
        self._limit = limit
        self._longest = 0.0
        self.seconds = 0.0

    @property
    def limit(self) -> float:
        """Seconds after which the run counts as stalled: slow machines and long steps show in the pauses before."""
        if not self._limit.adapts:
            return self._limit.seconds
        return max(self._limit.seconds, min(PAUSES * self._longest, MAX_ADAPTED_SECONDS))

    def add(self, seconds: float, *, is_alive: bool) -> None:
        """Adds time, which ended with a sign of life or not."""
        self.seconds += seconds
        if is_alive:
            self._longest = max(self._longest, self.seconds)
            self.seconds = 0.0


def read_traffic() -> int:
    """Returns the bytes that this process has read and written so far, by system calls and by page faults; 0 where the
    kernel does not say."""
    try:
        lines = IO_COUNTERS.read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(_COUNTED))
    except (OSError, ValueError, IndexError):
        return 0
