"""The operator asks its own progress server for a page, as trainers would reach it; outages start the clock anew."""

import asyncio
from pathlib import Path

import pytest

from finetune_operator.reports import self_check
from finetune_operator.reports.self_check import check_reachability
from finetune_test_operator.report_server import JOB_UID, NOW, Server
from finetune_test_programs.child_process import free_port


async def outages(url: str, tls_dir: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Checks for a second, every tenth of one; returns the number of requests without an answer."""
    monkeypatch.setattr(self_check, "CHECK_SECONDS", 0.1)
    found: list[int] = []
    task = asyncio.create_task(check_reachability(url, tls_dir, lambda: found.append(1)))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return len(found)


@pytest.fixture
def tls_dir(server: Server, tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "ca.crt").write_bytes((tmp_path / "ca/ca.crt").read_bytes())
    return folder


async def test_a_server_that_answers_anything_is_reached(
    server: Server, tls_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await outages(server.url, tls_dir, monkeypatch) == 0


async def test_a_server_that_is_away_or_is_somebody_else_is_not(
    server: Server, tls_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await outages(f"https://127.0.0.1:{free_port()}", tls_dir, monkeypatch) >= 5
    assert await outages(server.url, tmp_path / "nothing", monkeypatch) >= 5, "its certificate is of no known authority"


async def test_each_outage_starts_the_clock_anew(server: Server) -> None:
    assert server.store.channel(JOB_UID).listening_since is None
    server.checks.start_over()
    assert server.store.channel(JOB_UID).listening_since == NOW
