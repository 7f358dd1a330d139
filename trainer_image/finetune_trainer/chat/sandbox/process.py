"""The parent's side of the worker: one process for all templates.

It is started when a row first needs it, and again when a template has killed it.
"""

import atexit
import json
import logging
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import IO, Any

from finetune_trainer.stopping import POLL_SECONDS, wait_point

log = logging.getLogger(__name__)
LENGTH_BYTES = 8

MAX_ANSWER = 2**26
"""Bytes of an answer, besides 32 times the request: more than the worker itself lets through."""


@dataclass(frozen=True)
class RenderingLimits:
    """Limits of rendering one row."""

    seconds: int = 20
    """CPU time."""

    mebibytes: int = 2048
    """The worker's address space; a row of 64 MiB takes about ten copies of itself."""


@dataclass(frozen=True)
class TemplateSetup:
    """A template, and the special tokens that it may print."""

    template: str
    variables: dict[str, Any]
    """The tokenizer's special tokens by name."""
    special_tokens: tuple[str, ...]


class LimitError(Exception):
    """A row that needs more than the limits to render."""


class RenderingProcess:
    """The worker process. Safe to use from several threads."""

    def __init__(self, limits: RenderingLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._setup: TemplateSetup | None = None

    def ask(self, setup: TemplateSetup, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises LimitError if the worker died of the request, and InterruptedRunError."""
        with self._lock:
            if self._process is None:
                self._process, self._setup = _start(self._limits), None

            # The template goes along with the first row that it renders.
            if setup != self._setup:
                request = request | {
                    "template": setup.template,
                    "variables": setup.variables,
                    "special": setup.special_tokens,
                }
            self._setup = setup

            try:
                answer = _exchange(self._process, request)
            except (OSError, EOFError):
                self._end()
                answer = {"error": "memory"}
            except BaseException:
                self._end()  # its answer would be taken for the next row's
                raise

            if answer.get("error") == "memory":
                limits = self._limits
                raise LimitError(
                    f"rendering one row takes more than {limits.seconds} s of CPU time or {limits.mebibytes} MiB"
                )
            return answer

    def close(self) -> None:
        """Ends the worker; the next row starts another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        process.communicate()


def _start(limits: RenderingLimits) -> subprocess.Popen[bytes]:
    """Starts a worker, and waits until it is ready."""
    # Isolated and without environment, so that whatever a template reaches holds nothing of ours. In a session of its
    # own, as a terminal's interrupt is for the parent.
    command = [sys.executable, "-I", "-m", "finetune_trainer.chat.sandbox.worker"]
    process = subprocess.Popen(
        [*command, str(limits.seconds), str(limits.mebibytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={},
        start_new_session=True,
    )

    try:
        _receive(process, LENGTH_BYTES)
    except EOFError:
        process.communicate()
        message = f"the process that renders chat templates ended with exit code {process.returncode} at its start"
        raise RuntimeError(message) from None
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
    """Sends a request and returns the answer: each is a length and JSON."""
    assert process.stdin is not None
    data = json.dumps(request, ensure_ascii=False).encode()
    process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "big"))
    process.stdin.write(data)
    process.stdin.flush()
    return _receive(process, MAX_ANSWER + 32 * len(data))


def _receive(process: subprocess.Popen[bytes], max_bytes: int) -> dict[str, Any]:
    """The next answer. Raises EOFError if the worker has ended, or if the answer is too long."""
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], POLL_SECONDS)[0]:
        wait_point()

    length = int.from_bytes(_read(process.stdout, LENGTH_BYTES), "big")
    if length > max_bytes:
        raise EOFError
    answer: dict[str, Any] = json.loads(_read(process.stdout, length))
    return answer


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


SHARED = RenderingProcess(RenderingLimits())
atexit.register(SHARED.close)
