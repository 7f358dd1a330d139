"""`finetune-operator run`: puts the parts together and runs them until a signal or a defect ends one of them."""

import argparse
import asyncio
import logging
import ssl
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
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
from finetune_operator.reconcile import Reconciler, utc_now
from finetune_operator.reports.checks import ReportChecks
from finetune_operator.reports.server import build_progress_app, load_certificate, renew_certificate
from finetune_operator.settings import Settings
from finetune_operator.watch.controller import Controller
from finetune_operator.watch.handlers import build_registry, build_settings

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(prog="finetune-operator", description="Runs FineTuneJobs on Kubernetes.")
    parser.add_argument("command", choices=["run"])
    parser.parse_args(arguments)
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        sys.exit(f"finetune-operator: {error}")
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.log_level != "DEBUG":
        logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # else a line for every event of every object
    asyncio.run(run(settings))


async def run(settings: Settings) -> None:
    """Run the operator. Returns after SIGTERM or SIGINT; raises what ended it otherwise."""
    async with AsyncExitStack() as stack:
        connection = ApiConnection.open(settings.api_url, settings.service_account_dir)
        stack.push_async_callback(connection.close)
        cluster = Cluster(connection, settings.namespace)
        reports, terminated_pods = ReportStore(), TerminatedPods()
        reconciler = Reconciler(cluster, _installation(settings), reports, terminated_pods)
        controller = Controller(cluster, reconciler, reports)
        tls = load_certificate(settings.tls_dir)
        await _serve(stack, build_health_app(controller), settings.health_port)
        await cluster.wait_until_served()
        checks = ReportChecks(cluster, reports, utc_now)
        await _serve(stack, build_progress_app(checks, controller), settings.progress_port, tls)
        watching = kopf.operator(
            registry=build_registry(controller, terminated_pods, settings.api_url, settings.service_account_dir),
            settings=build_settings(),
            clusterwide=settings.namespace is None,
            namespaces=[settings.namespace] if settings.namespace else [],
        )
        await _run_until_one_ends(watching, controller.run(), renew_certificate(tls, settings.tls_dir))


def _installation(settings: Settings) -> Installation:
    authority = settings.tls_dir / "ca.crt"  # absent where a public authority signed
    certificate = authority.read_text() if authority.exists() else None
    return Installation(settings.trainer_image, settings.progress_url, certificate)


async def _serve(stack: AsyncExitStack, app: web.Application, port: int, tls: ssl.SSLContext | None = None) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, port=port, ssl_context=tls).start()
    logger.info("listening on port %d", port)


async def _run_until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """kopf ends on a signal; nothing else ends but by a defect, which must be seen and restart the pod."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
