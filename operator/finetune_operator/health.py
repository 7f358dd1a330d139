"""Probes: plain HTTP, because the kubelet asks from the node.

Alive: the workers still take their heartbeat through the queue. Watches that die silently are no reason for a restart:
kopf reconnects streams without bookmarks, and the resync looks at every job anyway. Ready: every existing job was
seen, and the progress server listens.
"""

from aiohttp import web

from finetune_operator.watch.controller import HEARTBEAT_SECONDS, Controller

DEAD_AFTER_SECONDS = 12 * HEARTBEAT_SECONDS


def build_health_app(controller: Controller) -> web.Application:
    """/healthz and /readyz."""

    async def alive(_: web.Request) -> web.Response:
        age = controller.heartbeat_age()
        status = 200 if age < DEAD_AFTER_SECONDS else 500
        return web.Response(status=status, text=f"heartbeat {age:.1f} s ago\n")

    async def ready(_: web.Request) -> web.Response:
        listed = controller.has_listed
        return web.Response(status=200 if listed else 503, text="ready\n" if listed else "jobs are not listed yet\n")

    app = web.Application()
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", ready)])
    return app
