"""The controller keeps its heart beating, which the liveness probe listens to."""

import asyncio

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_operator import health
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.health import build_health_app
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.watch import controller
from finetune_operator.watch.controller import Controller


class EmptyCluster:
    """A cluster without jobs."""

    async def list_fine_tune_jobs(self) -> list[tuple[NamespacedName, str]]:
        return []


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> Controller:
    """A controller whose heart beats every 20 ms; the probe waits for twelve beats, as always."""
    monkeypatch.setattr(controller, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(health, "DEAD_AFTER_SECONDS", 12 * 0.02)
    return Controller(EmptyCluster(), None, ReportStore())  # type: ignore[arg-type]


async def test_the_liveness_probe_is_answered_for_longer_than_its_limit(beating: Controller) -> None:
    running = asyncio.create_task(beating.run())
    try:
        async with TestClient(TestServer(build_health_app(beating))) as client:
            for _ in range(4):
                await asyncio.sleep(0.2)
                assert (await client.get("/healthz")).status == 200
    finally:
        running.cancel()


async def test_a_controller_whose_workers_do_not_run_is_not_alive(beating: Controller) -> None:
    async with TestClient(TestServer(build_health_app(beating))) as client:
        await asyncio.sleep(0.3)
        assert (await client.get("/healthz")).status == 500
