"""`finetune-operator run`: builds the parts, connects them and runs them until a signal or a defect ends one.

Every replica campaigns for the Lease, answers probes and takes reports. kopf's watches and the workers begin when it
becomes the leader. If it loses the Lease, its workers stop; the watches go on, because they write nothing.

In a pod, the operator uses its service account; with `--kubeconfig`, it runs anywhere with what that file has.
"""

import argparse
import asyncio
import logging
import platform
import signal
import socket
import ssl
import sys
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kopf
from aiohttp import web

from finetune_api.logs.formats import LogFormat, build_formatter
from finetune_operator.cluster.cluster import Cluster
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.cluster.scrapers import ScraperReview
from finetune_operator.desired.installation import Installation
from finetune_operator.election.campaign import Campaign
from finetune_operator.election.election import Election
from finetune_operator.election.fence import FencedConnection
from finetune_operator.errors import SettingsError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.health import build_health_app
from finetune_operator.installation_check import check_installation
from finetune_operator.metrics.job_gauges import JOBS
from finetune_operator.metrics.series import BUILD_INFO, CERTIFICATE_EXPIRY, HEARTBEAT_AGE, LEADER, QUEUED_LOOKS
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_operator.reports.certificate import follow_certificate, load_certificate
from finetune_operator.reports.checks import ReportChecks
from finetune_operator.reports.expiry import certificate_expiry
from finetune_operator.reports.forward import LeaderLink
from finetune_operator.reports.metrics_route import MetricsRoute
from finetune_operator.reports.own_certificate import OwnCertificate
from finetune_operator.reports.published_authority import publish_authority
from finetune_operator.reports.self_check import check_reachability
from finetune_operator.reports.server import build_progress_app
from finetune_operator.reports.site import Site, listen
from finetune_operator.reports.tls_buffers import shrink_tls_buffers
from finetune_operator.reports.visits import Visits
from finetune_operator.settings import Kubeconfig, Settings
from finetune_operator.watch.controller import Controller
from finetune_operator.watch.handlers import build_registry, build_settings

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    options = _parse_arguments(arguments)
    kubeconfig = Kubeconfig(options.kubeconfig, options.context) if options.kubeconfig else None

    try:
        settings = Settings.from_environment(kubeconfig=kubeconfig)
        _set_up_logging(settings.log_level, settings.log_format)
        if options.command == "check-installation":
            sys.exit(not asyncio.run(check_installation(settings)))
        BUILD_INFO.labels(version("finetune-operator"), platform.python_version()).set(1)
        shrink_tls_buffers()
        asyncio.run(run(settings))
    except SettingsError as error:
        sys.exit(f"finetune-operator: {error}")


async def run(settings: Settings) -> None:
    """Run the operator. Returns after SIGTERM or SIGINT; raises the error that ended it otherwise."""
    own_certificate, tls = _find_certificate(settings)
    async with AsyncExitStack() as stack:
        connection = await _connect(stack, settings)
        cluster = Cluster(connection, settings.namespaces)

        # The Lease has a connection of its own: the API server may ask for peace on the other one.
        election = _election(settings)
        lease_cluster = Cluster(await _connect(stack, settings))
        campaign = Campaign(lease_cluster, election, settings.lease_namespace, settings.lease_name)

        reports, terminated_pods, line = ReportStore(), TerminatedPods(), GpuLine()
        leader_cluster = Cluster(FencedConnection(connection, election), settings.namespaces)
        reconciler = Reconciler(leader_cluster, _installation(settings), reports, terminated_pods, line)
        controller = Controller(leader_cluster, reconciler, reports, line)

        # Probes are answered from the start; reports only once the API server can vouch for their tokens.
        await _serve(stack, build_health_app(election, campaign, controller), settings.health_port)
        await cluster.wait_until_served()

        link = LeaderLink(election, settings.progress_url, settings.tls_dir)
        stack.push_async_callback(link.close)
        visits, checks = Visits(), ReportChecks(cluster, reports, cluster.now)
        app = build_progress_app(checks, controller, visits)
        app.middlewares.append(link.middleware())
        MetricsRoute(ScraperReview(connection), lambda: _read_gauges(election, controller, tls, settings)).add_to(app)
        listener = _listen(settings.progress_port)

        stop, has_led = asyncio.Event(), asyncio.Event()
        _stop_on_signals(stop)
        leader = _Leader(settings, connection, election, checks, controller, has_led)
        registry = build_registry(controller, terminated_pods, connection, settings.kueue)
        await _run_until_one_ends(
            campaign.run(leader.lead),
            _watch(has_led, stop, registry, settings.namespaces),
            Site(app, tls, visits).run(listener),
            *_certificate_parts(own_certificate, tls, settings),
            _wait(stop),
        )


