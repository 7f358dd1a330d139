"""Decides who leads, from what one replica sees of the Lease (pure).

No two machines' clocks are compared. A replica measures, on its own monotonic clock, how long it has seen no change of
the Lease, and takes it once that is longer than the Lease's own duration. A leader counts from the moment at which it
sent its last successful renewal, which is earlier than anybody could see it, and stands down `RENEW_DEADLINE_SECONDS`
later. So between the end of one leader and the beginning of the next lie at least 4 s, unless it hands over.

    sent renewal --- 8 s --> stands down ------- 4 s -------+
          seen by another --- 12 s without a change ------> takes the Lease
"""

import time
from collections.abc import Callable
from dataclasses import replace

from finetune_operator.election.record import LeaseRecord

LEASE_SECONDS = 12
RENEW_DEADLINE_SECONDS = 8.0
RENEW_SECONDS = 2.0

_NOBODY = LeaseRecord("", "", 0, "", "", 0, "")


class Election:
    """One replica's view: the newest record, and the time until which this replica itself leads."""

    def __init__(self, identity: str, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`identity`: unique to this process. `address`: host and port of its progress server."""
        self.identity = identity
        self._address = address
        self._clock = clock
        self._seen: LeaseRecord | None = None
        self._changed = 0.0  # reading of the clock at which `_seen` was new
        self._leads_until = float("-inf")

    @property
    def has_seen(self) -> bool:
        """True once the Lease was read, or found not to exist."""
        return self._seen is not None

    @property
    def leader_address(self) -> str:
        """Host and port of another replica's progress server, which leads; empty if none does."""
        seen = self._seen
        return seen.address if seen is not None and seen.holder not in ("", self.identity) else ""

    @property
    def reign(self) -> str:
        """Name of the holder's time, by the Lease: the same for as long as no other replica has led."""
        seen = self._seen or _NOBODY
        return f"{seen.holder} {seen.acquired} {seen.transitions}"

    def seconds_left(self) -> float:
        """Returns the time for which this replica leads without another renewal; 0 or less if it does not lead."""
        return self._leads_until - self._clock()

    def is_leading(self) -> bool:
        """True while this replica may write."""
        return self.seconds_left() > 0

    def see(self, record: LeaseRecord | None) -> None:
        """Takes in the Lease as it was just read; None: it does not exist."""
        record = record or _NOBODY
        if record != self._seen:
            self._seen, self._changed = record, self._clock()
        if record.holder != self.identity:
            self._leads_until = float("-inf")

    def claim(self, now: str) -> LeaseRecord | None:
        """Returns the record to write in order to become or stay the leader; None while another replica's time runs.

        `now`: the wall clock, for people.
        """
        seen = self._seen
        if seen is None or not self._may_take(seen):
            return None

        if seen.holder == self.identity:
            return replace(seen, renewed=now, seconds=LEASE_SECONDS)
        transitions = seen.transitions + 1 if seen.version else 0
        return LeaseRecord(self.identity, self._address, LEASE_SECONDS, now, now, transitions, seen.version)

    def won(self, record: LeaseRecord, sent: float) -> None:
        """Takes in a record of this replica's own, as the API server stored it. `sent`: the clock's reading before the
        request was sent."""
        self.see(record)
        self._leads_until = sent + RENEW_DEADLINE_SECONDS

    def resign(self, now: str) -> LeaseRecord | None:
        """Ends this replica's leadership; returns the record that lets others lead at once, None if it did not hold
        the Lease. `now`: the wall clock, for people."""
        self._leads_until = float("-inf")
        seen = self._seen
        if seen is None or seen.holder != self.identity:
            return None
        return replace(seen, holder="", address="", renewed=now)

    def read_clock(self) -> float:
        """Returns the reading of the clock, in seconds."""
        return self._clock()

    def _may_take(self, seen: LeaseRecord) -> bool:
        if seen.holder in ("", self.identity):
            return True
        return self._clock() - self._changed > seen.seconds
