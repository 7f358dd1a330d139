"""The kubelet's HTTPS endpoint as far as `kubectl logs` needs it; only the API server's certificate is let in."""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from finetune_devcluster.process_node.container import ContainerRun

FindRun = Callable[[str, str, str, bool], ContainerRun | None]
API_SERVER = "kube-apiserver"
FOLLOW_SECONDS = 0.2


class LogServer:
    """Serves /containerLogs/NAMESPACE/POD/CONTAINER with tailLines, follow and previous."""

    def __init__(self, ca_file: Path, certificate: Path, key: Path, find_run: FindRun) -> None:
        self._find_run = find_run
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca_file))
        self._tls.verify_mode = ssl.CERT_REQUIRED
        self._tls.load_cert_chain(certificate, key)

    async def start(self) -> int:
        """Listen on a free loopback port; returns it."""
        application = web.Application()
        application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        port: int = runner.addresses[0][1]
        return port

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        peer = request.transport.get_extra_info("peercert") if request.transport else None
        names = [value for part in (peer or {}).get("subject", ()) for key, value in part if key == "commonName"]
        if names != [API_SERVER]:
            return web.Response(status=403, text="only the API server may read logs here")

        where, query = request.match_info, request.query
        run = self._find_run(where["namespace"], where["pod"], where["container"], query.get("previous") == "true")
        if run is None:
            return web.Response(status=404, text="the container has not started")

        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)

        path = run.log
        data = path.read_bytes()
        position = len(data)
        if "tailLines" in query:
            count = int(query["tailLines"])
            data = b"".join(data.splitlines(keepends=True)[-count:]) if count else b""
        await response.write(data)

        # The stream ends with the container, once all that it wrote is sent.
        is_last = query.get("follow") != "true"
        while not is_last:
            is_last = run.has_ended
            await asyncio.sleep(FOLLOW_SECONDS)
            if not path.exists():
                break
            with path.open("rb") as log:
                log.seek(position)
                more = log.read()
            position += len(more)
            await response.write(more)

        await response.write_eof()
        return response
