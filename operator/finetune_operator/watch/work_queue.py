"""A queue of keys that are due at certain times, as in every Kubernetes controller.

One change of a job arrives as many events: of the job, of its child Jobs, of their pods. Two workers must never
reconcile the same job at once, and ten events need only one reconcile. A job whose reconcile failed is tried again
later and later, and one that waits for a deadline is looked at on time. kopf's own queues cannot do this, because they
are per watched object: a pod and its Job that change together would start two reconciles.

Concepts: a *key* names what is worked on. It is *due* at one time at most; adding it again can only make that earlier.
A worker that took a key makes it *active* until `done`; a key that falls due while it is active waits for that.
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
    """Keys with due times. A key that is added while it is active is due again afterwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []  # may hold entries that an earlier due time replaced
        self._numbers = itertools.count()  # the order among equal times; keys need not be comparable
        self._active: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: K, delay: float = 0.0) -> None:
        """Make `key` due after `delay` seconds, unless it is due sooner already."""
        due = self._clock() + delay
        if due >= self._due.get(key, float("inf")):
            return

        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._numbers), key))
        self._changed.set()

    def add_after_failure(self, key: K, at_least: float = 0.0) -> float:
        """Make `key` due after a delay that doubles with each failure in a row, on top of `at_least` seconds; returns
        the delay in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1

        # 2 ** 16 exceeds every limit; without the cap the power would grow for as long as the failures last.
        longest = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(failures, 16))
        delay: float = at_least + longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter is no secret)
        self.add(key, delay)
        return delay

    def succeeded(self, key: K) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Wait for a key that is due and not active, and make it active; the caller must call `done`."""
        while True:
            taken, wait = self._take()
            if taken:
                return taken[0]

            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        """End the work on a key."""
        self._active.discard(key)
        self._changed.set()

    def _take(self) -> tuple[tuple[K, ...], float | None]:
        """Make the next key active and return it, or return () and the seconds until one is due (None: wait for a
        change). A tuple, because any value may be a key, None as well."""
        held_back: list[tuple[float, int, K]] = []
        found: tuple[K, ...] = ()
        wait: float | None = None

        while self._heap:
            due, _, key = entry = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)  # replaced by an earlier time
                continue

            remaining = due - self._clock()
            if remaining > 0:
                wait = remaining
                break

            heapq.heappop(self._heap)
            if key in self._active:
                held_back.append(entry)
                continue
            found = (key,)
            break

        # Active keys stay due: `done` wakes the workers, who then find them here.
        for entry in held_back:
            heapq.heappush(self._heap, entry)

        for key in found:
            del self._due[key]
            self._active.add(key)
        return found, wait
