"""Requests to the API server as its administrator, many at once: the official client's are too slow to load it."""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import aiohttp
import yaml

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.base import Json
from finetune_devcluster.cluster import DevCluster

MERGE = "application/merge-patch+json"
FINE_TUNE_JOBS = f"/apis/{GROUP}/{VERSION}"
PODS = "/api/v1"
JOBS = "/apis/batch/v1"


def job_path(namespace: str, name: str = "") -> str:
    """Path of a FineTuneJob, or of all of a namespace."""
    return f"{FINE_TUNE_JOBS}/namespaces/{namespace}/{PLURAL}/{name}".rstrip("/")


def pod_path(namespace: str, name: str, subresource: str) -> str:
    """Path of a subresource of a pod."""
    return f"{PODS}/namespaces/{namespace}/pods/{name}/{subresource}"


class Api:
    """A session with the API server."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    @classmethod
    @asynccontextmanager
    async def open(cls, cluster: DevCluster) -> AsyncIterator[Self]:
        """Log in with the certificate of the cluster's administrator."""
        user = yaml.safe_load(cluster.kubeconfig.read_text())["users"][0]["user"]
        tls = ssl.create_default_context(cafile=str(cluster.ca_file))
        tls.load_cert_chain(user["client-certificate"], user["client-key"])
        connector = aiohttp.TCPConnector(ssl=tls, limit=64)

        async with aiohttp.ClientSession(connector=connector) as session:
            yield cls(cluster.api_url, session)

    async def request(self, verb: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        """Return the answer; raise RuntimeError if the API server refuses."""
        headers = {"Content-Type": kind}
        async with self._session.request(verb, self._url + path, json=body, headers=headers) as answer:
            text = await answer.text()
        if answer.status >= 400:
            raise RuntimeError(f"{verb} {path}: HTTP {answer.status}: {text[:300]}")
        return dict(json.loads(text))

    async def text(self, path: str) -> str:
        """Return an answer that is not JSON."""
        async with self._session.get(self._url + path) as answer:
            return await answer.text()

    async def watch(self, path: str, selector: str = "") -> AsyncIterator[Json]:
        """Yield every change of the objects below `path`, those that exist first, until cancelled. A watch that the API
        server ends, as it does with one that reads too slowly, begins again with all objects."""
        query = {"watch": "true", "allowWatchBookmarks": "false", "labelSelector": selector}
        endless = aiohttp.ClientTimeout(total=None, sock_read=None)
        while True:
            async with self._session.get(self._url + path, params=query, timeout=endless) as answer:
                async for event in _events(answer.content):
                    yield event


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[Json]:
    """Yield a watch's events up to its end, or to the error that ends it."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["type"] == "ERROR":
                return
            yield event
