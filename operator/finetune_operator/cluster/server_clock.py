"""The API server's clock, as far as its answers tell: the operator's only source of the time of day.

Times of conditions, Jobs and pods come from the control plane, and durations are differences to them. A machine whose
own clock is an hour ahead would end jobs an hour early, and a clock that jumps would do so at any moment. Each answer
names the time at which it was made (its `Date` header, in whole seconds), which lies between the request and its
arrival. Between two answers, the monotonic clock goes on, which nobody sets.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

RESOLUTION = timedelta(seconds=1)  # of a Date header


class ServerClock:
    """An estimate that is no further from the truth than the quickest answers took."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._time: datetime | None = None
        self._read_at = 0.0
        """Reading of the monotonic clock, in seconds, at which `_time` was the time."""

    def now(self) -> datetime:
        """Returns the time in whole seconds, as Kubernetes writes it. Before the first answer it is this machine's."""
        known = self._estimate(self._monotonic())
        return (known or datetime.now(UTC)).replace(microsecond=0)

    def note(self, date: str | None, sent: float) -> None:
        """Learn from an answer. `date`: its Date header; `sent`: reading of the monotonic clock before the request."""
        answered = _parse(date)
        if answered is None:
            return

        received = self._monotonic()
        latest = answered + RESOLUTION + timedelta(seconds=received - sent)
        # An estimate that the answer allows stays, so that slow answers do not move it.
        self._time = min(max(self._estimate(received) or answered, answered), latest)
        self._read_at = received

    def _estimate(self, reading: float) -> datetime | None:
        return None if self._time is None else self._time + timedelta(seconds=reading - self._read_at)


def _parse(date: str | None) -> datetime | None:
    """Reads a Date header; a proxy may have removed it, or may have written anything."""
    try:
        return parsedate_to_datetime(date).astimezone(UTC) if date else None
    except ValueError:
        return None
