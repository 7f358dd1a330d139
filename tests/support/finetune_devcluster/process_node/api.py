"""The few calls that a kubelet makes, on asyncio: one connection pool, no generated client."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

Object = dict[str, Any]
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"


class ApiError(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """Kubernetes API of one kubeconfig (client certificates; JSON is YAML)."""

    def __init__(self, kubeconfig: Path) -> None:
        document = json.loads(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self.url = str(cluster["server"])
        self.ca_file = str(cluster["certificate-authority"])
        self._tls = ssl.create_default_context(cafile=self.ca_file)
        self._tls.load_cert_chain(user["client-certificate"], user["client-key"])
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            self.url, connector=aiohttp.TCPConnector(ssl=self._tls, limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()

    async def call(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Object:
        """One request; raises ApiError for 4xx and 5xx. Waits for an API server that does not answer, as a kubelet
        does."""
        while True:
            try:
                return await self._call_once(method, path, body, kind)
            except (aiohttp.ClientConnectionError, TimeoutError):
                await asyncio.sleep(1)

    async def _call_once(self, method: str, path: str, body: Any, kind: str) -> Object:
        assert self._session
        data = None if body is None else json.dumps(body)
        timeout = aiohttp.ClientTimeout(total=20)
        async with self._session.request(
            method, path, data=data, headers={"Content-Type": kind}, timeout=timeout
        ) as response:
            answer: Object = await response.json()
            if response.status >= 400:
                raise ApiError(response.status, str(answer.get("message")))
            return answer

    async def watch(self, path: str, version: str) -> AsyncIterator[Object]:
        """Events of a list from `version` on, until the server ends the watch."""
        assert self._session
        query = f"{path}{'&' if '?' in path else '?'}watch=true&resourceVersion={version}&timeoutSeconds=300"
        async with self._session.get(query) as response:
            if response.status >= 400:
                raise ApiError(response.status, await response.text())
            buffer = b""
            async for chunk in response.content.iter_any():
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)
