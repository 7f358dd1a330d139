"""The parent's side of the worker: one process for all templates, started when a row needs it and again when a
template has killed it."""

import atexit
import json
import logging
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import IO, Any

log = logging.getLogger(__name__)
LENGTH_BYTES = 8
MAX_ANSWER = 2**26  # bytes, and as much again as 32 times the request: more than the worker itself lets through


@dataclass(frozen=True)
class RenderingLimits:
    """What one row may take."""

    seconds: int = 20
    """Of CPU time."""
    mebibytes: int = 2048
    """Of the worker's address space; a row of 64 MiB takes about ten copies of itself."""


@dataclass(frozen=True)
class TemplateSetup:
    """A template and what it may print."""

    template: str
    variables: dict[str, Any]
    """The tokenizer's special tokens by name."""
    special_tokens: tuple[str, ...]


class LimitError(Exception):
    """A row took more than the limits."""


class RenderingProcess:
    """Renders rows; safe to use from several threads."""

    def __init__(self, limits: RenderingLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._setup: TemplateSetup | None = None

    def ask(self, setup: TemplateSetup, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises LimitError where it ended over the request."""
        with self._lock:
            if self._process is None:
                self._process, self._setup = _start(self._limits), None
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
            if answer.get("error") == "memory":
                limits = self._limits
                raise LimitError(f"it takes more than {limits.seconds} s or {limits.mebibytes} MiB for one row")
            return answer

    def close(self) -> None:
        """End the worker; the next row starts another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        process.communicate()


def _start(limits: RenderingLimits) -> subprocess.Popen[bytes]:
    # Isolated and without environment: what a template might reach has nothing of ours. A session of its own: a
    # terminal's interrupt is for the parent.
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
        raise RuntimeError(
            f"the process that renders chat templates ended with {process.returncode} at its start"
        ) from None
    return process


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    data = json.dumps(request, ensure_ascii=False).encode()
    process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "big"))
    process.stdin.write(data)
    process.stdin.flush()
    return _receive(process, MAX_ANSWER + 32 * len(data))


def _receive(process: subprocess.Popen[bytes], most: int) -> dict[str, Any]:
    """One frame of at most so many bytes."""
    assert process.stdout is not None
    length = int.from_bytes(_read(process.stdout, LENGTH_BYTES), "big")
    if length > most:
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
