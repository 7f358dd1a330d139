"""Lets writes through for as long as this replica leads.

A leader that loses the Lease has its workers cancelled, which breaks off their requests. A process that was stopped for
a while (SIGSTOP, a paused machine) wakes up in the middle of its work instead: this check keeps it from sending.
"""

from typing import Any

from finetune_api.base import Json
from finetune_operator.cluster.cluster import Connection
from finetune_operator.cluster.server_clock import ServerClock
from finetune_operator.election.election import Election
from finetune_operator.errors import ApiUnavailableError


class FencedConnection:
    """A connection on which only the leader may write."""

    def __init__(self, connection: Connection, election: Election) -> None:
        self._connection = connection
        self._election = election

    @property
    def clock(self) -> ServerClock:
        """The API server's clock."""
        return self._connection.clock

    async def request(self, verb: str, path: str, body: Json | None = None, **options: Any) -> Json:
        """Send one request and return the decoded answer; raises ApiError or ApiUnavailableError."""
        if verb != "GET" and not self._election.is_leading():
            raise ApiUnavailableError(f"{verb} {path}: not sent, because this replica does not lead any more")
        return await self._connection.request(verb, path, body, **options)
