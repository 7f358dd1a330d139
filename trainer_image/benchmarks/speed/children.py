"""Measurements in processes of their own, one at a time on the GPU.

The next process imports its libraries (10-25 s) while the current one loads its model. It is stopped while the current
one trains, so that nothing runs beside a timed step. Each process writes its messages to a log of its own. Signals go
to all descendants, as torchrun puts the processes that it starts into sessions of their own.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LAST_LINES = 12
ENDING_SECONDS = 10


class MeasurementError(Exception):
    """A process ended without a result; the message ends with the last lines of its log."""


class Child:
    """One process: started, told to `go`, and asked for its `result`."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("ab") as messages:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True,
                start_new_session=True, env=environment,
            )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self._log.open("a", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def go(self) -> None:
        """Lets the process use the GPU."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: `result` says why

    def pause(self) -> None:
        """Stops the process until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continues the process after `pause`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends the process and everything that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _signal(self, number: int) -> None:
        for pid in [*_descendants(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, number)

    def result(self, seconds: float, on_line: Callable[[str], None]) -> dict[str, Any]:
        """Returns the JSON object that the process prints after RESULT, and kills the process.

        Without the kill, CUDA takes a second or two to shut down. `on_line` gets each line before the result. Raises
        MeasurementError if there is no result within `seconds`.
        """
        end = time.monotonic() + seconds
        try:
            while (line := self._lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                if line.startswith("RESULT "):
                    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                    return found
                on_line(line)

            raise MeasurementError(f"{self._how_it_ended()}\n{self._last_lines()}")
        except queue.Empty:
            raise MeasurementError(f"no result within {seconds:.0f} s\n{self._last_lines()}") from None
        finally:
            self.kill()

    def _how_it_ended(self) -> str:
        """Waits for a process that says no more; returns how it ended, in words."""
        try:
            return f"ended with {self._process.wait(timeout=ENDING_SECONDS)}"
        except subprocess.TimeoutExpired:
            return f"said no more, and had not ended after {ENDING_SECONDS} s"

    def end(self, seconds: float) -> None:
        """Waits for a process without a result. Raises MeasurementError if it fails or takes longer than `seconds`."""
        try:
            code = self._process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        self.kill()

        if code != 0:
            reason = f"did not end within {seconds:.0f} s" if code is None else f"ended with {code}"
            raise MeasurementError(f"{reason}\n{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(f"  {line[:200]}" for line in lines[-LAST_LINES:])


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have started."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, file.read_text(encoding="ascii").split()):
                found += [child, *_descendants(child)]
    return found
