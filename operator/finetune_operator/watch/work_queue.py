"""A queue of keys that are due at certain times, as in every Kubernetes controller, with two lanes.

One change of a job arrives as many events: of the job, of its child Jobs, of their pods. Two workers must never
reconcile the same job at once, and ten events need only one reconcile. A job whose reconcile failed is tried again
later and later, and one that waits for a deadline is looked at on time. kopf's own queues cannot do this, because they
are per watched object: a pod and its Job that change together would start two reconciles.

An event must not wait until a thousand jobs have been looked at only because the operator has started. So what is due
in the background comes out when nothing else is due; but after `URGENT_IN_A_ROW` others it gets a turn, and never
starves.

Concepts: a *key* names what is worked on. It is *due* at one time at most in each *lane*; adding it again can only make
that earlier. A worker that took a key makes it *active* until `done`; a key that falls due while it is active waits for
that. Taking a key answers both lanes: whatever made it due before, it is looked at now.
"""

import asyncio
import heapq
import itertools
import random
import time
from collections.abc import Callable, Container
from contextlib import suppress
from enum import Enum, auto
from typing import Generic, TypeVar

K = TypeVar("K")

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 60.0
URGENT_IN_A_ROW = 8


class Lane(Enum):
    """Order among the keys that are due."""

    URGENT = auto()
    BACKGROUND = auto()


class _DueKeys(Generic[K]):
    """Keys of one lane, each with the time at which it is due."""

    def __init__(self) -> None:
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []  # may hold entries that an earlier due time replaced
        self._numbers = itertools.count()  # the order among equal times; keys need not be comparable

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: K, due: float) -> bool:
        """Make a key due at a time; False if it is due sooner already."""
        if due >= self._due.get(key, float("inf")):
            return False

        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._numbers), key))
        return True

    def discard(self, key: K) -> None:
        """Take a key out, if it is here."""
        self._due.pop(key, None)

    def find(self, now: float, active: Container[K]) -> tuple[tuple[K, ...], float | None]:
        """Returns the first key that is due and not active, or () and the seconds until one is due (None: wait for a
        change). A tuple, because any value may be a key, None as well."""
        held_back: list[tuple[float, int, K]] = []
        found: tuple[K, ...] = ()
        wait: float | None = None

        while self._heap and not found:
            due, _, key = entry = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)  # taken, or replaced by an earlier time
                continue

            if due > now:
                wait = due - now
                break

            heapq.heappop(self._heap)
            held_back.append(entry)
            if key not in active:
                found = (key,)

        # Active keys stay due: `done` wakes the workers, who then find them here.
        for entry in held_back:
            heapq.heappush(self._heap, entry)
        return found, wait


class WorkQueue(Generic[K]):
    """Keys with due times. A key that is added while it is active is due again afterwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lanes: dict[Lane, _DueKeys[K]] = {lane: _DueKeys() for lane in Lane}
        self._urgent_in_a_row = 0
        self._active: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(len(due) for due in self._lanes.values())

    def is_active(self, key: K) -> bool:
        """True while a worker has the key."""
        return key in self._active

    def add(self, key: K, delay: float = 0.0, lane: Lane = Lane.URGENT) -> None:
        """Make `key` due after `delay` seconds, unless it is due sooner in this lane already."""
        if self._lanes[lane].add(key, self._clock() + delay):
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
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):  # before Python 3.12, `wait_for` may swallow a cancellation
                    await self._changed.wait()

    def done(self, key: K) -> None:
        """End the work on a key."""
        self._active.discard(key)
        self._changed.set()

    def _take(self) -> tuple[tuple[K, ...], float | None]:
        """Make the next key active and return it, or return () and the seconds until one is due, as `find` does."""
        now, waits = self._clock(), []
        has_turn = self._urgent_in_a_row >= URGENT_IN_A_ROW

        for lane in reversed(Lane) if has_turn else Lane:
            found, wait = self._lanes[lane].find(now, self._active)
            for key in found:
                self._urgent_in_a_row = self._urgent_in_a_row + 1 if lane is Lane.URGENT else 0
                self._active.add(key)
                for due in self._lanes.values():
                    due.discard(key)
                return found, None
            waits += [] if wait is None else [wait]

        return (), min(waits, default=None)
