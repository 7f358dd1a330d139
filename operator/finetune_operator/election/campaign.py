"""Reads and renews the Lease, and runs the leader's work for as long as this replica leads.

A round is one read of the Lease and, if the election says so, one write under the version that was read: of two
replicas that write at once, the API server refuses one. Rounds go on for ever on every replica, whether or not the API
server answers.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune_api.base import Json
from finetune_operator.desired.names import LEASE_NAME
from finetune_operator.election.election import RENEW_SECONDS, Election
from finetune_operator.election.record import LeaseRecord
from finetune_operator.errors import ApiError, ApiUnavailableError, ConflictError

FOLLOW_SECONDS = 1.0
"""Time between two rounds of a replica that does not lead: a leader that stops hands over within it."""

ROUND_SECONDS = 3.0
"""Time limit of a round, so that a request which hangs leaves time for another before the leadership ends."""

logger = logging.getLogger(__name__)


class LeaseCluster(Protocol):
    """Requests to Kubernetes that a campaign makes."""

    async def get_lease(self, namespace: str, name: str) -> Json | None: ...
    async def create_lease(self, lease: Json) -> Json: ...
    async def replace_lease(self, lease: Json) -> Json: ...


class Campaign:
    """One replica's part in the election."""

    def __init__(self, cluster: LeaseCluster, election: Election, namespace: str, name: str = LEASE_NAME) -> None:
        """`namespace`, `name`: those of the Lease."""
        self._cluster = cluster
        self._election = election
        self._lease = (namespace, name)
        self._last_round = time.monotonic()

    def round_age(self) -> float:
        """Seconds since the last round ended, whichever way."""
        return time.monotonic() - self._last_round

    async def run(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Campaign until cancelled, and run `lead` whenever this replica leads.

        `lead` is cancelled as soon as the leadership ends. When the campaign is cancelled, the Lease is handed over
        after `lead` has stopped. An error of `lead` ends the campaign.
        """
        try:
            while True:
                await self._round()
                if self._election.is_leading():
                    await self._lead(lead)
                await asyncio.sleep(FOLLOW_SECONDS)
        finally:
            await self._hand_over()

    async def _lead(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        logger.info("this replica leads, as %s", self._election.identity)
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(lead(), name="lead")
            await self._renew_until_lost()
            work.cancel()
        logger.warning("this replica does not lead any more: the Lease was not renewed in time, or somebody took it")

    async def _renew_until_lost(self) -> None:
        while (left := self._election.seconds_left()) > 0:
            # A round may not outlast the leadership that it is to prolong.
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await asyncio.sleep(RENEW_SECONDS)
                    await self._round()

    async def _round(self) -> None:
        """Make one round. Errors are logged: the next round is the answer to all of them."""
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                await self._read_and_claim()
        except ConflictError:
            logger.info("another replica wrote the Lease first")
        except TimeoutError:
            logger.warning("the Lease cannot be renewed: no answer within %.0f s", ROUND_SECONDS)
        except (ApiError, ApiUnavailableError) as error:
            logger.warning("the Lease cannot be renewed: %s", error)
        finally:
            self._last_round = time.monotonic()

    async def _read_and_claim(self) -> None:
        await self._read()
        claim = self._election.claim(_wall_clock())
        if claim is None:
            return

        sent = self._election.read_clock()
        write = self._cluster.replace_lease if claim.version else self._cluster.create_lease
        stored = await write(claim.to_wire(*self._lease))
        self._election.won(LeaseRecord.parse(stored), sent)

    async def _read(self) -> None:
        found = await self._cluster.get_lease(*self._lease)
        self._election.see(LeaseRecord.parse(found) if found else None)

    async def _hand_over(self) -> None:
        """Give the Lease up, if this replica holds it; otherwise the others would wait for its time to pass."""
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                # Read once more: a renewal may have been broken off after it was committed.
                await self._read()
                record = self._election.resign(_wall_clock())
                if record is not None:
                    await self._cluster.replace_lease(record.to_wire(*self._lease))
                    logger.info("handed the Lease over")
        except (ApiError, ApiUnavailableError, TimeoutError) as error:
            logger.warning("the Lease cannot be handed over: %s: %s", type(error).__name__, error)


def _wall_clock() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
