"""Open connections to the progress server, and who has to leave when there are too many.

Connections cost memory before anything is known about them: TLS takes a quarter of a MiB for each. Whoever has sent
half a request leaves first, so that a flood only displaces itself.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_operator.metrics.series import CONNECTIONS, REFUSED_CONNECTIONS
from finetune_operator.reports.limits import Allowances

MAX_CONNECTIONS = 256
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

    awaits_request: bool = True
    """True until the whole request has been received."""


class Visits:
    """All open connections, by address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[Address, Visit] = {}  # oldest first
        self._allowances: Allowances[str] = Allowances(CONNECTION_BURST, CONNECTIONS_PER_SECOND)

    def enter(self, address: Address, leave: Callable[[], object]) -> bool:
        """Admits a connection, perhaps instead of an older one; False if it is refused."""
        peer = str(address[0])
        is_admitted = self._allowances.take(peer, self._clock()) and self._make_room(peer)
        if is_admitted:
            self._open[address] = Visit(peer, leave)
        else:
            REFUSED_CONNECTIONS.inc()
        CONNECTIONS.set(len(self._open))
        return is_admitted

    def _make_room(self, peer: str) -> bool:
        """Dismisses connections of whoever has too many; False if that is not enough."""
        counts = Counter(visit.peer for visit in self._open.values())
        if counts[peer] >= MAX_CONNECTIONS_OF_PEER and not self._dismiss_one_of(peer):
            return False
        return len(self._open) < MAX_CONNECTIONS or self._dismiss_one_of(counts.most_common(1)[0][0])

    def receive(self, address: Address) -> None:
        """Notes that a connection has sent its whole request; it is not dismissed any more."""
        if address in self._open:
            self._open[address].awaits_request = False

    def end(self, address: Address) -> None:
        """Forgets a connection that is closed."""
        self._open.pop(address, None)
        CONNECTIONS.set(len(self._open))

    def _dismiss_one_of(self, peer: str) -> bool:
        """Closes the peer's oldest connection that still awaits its request; False if there is none."""
        waiting = (address for address, visit in self._open.items() if visit.peer == peer and visit.awaits_request)
        oldest = next(waiting, None)
        if oldest is None:
            return False

        self._open.pop(oldest).leave()
        return True
