"""GET /metrics on the progress server, for whoever the API server lets read it.

Metrics say how many jobs a company runs and why they fail, so they are neither public nor in the clear. The answer to a
token is remembered for a while, and a peer may cause only so many requests to the API server.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from finetune_api.base import Json
from finetune_operator.cluster.scrapers import METRICS_PATH
from finetune_operator.errors import ApiError, ApiUnavailableError, ReportRefusedError
from finetune_operator.metrics.series import REGISTRY
from finetune_operator.reports.checks import bearer_token
from finetune_operator.reports.limits import Allowances, Remembered

REVIEWED_SECONDS = 60.0
LOOKUP_BURST = 10.0  # unknown tokens of one peer at once
LOOKUPS_PER_SECOND = 0.5

logger = logging.getLogger(__name__)


class Reviewer(Protocol):
    """Requests that a scrape may need."""

    async def find_user(self, token: str) -> Json | None: ...
    async def may_read(self, user: Json) -> bool: ...


class MetricsRoute:
    """The handler of /metrics."""

    def __init__(
        self, reviewer: Reviewer, refresh: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`refresh` sets the gauges that are read when they are asked for."""
        self._reviewer = reviewer
        self._refresh = refresh
        self._clock = clock
        self._admitted: Remembered[bytes, bool] = Remembered(REVIEWED_SECONDS)
        self._refused: Remembered[bytes, ReportRefusedError] = Remembered(REVIEWED_SECONDS)
        self._allowances: Allowances[str] = Allowances(LOOKUP_BURST, LOOKUPS_PER_SECOND)

    def add_to(self, app: web.Application) -> None:
        """Add the route to the progress server."""
        app.add_routes([web.get(METRICS_PATH, self._answer)])

    async def _answer(self, request: web.Request) -> web.Response:
        token = bearer_token(request.headers.get("Authorization", ""))
        await self._admit(token, request.remote or "")

        self._refresh()
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _admit(self, token: str, peer: str) -> None:
        """Raise ReportRefusedError unless the token may read metrics."""
        key = hashlib.sha256(token.encode()).digest()
        now = self._clock()
        if (refusal := self._refused.get(key, now)) is not None:
            raise ReportRefusedError(refusal.status, refusal.reason, refusal.message)
        if self._admitted.get(key, now):
            return

        if not self._allowances.take(peer, now):
            raise ReportRefusedError(429, "TooManyTokens", "this address sends too many new tokens: ask later")
        refusal = await self._find_refusal(token)
        if refusal is not None:
            self._refused.put(key, refusal, now)
            raise refusal
        self._admitted.put(key, True, now)

    async def _find_refusal(self, token: str) -> ReportRefusedError | None:
        """Returns the refusal, or None if the token may read metrics. Raises ReportRefusedError (503) if nobody can
        say."""
        try:
            user = await self._reviewer.find_user(token)
            if user is None:
                return ReportRefusedError(401, "Unauthorized", "the token is not valid")
            if not await self._reviewer.may_read(user):
                needed = 'a ClusterRole with nonResourceURLs: ["/metrics"] and the verb get'
                return ReportRefusedError(
                    403, "Forbidden", f"{user.get('username')} may not read metrics: bind {needed}"
                )
        except (ApiError, ApiUnavailableError) as error:
            logger.warning("a scraper cannot be checked: %s", error)
            raise ReportRefusedError(503, "Unavailable", "the Kubernetes API server does not answer") from error
        return None
