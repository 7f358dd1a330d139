"""The HTTPS endpoint that trainers report their progress to, wire-compatible with Kubeflow's KEP-2779.

`checks.py` decides whether a report is accepted. An accepted report is answered at once; the reconcile writes it into
the job's status later. Training never waits for an answer. `site.py` bounds what a connection may take before that.
"""

import logging

from aiohttp import web
from aiohttp.typedefs import Handler

from finetune_api.progress import MAX_BODY_BYTES, progress_path
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.cluster.scrapers import METRICS_PATH
from finetune_operator.errors import ApiError, ApiUnavailableError, ReportRefusedError
from finetune_operator.metrics.series import REPORTS
from finetune_operator.reports.checks import ReportChecks, Sender
from finetune_operator.reports.visits import Address, Visits
from finetune_operator.watch.controller import Controller

logger = logging.getLogger(__name__)


def build_progress_app(checks: ReportChecks, controller: Controller, visits: Visits) -> web.Application:
    """Returns the application. It has one route: POST to the status of a job. `visits`: the open connections."""

    @web.middleware
    async def read(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Have the whole request before anything else is done with it; only accepted ones keep their connection."""
        try:
            await _read(request)
            visits.receive(_address(request))
            answer = await handler(request)
        except ReportRefusedError as refusal:
            answer = _answer(refusal.status, refusal.reason, refusal.message)
        if request.path != METRICS_PATH:
            REPORTS.labels(str(answer.status)).inc()
        if answer.status != web.HTTPAccepted.status_code or not visits.keep(_address(request)):
            answer.force_close()  # the idle connection of a stranger would hold a place
        return answer

    async def receive(request: web.Request) -> web.Response:
        name = NamespacedName(request.match_info["namespace"], request.match_info["name"])
        sender = Sender(str(_address(request)[0]), name, request.headers.get("Authorization", ""))
        try:
            accepted = await checks.check(sender, await request.read())
        except ReportRefusedError as refusal:
            logger.info("%s: report refused: %s %s", name, refusal.status, refusal.reason)
            raise
        except (ApiError, ApiUnavailableError) as error:
            logger.warning("%s: report cannot be checked: %s", name, error)
            return _answer(503, "Unavailable", "the Kubernetes API server does not answer: report again later")

        controller.trigger_report(accepted.job_uid, name)
        return _answer(202, "Accepted", "")

    # One byte more shows that a body is too large.
    app = web.Application(client_max_size=MAX_BODY_BYTES + 1, middlewares=[read])
    app.add_routes([web.post(progress_path("{namespace}", "{name}"), receive)])
    return app


async def _read(request: web.Request) -> None:
    """Read a body of at most MAX_BODY_BYTES. The application stops reading there even if Content-Length says less."""
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise ReportRefusedError(413, "TooLarge", f"a report has at most {MAX_BODY_BYTES} bytes")

    try:
        await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise ReportRefusedError(413, "TooLarge", f"a report has at most {MAX_BODY_BYTES} bytes") from None


def _address(request: web.Request) -> Address:
    """Returns the address of the client; one that has gone meanwhile has none."""
    address: Address | None = request.transport.get_extra_info("peername") if request.transport else None
    return address or ("",)


def _answer(status: int, reason: str, message: str) -> web.Response:
    headers = {"Retry-After": "5"} if status in (429, 503) else {}  # seconds
    return web.json_response({"reason": reason, "message": message}, status=status, headers=headers)
