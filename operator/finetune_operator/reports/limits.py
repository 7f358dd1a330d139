"""Bounded memory for the progress server: allowances by key, and answers that are remembered for a while.

Strangers choose the keys, so both forget the entry that was used longest ago when they are full.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_KEYS = 10_000

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class _Bucket:
    allowance: float
    counted: float
    """Clock reading, in seconds, at which `allowance` was counted last."""


class Allowances(Generic[K]):
    """A token bucket for each key: `burst` at once, `per_second` in the long run."""

    def __init__(self, burst: float, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._buckets: OrderedDict[K, _Bucket] = OrderedDict()

    def take(self, key: K, seconds: float) -> bool:
        """Counts one use of a key; False if none is left. `seconds` is the reading of a monotonic clock."""
        # A key that is not known finds a full bucket.
        bucket = self._buckets.setdefault(key, _Bucket(self._burst, seconds))
        self._buckets.move_to_end(key)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)

        bucket.allowance = min(self._burst, bucket.allowance + (seconds - bucket.counted) * self._per_second)
        bucket.counted = seconds
        if bucket.allowance < 1:
            return False

        bucket.allowance -= 1
        return True


class Remembered(Generic[K, V]):
    """Answers by key, each for `seconds` after it was given."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._answers: OrderedDict[K, tuple[float, V]] = OrderedDict()  # with the time at which each ends

    def get(self, key: K, now: float) -> V | None:
        """Returns the answer, or None if none was given lately."""
        end, answer = self._answers.get(key, (now, None))
        return answer if now < end else None

    def put(self, key: K, answer: V, now: float) -> None:
        """Keeps an answer."""
        self._answers[key] = (now + self._seconds, answer)
        self._answers.move_to_end(key)
        if len(self._answers) > MAX_KEYS:
            self._answers.popitem(last=False)

    def clear(self) -> None:
        """Forgets every answer."""
        self._answers.clear()

    def drop(self, key: K) -> None:
        """Forgets an answer."""
        self._answers.pop(key, None)
