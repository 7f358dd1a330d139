"""Startup, readiness and liveness probes over HTTP(S) and TCP, from the node to loopback."""

import asyncio
import ssl

import aiohttp

from finetune_devcluster.process_node.api import Object

UNVERIFIED = ssl._create_unverified_context()  # a kubelet does not verify a probe's certificate


async def succeeds(probe: Object, container: Object) -> bool:
    """Run a probe once; returns its success."""
    timeout = probe.get("timeoutSeconds", 1)

    try:
        async with asyncio.timeout(timeout):
            if action := probe.get("httpGet"):
                scheme = action.get("scheme", "HTTP").lower()
                url = f"{scheme}://127.0.0.1:{_port(action['port'], container)}{action.get('path', '/')}"
                async with aiohttp.ClientSession() as session, session.get(url, ssl=UNVERIFIED) as response:
                    return 200 <= response.status < 400

            if action := probe.get("tcpSocket"):
                _, writer = await asyncio.open_connection("127.0.0.1", _port(action["port"], container))
                writer.close()
                return True
    except (OSError, TimeoutError, aiohttp.ClientError):
        return False
    raise ValueError(f"the process node has no such probe: {sorted(probe)}")


def _port(port: int | str, container: Object) -> int:
    if isinstance(port, int):
        return port
    return next(int(entry["containerPort"]) for entry in container["ports"] if entry.get("name") == port)
