"""The last sign of life of the run: whatever gets on calls `beat`, and the watchdog (job/watchdog.py) reads it.

Signs are a finished pass or step, a row, a tensor, bytes of a transfer, an answer of a store, even a refusal. Code that
only waits gives none. They belong to the process, as its threads all work for one run.
"""

import time


class _Life:
    last = time.monotonic()


def beat() -> None:
    """Notes a sign of life. Cheap enough for every row; safe on every thread."""
    _Life.last = time.monotonic()


def last_beat() -> float:
    """Returns the time (monotonic) of the last sign."""
    return _Life.last
