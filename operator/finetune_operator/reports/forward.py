"""Takes reports on every replica: those that do not lead pass them on to the leader.

A follower checks nothing and remembers nothing; it hands over the body and the trainer's token as they came. So one
place knows sequence numbers, rates and ended jobs, whichever replica a trainer's connection reaches. The leader's
address needs no trust: the leader proves itself by the certificate of the progress server, as it does to trainers. A
trainer that is told 503 keeps its state and reports again.
"""

import logging
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from finetune_operator.cluster.scrapers import METRICS_PATH
from finetune_operator.election.election import Election
from finetune_operator.reports.certificate import trust_authority
from finetune_operator.reports.visits import MAX_CONNECTIONS_OF_PEER

FORWARDED_HEADER = "Finetune-Forwarded"
"""Marks a report that another replica has passed on: it is not passed on again."""

MAX_CONNECTIONS = MAX_CONNECTIONS_OF_PEER // 2
"""Connections to the leader at once, to which this replica is one peer; further reports wait for one of them."""

TIMEOUT = aiohttp.ClientTimeout(total=5)  # a trainer waits 10 s

logger = logging.getLogger(__name__)


class LeaderLink:
    """Connections to the leader's progress server."""

    def __init__(self, election: Election, progress_url: str, tls_dir: Path) -> None:
        """`progress_url`: its host is the name in the leader's certificate."""
        tls = trust_authority(tls_dir)
        self._election = election
        self._server_name = urlsplit(progress_url).hostname
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=MAX_CONNECTIONS),
            timeout=TIMEOUT,
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    def middleware(self) -> Middleware:
        """Returns the middleware of the progress server: the leader's own handler answers, or the leader's answer is
        passed back."""

        @web.middleware
        async def forward(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self._election.is_leading() or request.path == METRICS_PATH:  # each replica has metrics of its own
                return await handler(request)

            address = self._election.leader_address
            if not address or FORWARDED_HEADER in request.headers:
                return _unavailable("no replica of the operator leads at the moment")
            return await self._forward(request, address)

        return forward

    async def _forward(self, request: web.Request, address: str) -> web.Response:
        headers: dict[str, Any] = {FORWARDED_HEADER: "1", "Content-Type": "application/json"}
        headers["Authorization"] = request.headers.get("Authorization", "")
        body = await request.read()

        try:
            async with self._session.request(
                request.method,
                f"https://{address}{request.path_qs}",
                data=body,
                headers=headers,
                server_hostname=self._server_name,
                allow_redirects=False,
            ) as answer:
                kept = {
                    name: answer.headers[name] for name in ("Retry-After", "Content-Type") if name in answer.headers
                }
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.info("a report did not reach the leader at %s: %s: %s", address, type(error).__name__, error)
            return _unavailable("the leader of the operator does not answer")


def _unavailable(found: str) -> web.Response:
    answer = {"reason": "Unavailable", "message": f"{found}: report again later"}
    return web.json_response(answer, status=503, headers={"Retry-After": "5"})  # seconds
