"""Probes for the kubelet, over plain HTTP.

/healthz answers 200 while workers take the heartbeat from the queue. A watch that died silently does not restart the
operator: kopf reconnects streams that bring no bookmarks, and the resync looks at every job anyway. /readyz answers 200
once every existing job has been listed; the progress server listens by then.
"""

from aiohttp import web

from finetune_operator.watch.controller import HEARTBEAT_SECONDS, Controller

DEAD_AFTER_SECONDS = 12 * HEARTBEAT_SECONDS


def build_health_app(controller: Controller) -> web.Application:
    """Returns the application with /healthz and /readyz."""

    async def alive(_: web.Request) -> web.Response:
        age = controller.heartbeat_age()
        status = 200 if age < DEAD_AFTER_SECONDS else 500
        return web.Response(status=status, text=f"heartbeat {age:.1f} s ago\n")

    async def ready(_: web.Request) -> web.Response:
        listed = controller.has_listed
        return web.Response(
            status=200 if listed else 503, text="ready\n" if listed else "FineTuneJobs are not listed yet\n"
        )

    app = web.Application()
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", ready)])
    return app