@dataclass
class _Leader:
    """The work of the replica that leads, each time that it does."""

    settings: Settings
    connection: ApiConnection
    election: Election
    checks: ReportChecks
    controller: Controller
    has_led: asyncio.Event
    _reign: str = ""

    async def lead(self) -> None:
        """Works until it is cancelled."""
        # A leader's time may run out on a slow API server, which looking at every job again would make slower still.
        if self.election.reign == self._reign:
            self.checks.listen_anew()
        else:
            self._reign = self.election.reign
            self.checks.start_over()
            self.controller.start_over()
        self.has_led.set()

        url, tls = self.settings.progress_url, self.settings.tls_dir
        with JOBS.exported():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(check_reachability(url, tls, self.checks.listen_anew))
                tasks.create_task(self.controller.run())
                tasks.create_task(_publish_authority(self.connection, self.settings))


async def _watch(
    begin: asyncio.Event, stop: asyncio.Event, registry: kopf.OperatorRegistry, namespaces: Sequence[str]
) -> None:
    """Run kopf from `begin` on. `namespaces`: those to watch, none of them for all."""
    await begin.wait()

    others = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=registry,
        settings=build_settings(),
        clusterwide=not namespaces,
        namespaces=namespaces,
    )

    # kopf has taken the signals over. It would end with them at once, but the workers are to stop first.
    _stop_on_signals(stop)
    await kopf.run_tasks(tasks, ignored=others)


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()
    logger.info("stopping")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune-operator", description="Runs FineTuneJobs on Kubernetes.")
    parser.add_argument("command", nargs="?", choices=["run", "check-installation"], default="run")
    parser.add_argument("--kubeconfig", type=Path, help="run outside the cluster, with the credentials of this file")
    parser.add_argument("--context", help="context of the kubeconfig (default: its current context)")

    options = parser.parse_args(arguments)
    if options.context and not options.kubeconfig:
        parser.error("--context needs --kubeconfig")
    return options


def _set_up_logging(level: str, form: LogFormat) -> None:
    """Have every library's lines formatted as ours, kopf's and aiohttp's too."""
    handler = logging.StreamHandler()
    handler.setFormatter(build_formatter(form, {"pod": socket.gethostname()}))
    logging.basicConfig(level=level, handlers=[handler])
    if level != "DEBUG":
        logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # it logs a line for every event of every object


async def _connect(stack: AsyncExitStack, settings: Settings) -> ApiConnection:
    """Returns a connection to the API server that closes with the stack."""
    connection = await ApiConnection.open(settings.api_server)
    stack.push_async_callback(connection.close)
    return connection


def _find_certificate(settings: Settings) -> tuple[OwnCertificate | None, ssl.SSLContext]:
    """Returns the progress server's certificate; makes it, unless somebody else does."""
    own = None
    if settings.own_tls is not None:
        own = OwnCertificate(settings.own_tls.seed, settings.own_tls.names, settings.tls_dir)
        own.write()
    return own, load_certificate(settings.tls_dir)


def _certificate_parts(
    own: OwnCertificate | None, tls: ssl.SSLContext, settings: Settings
) -> list[Coroutine[Any, Any, None]]:
    """Returns what looks after the progress server's certificate while the operator runs."""
    follow = follow_certificate(tls, settings.tls_dir)
    return [follow, own.keep()] if own else [follow]


async def _publish_authority(connection: ApiConnection, settings: Settings) -> None:
    """Show the authority in the ConfigMap of the settings, if there is one."""
    if settings.own_tls and settings.own_tls.config_map:
        await publish_authority(connection, settings.lease_namespace, settings.own_tls.config_map, settings.tls_dir)


def _listen(port: int) -> socket.socket:
    """Open the progress server's port; connections wait until somebody takes them."""
    listener = listen(port)
    logger.info("listening on port %d", port)
    return listener


def _installation(settings: Settings) -> Installation:
    authority = settings.tls_dir / "ca.crt"  # absent if a public authority signed the certificate
    certificate = authority.read_text() if authority.exists() else None

    return Installation(
        settings.trainer_image,
        settings.progress_url,
        certificate,
        settings.location_template,
        settings.denied_namespaces,
        settings.endpoints,
        settings.prices,
        settings.log_format,
        settings.kueue,
        settings.queue_preflight,
        settings.pods,
        settings.max_gpus_per_namespace,
        settings.job_sets,
    )


def _read_gauges(election: Election, controller: Controller, tls: ssl.SSLContext, settings: Settings) -> None:
    """Set the gauges that are read when they are asked for."""
    LEADER.set(election.is_leading())
    HEARTBEAT_AGE.set(controller.heartbeat_age())
    QUEUED_LOOKS.set(controller.queue_depth())
    CERTIFICATE_EXPIRY.set(certificate_expiry(tls, settings.tls_dir) or 0)


def _election(settings: Settings) -> Election:
    """Returns this process's view of the election; a container that restarts is another candidate."""
    host = f"[{settings.pod_ip}]" if ":" in settings.pod_ip else settings.pod_ip
    identity = f"{socket.gethostname()}_{uuid.uuid4()}"
    return Election(identity, f"{host}:{settings.progress_port}")


async def _serve(stack: AsyncExitStack, app: web.Application, port: int) -> None:
    """Serve an application until the stack closes."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, port=port).start()
    logger.info("listening on port %d", port)


async def _run_until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Run the parts until one of them ends, then stop the others, one after the other; raises that part's error.

    A signal ends one of them. Any other end is a defect; its error ends the process, and the pod restarts.
    """
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
