"""A request to stop, as every loop, read and transfer sees it.

Nothing is raised where a signal arrives: libraries catch exceptions that they do not know (botocore, torch's imports
and jinja2 were seen to), and the request would be lost. A signal only sets a flag. Our code looks at it with
`stop_point`, and waits for others through `run_abandonable`, whose work is left alone once the flag is set.

Signals belong to the process, and so does the flag; `job/stop_signal.py` sets it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.signs_of_life import beat

Value = TypeVar("Value")
POLL_SECONDS = 0.05
ABANDONABLE = "abandonable"
"""Name of the threads that work on what may be left alone."""


class StopRequest:
    """The flag, and whether something is being finished first."""

    def __init__(self) -> None:
        self.cause: str | None = None
        """Name of the signal; None: nobody asked to stop."""
        self.finishing = 0
        """Sections that are under way and that a stop waits for."""
        self.interruptible_since = time.monotonic()
        """The time at which the last such section ended."""


_request = StopRequest()
_commits = threading.Lock()


def reset() -> None:
    """Begins with a clean flag."""
    global _request
    _request = StopRequest()


def request_stop(cause: str) -> None:
    """Sets the flag. Safe in a signal handler: it takes no lock."""
    _request.cause = _request.cause or cause


def is_requested() -> bool:
    """True once the flag is set."""
    return _request.cause is not None


def raise_if_requested() -> None:
    """Raises InterruptedRunError if the flag is set, also within `finishing`. Else a sign of life."""
    beat()
    if _request.cause is not None:
        raise InterruptedRunError(f"stopped by {_request.cause}")


def stop_point() -> None:
    """Raises InterruptedRunError if the flag is set and nothing has to be finished first. Else a sign of life: for code
    that gets on, not for code that waits."""
    beat()
    wait_point()


def wait_point() -> None:
    """Like `stop_point`, for code that waits: no sign of life."""
    if _request.cause is not None and not _request.finishing:
        raise InterruptedRunError(f"stopped by {_request.cause}")


@contextmanager
def finishing() -> Iterator[None]:
    """Makes a stop wait for the code inside: a step with its checkpoint, or a commit. For the main thread."""
    _request.finishing += 1
    try:
        yield
    finally:
        _request.finishing -= 1
        _request.interruptible_since = time.monotonic()


@contextmanager
def committing(patience: float = -1) -> Iterator[None]:
    """Makes an end of the process by our own hand wait for the code inside, even one that a person asks for now.

    For a commit on this machine, which takes moments; and for whoever ends the process, so that what it sees of the
    commit stays true. `patience`: seconds after which the latter does not wait any more; -1 waits for ever.
    """
    is_locked = _commits.acquire(timeout=patience)
    try:
        yield
    finally:
        if is_locked:
            _commits.release()


def interruptible_since() -> float | None:
    """Time (monotonic) since which a stop has nothing to wait for; None while something is being finished."""
    return None if _request.finishing else _request.interruptible_since


def run_abandonable(action: Callable[[], Value]) -> Value:
    """Returns what `action` returns; once a stop is requested, raises InterruptedRunError and leaves it alone.

    Only the main thread needs that, and only where nothing has to be finished: elsewhere `action` is just called. What
    is left alone goes on until the process ends, so it must not write to a file that its caller closes.
    """
    wait_point()
    if _request.finishing or threading.current_thread() is not threading.main_thread():
        return action()

    result = _begin(action)
    while True:
        try:
            value: Value = _take(result, POLL_SECONDS)
            return value
        except Empty:
            wait_point()


def run_within(seconds: float, action: Callable[[], Any]) -> bool:
    """Runs `action` and waits for it, at most so long; returns True if it has ended by then. Raises its error."""
    try:
        _take(_begin(action), seconds)
    except Empty:
        return False
    return True


def _begin(action: Callable[[], Value]) -> SimpleQueue[tuple[Value | None, BaseException | None]]:
    """Runs `action` on a thread of its own, which no exit of the process waits for."""
    result: SimpleQueue[tuple[Value | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            result.put((action(), None))
        except BaseException as error:  # noqa: BLE001 (raised again by whoever waits)
            result.put((None, error))

    threading.Thread(target=run, name=ABANDONABLE, daemon=True).start()
    return result


def _take(result: SimpleQueue[tuple[Any, BaseException | None]], seconds: float) -> Any:
    value, error = result.get(timeout=seconds)
    if error is not None:
        raise error
    return value
