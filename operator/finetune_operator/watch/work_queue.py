"""A queue of keys: each waits at most once, is worked on by one worker at a time, and never sooner than asked for.

kopf's own queues are per watched object, and would run the same job twice at once when its pod and its Job change
together.
"""

import asyncio
import heapq
import itertools
import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 60.0


class WorkQueue(Generic[K]):
    """Keys with due times. A key that is added while it is worked on is due again afterwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = itertools.count()
        self._active: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: K, delay: float = 0.0) -> None:
        """Have `key` worked on after `delay` seconds, or sooner if that was asked for before."""
        due = self._clock() + delay
        if due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._numbers), key))
        self._changed.set()

    def add_after_failure(self, key: K) -> float:
        """Have `key` worked on again after a back-off that doubles with each failure in a row; returns the delay."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        longest = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(failures, 16))
        delay: float = longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter is no secret)
        self.add(key, delay)
        return delay

    def succeeded(self, key: K) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Wait for a key that is due and that nobody works on; `done` must follow."""
        while True:
            key, wait = self._next()
            if key is not None:
                return key
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        """The work on a key has ended."""
        self._active.discard(key)
        self._changed.set()

    def _next(self) -> tuple[K | None, float | None]:
        """A key to work on, or how long to wait for one (None: until something changes)."""
        held_back: list[tuple[float, int, K]] = []
        found: K | None = None
        wait: float | None = None
        while self._heap:
            due, _, key = entry = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)  # superseded by an earlier time
                continue
            remaining = due - self._clock()
            if remaining > 0:
                wait = remaining
                break
            heapq.heappop(self._heap)
            if key in self._active:
                held_back.append(entry)
                continue
            found = key
            break
        for entry in held_back:
            heapq.heappush(self._heap, entry)
        if found is not None:
            del self._due[found]
            self._active.add(found)
        return found, wait
