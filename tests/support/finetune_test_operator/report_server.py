"""A progress server over real HTTPS, whose cluster is played by the test."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from finetune_api.base import Json
from finetune_api.progress import progress_path, token_audience
from finetune_operator.cluster.cluster import NamespacedName, TokenIdentity
from finetune_operator.errors import ApiUnavailableError, ForbiddenError
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.reports.certificate import load_certificate
from finetune_operator.reports.checks import ReportChecks
from finetune_operator.reports.server import build_progress_app
from finetune_operator.reports.site import Site, listen
from finetune_operator.reports.visits import Visits
from finetune_test_servers.certificates import Authority

KEY = NamespacedName("team", "bot")
JOB_UID, CHILD_UID, POD_UID = "job-uid", "child-uid", "pod-uid"
TOKEN = "good-token"
NOW = datetime(2026, 11, 24, tzinfo=UTC)


def owner(kind: str, name: str, uid: str, api_version: str = "") -> list[Json]:
    """The ownerReferences of an object with one controller."""
    return [{"apiVersion": api_version, "kind": kind, "name": name, "uid": uid, "controller": True}]


class FakeJobSets:
    """The one JobSet that a test has put there."""

    def __init__(self) -> None:
        self.job_set: Json | None = None
        self.is_forbidden = False
        self.asked: list[str] = []

    async def get(self, namespace: str, name: str) -> Json | None:
        """The JobSet, unless it has another name."""
        self.asked.append(name)
        if self.is_forbidden:
            raise ForbiddenError(403, f"GET jobsets/{name}", "no right")
        return self.job_set if self.job_set and self.job_set["metadata"]["name"] == name else None


class FakeCluster:
    """A job with one running pod; tests change what they are about."""

    def __init__(self) -> None:
        self.job: Json | None = {"metadata": {"name": "bot", "namespace": "team", "uid": JOB_UID}, "status": {}}
        self.child: Json | None = {
            "metadata": {
                "name": "bot-1",
                "uid": CHILD_UID,
                "ownerReferences": owner("FineTuneJob", "bot", JOB_UID),
            }
        }

        self.pod: Json | None = {
            "metadata": {"name": "bot-1-x", "uid": POD_UID, "ownerReferences": owner("Job", "bot-1", CHILD_UID)},
            "status": {
                "phase": "Running",
                "containerStatuses": [{"name": "trainer", "state": {"running": {"startedAt": "2026-11-24T00:00:00Z"}}}],
            },
        }

        self.job_sets = FakeJobSets()
        self.identity: TokenIdentity | None = TokenIdentity("team", "bot-1-x", POD_UID)
        self.is_down = False
        self.requests: list[str] = []

    async def get_fine_tune_job(self, key: NamespacedName) -> Json | None:
        """The job, unless the API server is down."""
        self.requests.append("job")
        if self.is_down:
            raise ApiUnavailableError("down")
        return self.job if key == KEY else None

    async def get_job(self, namespace: str, name: str) -> Json | None:
        """The Job between pod and FineTuneJob."""
        self.requests.append("child")
        return self.child if name == "bot-1" else None

    async def get_pod(self, namespace: str, name: str) -> Json | None:
        """The pod."""
        self.requests.append("pod")
        return self.pod

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        """The pod of TOKEN."""
        self.requests.append("review")
        return self.identity if (token, audience) == (TOKEN, token_audience(JOB_UID)) else None


class FakeController:
    """Notes what it is asked to write."""

    def __init__(self) -> None:
        self.triggered: list[tuple[str, NamespacedName]] = []

    def trigger_report(self, job_uid: str, key: NamespacedName) -> None:
        """Note a report."""
        self.triggered.append((job_uid, key))


class Server:
    """The server, and a client of it."""

    def __init__(self, url: str, tls: ssl.SSLContext, cluster: FakeCluster, store: ReportStore) -> None:
        self.url, self.tls, self.cluster, self.store = url, tls, cluster, store
        self.controller = FakeController()
        self.clock_seconds = 0.0
        self.checks = ReportChecks(cluster, store, lambda: NOW, clock=lambda: self.clock_seconds)

    async def post(self, body: Json | bytes, token: str | None = TOKEN, path: str | None = None) -> tuple[int, str]:
        """Status and reason of the answer."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = self.url + (path or progress_path("team", "bot"))
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=data, headers=headers, ssl=self.tls) as answer,
        ):
            return answer.status, (await answer.json())["reason"] if answer.content_type.endswith("json") else ""


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Server]:
    """Serve on a free port; certificates go to `folder`."""
    authority = Authority.create(folder / "ca")
    pair = authority.server("progress", "progress", ("127.0.0.1",))
    (folder / "tls.crt").write_bytes(pair.certificate.read_bytes())
    (folder / "tls.key").write_bytes(pair.key.read_bytes())

    cluster, store = FakeCluster(), ReportStore()
    tls = ssl.create_default_context(cafile=str(authority.ca.certificate))
    fixture = Server("", tls, cluster, store)
    checks = fixture.checks

    visits = Visits()
    app = build_progress_app(checks, fixture.controller, visits)  # type: ignore[arg-type]
    listener = listen(0, "127.0.0.1")
    fixture.url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    task = asyncio.create_task(Site(app, load_certificate(folder), visits).run(listener))
    yield fixture
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def a_report(sequence: int = 1, **run: Any) -> Json:
    """A report in its wire form; keyword arguments are fields of its part `finetune`."""
    return {
        "trainerStatus": {"progressPercentage": 40, "lastUpdatedTime": "2026-11-24T00:00:00Z"},
        "finetune": {"sequence": sequence, "stage": "Training", **run},
    }
