"""Probes for the kubelet, over plain HTTP.

/healthz answers 200 while this replica campaigns and, if it leads, its workers take the heartbeat from the queue. A
watch that died silently does not restart the operator: kopf reconnects streams that bring no bookmarks, and the resync
looks at every job anyway. /readyz answers 200 on a follower once it knows who leads, and on the leader once every
existing job has been listed, and while its role lets it read and write them; the progress server listens by then. A new
process would have no other rights, so /healthz does not ask for them.
"""

from aiohttp import web

from finetune_operator.election.campaign import Campaign
from finetune_operator.election.election import Election
from finetune_operator.watch.controller import HEARTBEAT_SECONDS, Controller

DEAD_AFTER_SECONDS = 12 * HEARTBEAT_SECONDS


def build_health_app(election: Election, campaign: Campaign, controller: Controller) -> web.Application:
    """Returns the application with /healthz and /readyz."""

    async def alive(_: web.Request) -> web.Response:
        age = campaign.round_age()
        if election.is_leading():
            age = max(age, controller.heartbeat_age())
        status = 200 if age < DEAD_AFTER_SECONDS else 500
        return web.Response(status=status, text=f"heartbeat {age:.1f} s ago\n")

    async def ready(_: web.Request) -> web.Response:
        if not election.has_seen:
            return web.Response(status=503, text="the Lease was not read yet\n")
        if not election.is_leading():
            return web.Response(text="ready to follow\n")
        if controller.refusal:
            return web.Response(status=503, text=f"FineTuneJobs are out of reach: {controller.refusal}\n")
        if not controller.has_listed:
            return web.Response(status=503, text="FineTuneJobs are not listed yet\n")
        return web.Response(text="ready, and leading\n")

    app = web.Application()
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", ready)])
    return app
