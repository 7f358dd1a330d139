"""HTTP to the API server, under the operator's own service account.

aiohttp rather than the `kubernetes` client: that one blocks. The token is read again every minute, because the kubelet
renews it; kopf uses a session made here too.
"""

import json
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

import aiohttp

from finetune_api.base import Json
from finetune_operator.errors import ApiError, ApiUnavailableError, ConflictError, ForbiddenError, NotFoundError

TOKEN_SECONDS = 60.0
TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=10)
APPLY = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"

_Handler = Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
_ERRORS: dict[int, type[ApiError]] = {403: ForbiddenError, 404: NotFoundError, 409: ConflictError}


class _BearerToken:
    """Middleware that adds the service account's current token to every request."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = ""
        self._expires = 0.0

    async def __call__(self, request: aiohttp.ClientRequest, handler: _Handler) -> aiohttp.ClientResponse:
        now = time.monotonic()
        if now >= self._expires:
            self._header = f"Bearer {self._path.read_text().strip()}"
            self._expires = now + TOKEN_SECONDS
        request.headers["Authorization"] = self._header
        return await handler(request)


def open_session(service_account_dir: Path) -> aiohttp.ClientSession:
    """A session that trusts the cluster's authority and carries the service account's token."""
    context = ssl.create_default_context(cafile=str(service_account_dir / "ca.crt"))
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=0),
        middlewares=(_BearerToken(service_account_dir / "token"),),
        headers={"User-Agent": "finetune-operator"},
    )


class ApiConnection:
    """Requests to the API server, with its refusals as our errors."""

    def __init__(self, api_url: str, session: aiohttp.ClientSession) -> None:
        self._api_url = api_url
        self._session = session

    @classmethod
    def open(cls, api_url: str, service_account_dir: Path) -> Self:
        """Connect under a service account."""
        return cls(api_url, open_session(service_account_dir))

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def request(
        self,
        verb: str,
        path: str,
        body: Json | None = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Json:
        """One request; raises ApiError or ApiUnavailableError."""
        headers = {"Accept": accept} | ({"Content-Type": content_type} if body is not None else {})
        data = None if body is None else json.dumps(body)
        label = f"{verb} {path}"
        try:
            async with self._session.request(
                verb, self._api_url + path, params=query, data=data, headers=headers, timeout=TIMEOUT
            ) as response:
                text = await response.text()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnavailableError(f"{label}: {type(error).__name__}: {error}") from error
        if status == 429 or status >= 500:
            raise ApiUnavailableError(f"{label}: {status}: {_message(text)}")
        if status >= 400:
            raise _ERRORS.get(status, ApiError)(status, label, _message(text))
        answer: Json = json.loads(text)
        return answer


def _message(text: str) -> str:
    """What the API server says in its Status object; a proxy in between may answer anything."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
