"""An API server that answers every request as a test likes, over TLS, and keeps what it was asked."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import yaml
from aiohttp import web

from finetune_api.base import Json
from finetune_operator.settings import Kubeconfig, ServiceAccount
from finetune_test_servers.certificates import Authority

SERVER_NAME = "api.test"


class FakeApiServer:
    """Answers every request alike, and keeps the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder)
        self.port = 0
        self.status, self.text = 200, '{"kind": "List"}'
        self.headers: dict[str, str] = {}
        self.seconds = 0.0
        self.requests: list[dict[str, Any]] = []

    @classmethod
    @asynccontextmanager
    async def serve(cls, folder: Path) -> AsyncIterator[Self]:
        """Answer on a loopback port, with a certificate of an authority of its own."""
        fake = cls(folder)
        pair = fake.authority.server("api", "api", ("127.0.0.1", SERVER_NAME))
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(pair.certificate, pair.key)

        app = web.Application()
        app.add_routes([web.route("*", "/{path:.*}", fake.answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        fake.port = runner.addresses[0][1]
        yield fake
        await runner.cleanup()

    async def answer(self, request: web.Request) -> web.Response:
        """Keep a request and answer it with the status, text and headers that the test set."""
        body = await request.text()
        headers = {name: request.headers.get(name) for name in ("Authorization", "Accept", "Content-Type")}
        self.requests.append(
            {"verb": request.method, "path": request.path, "query": dict(request.query), "body": body} | headers
        )
        await asyncio.sleep(self.seconds)
        return web.Response(status=self.status, text=self.text, content_type="application/json", headers=self.headers)

    @property
    def tokens(self) -> list[str]:
        """Bearer tokens of the requests, in order."""
        return [str(request["Authorization"]).split()[-1] for request in self.requests]

    def service_account(self, token: str) -> ServiceAccount:
        """A service account that reaches this server, with a new token."""
        (self.folder / "token").write_text(token)
        return ServiceAccount("127.0.0.1", self.port, self.folder)

    def kubeconfig(self, cluster: Json | None = None, **user: Any) -> Kubeconfig:
        """Its context `mine` reaches this server; the current context, `elsewhere`, reaches nothing."""
        certificate = str(self.authority.ca.certificate)
        mine = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": certificate} | (cluster or {})
        document = {
            "current-context": "elsewhere",
            "clusters": [{"name": "mine", "cluster": mine}, {"name": "nowhere", "cluster": {"server": "http://[::]"}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [
                {"name": "mine", "context": {"cluster": "mine", "user": "me"}},
                {"name": "elsewhere", "context": {"cluster": "nowhere"}},
            ],
        }

        path = self.folder / "config"
        path.write_text(yaml.safe_dump(document))
        return Kubeconfig(path, "mine")
