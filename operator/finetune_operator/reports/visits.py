"""Open connections to the progress server, and who has to leave when there are too many.

Connections cost memory before anything is known about them. Whoever has sent half a request leaves first, so that a
flood only displaces itself. A trainer whose report was accepted keeps its connection for the next one, as TLS costs
more than the report. It keeps it for some minutes: then it connects again, and may reach another replica.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_operator.metrics.series import CONNECTIONS, REFUSED_CONNECTIONS
from finetune_operator.reports.limits import Allowances

MAX_CONNECTIONS = 256  # without those that are kept
MAX_KEPT = 256  # beyond, each report has a connection of its own
KEPT_SECONDS = 300.0  # age of the oldest connection that is kept
MAX_CONNECTIONS_OF_PEER = 64  # pods may share an address behind a gateway
CONNECTION_BURST = 500.0  # connections of one peer at once
CONNECTIONS_PER_SECOND = 400.0

Address = tuple[Any, ...]
"""Address of a peer as a socket names it; starts with host and port."""


@dataclass(eq=False)
class Visit:
    """One open connection."""

    peer: str
    leave: Callable[[], object]
    """Ends the connection."""

    rest: Callable[[], object]
    """Gives the connection time until its next request begins."""

    since: float
    """Clock reading, in seconds, at which the connection was made."""

    awaits_request: bool = True
    """True until a whole request has been received, and again once it was answered."""

    is_kept: bool = False
    """True once a report was accepted, and the connection stays open for the next one."""


class Visits:
    """All open connections, by address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[Address, Visit] = {}  # oldest first
        self._allowances: Allowances[str] = Allowances(CONNECTION_BURST, CONNECTIONS_PER_SECOND)

    def enter(self, address: Address, leave: Callable[[], object], rest: Callable[[], object]) -> bool:
        """Admits a connection, perhaps instead of an older one; False if it is refused."""
        peer = str(address[0])
        now = self._clock()
        is_admitted = self._allowances.take(peer, now) and self._make_room(peer)
        if is_admitted:
            self._open[address] = Visit(peer, leave, rest, since=now)
        else:
            REFUSED_CONNECTIONS.inc()
        CONNECTIONS.set(len(self._open))
        return is_admitted

    def _make_room(self, peer: str) -> bool:
        """Dismisses connections of whoever has too many; False if that is not enough."""
        of_peer = sum(visit.peer == peer for visit in self._open.values())
        if of_peer >= MAX_CONNECTIONS_OF_PEER and not self._dismiss_one_of(peer):
            return False

        strangers = Counter(visit.peer for visit in self._open.values() if not visit.is_kept)
        return strangers.total() < MAX_CONNECTIONS or self._dismiss_one_of(strangers.most_common(1)[0][0])

    def receive(self, address: Address) -> None:
        """Notes that a connection has sent its whole request; it is not dismissed any more."""
        if address in self._open:
            self._open[address].awaits_request = False

    def keep(self, address: Address) -> bool:
        """Keeps the connection of an accepted report for the next one; False if the answer has to close it."""
        visit = self._open.get(address)
        if visit is None or self._clock() - visit.since > KEPT_SECONDS:
            return False
        if not visit.is_kept and sum(each.is_kept for each in self._open.values()) >= MAX_KEPT:
            return False

        visit.is_kept = visit.awaits_request = True
        visit.rest()
        return True

    def end(self, address: Address) -> None:
        """Forgets a connection that is closed."""
        self._open.pop(address, None)
        CONNECTIONS.set(len(self._open))

    def _dismiss_one_of(self, peer: str) -> bool:
        """Closes the peer's oldest connection that awaits a request, a kept one last; False if there is none."""
        waiting = [each for each, visit in self._open.items() if visit.peer == peer and visit.awaits_request]
        if not waiting:
            return False

        first = min(waiting, key=lambda each: self._open[each].is_kept)
        self._open.pop(first).leave()
        return True
