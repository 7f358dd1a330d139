"""`finetune-operator run`: builds the parts, connects them and runs them until a signal or a defect ends one.

In a pod, the operator uses its service account. With `--kubeconfig` it runs anywhere else, under the credentials of
that file.
"""

import argparse
import asyncio
import logging
import ssl
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import kopf
from aiohttp import web

from finetune_operator.cluster.cluster import Cluster
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.decide.decision import Installation
from finetune_operator.errors import SettingsError
from finetune_operator.health import build_health_app
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_operator.reports.checks import ReportChecks
from finetune_operator.reports.server import build_progress_app, load_certificate, renew_certificate
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
        _set_up_logging(settings.log_level)
        asyncio.run(run(settings))
    except SettingsError as error:
        sys.exit(f"finetune-operator: {error}")


async def run(settings: Settings) -> None:
    """Run the operator. Returns after SIGTERM or SIGINT; raises the error that ended it otherwise."""
    async with AsyncExitStack() as stack:
        connection = await ApiConnection.open(settings.api_server)
        stack.push_async_callback(connection.close)
        cluster = Cluster(connection, settings.namespace)

        reports, terminated_pods = ReportStore(), TerminatedPods()
        reconciler = Reconciler(cluster, _installation(settings), reports, terminated_pods)
        controller = Controller(cluster, reconciler, reports)

        # Probes are answered from the start; reports only once the API server can vouch for their tokens.
        tls = load_certificate(settings.tls_dir)
        await _serve(stack, build_health_app(controller), settings.health_port)
        await cluster.wait_until_served()
        checks = ReportChecks(cluster, reports, cluster.now)
        await _serve(stack, build_progress_app(checks, controller), settings.progress_port, tls)

        watching = kopf.operator(
            registry=build_registry(controller, terminated_pods, connection),
            settings=build_settings(),
            clusterwide=settings.namespace is None,
            namespaces=[settings.namespace] if settings.namespace else [],
        )
        await _run_until_one_ends(watching, controller.run(), renew_certificate(tls, settings.tls_dir))


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune-operator", description="Runs FineTuneJobs on Kubernetes.")
    parser.add_argument("command", nargs="?", choices=["run"], default="run")
    parser.add_argument("--kubeconfig", type=Path, help="run outside the cluster, with the credentials of this file")
    parser.add_argument("--context", help="context of the kubeconfig (default: its current context)")

    options = parser.parse_args(arguments)
    if options.context and not options.kubeconfig:
        parser.error("--context needs --kubeconfig")
    return options


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "DEBUG":
        logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # it logs a line for every event of every object


def _installation(settings: Settings) -> Installation:
    authority = settings.tls_dir / "ca.crt"  # absent if a public authority signed the certificate
    certificate = authority.read_text() if authority.exists() else None
    return Installation(settings.trainer_image, settings.progress_url, certificate, settings.location_template)


async def _serve(stack: AsyncExitStack, app: web.Application, port: int, tls: ssl.SSLContext | None = None) -> None:
    """Serve an application until the stack closes."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, port=port, ssl_context=tls).start()
    logger.info("listening on port %d", port)


async def _run_until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Run the parts until one of them ends, then cancel the others; raises that part's error.

    kopf ends on a signal. Any other end is a defect; its error ends the process, and the pod restarts.
    """
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
