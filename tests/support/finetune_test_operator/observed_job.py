"""One job with its children for `observe`, without an API server: what is asked for is kept."""

from datetime import datetime
from typing import Any

from finetune_api.base import Json
from finetune_operator.cluster.cluster import NamespacedName
from finetune_operator.errors import ForbiddenError
from finetune_operator.observe.observe import observe
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_test_operator.snapshot_builder import INSTALLATION, METADATA, NOW, a_spec, at


class FakeCluster:
    """One job with the given children; requests are kept. The API server hides what `hidden` names."""

    def __init__(self, *jobs: Json, spec: Json | None = None, status: Json | None = None) -> None:
        self.body: Json | None = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "bot", "namespace": "team", "uid": METADATA.uid, "generation": 1},
            "spec": spec or a_spec().to_wire(),
            "status": status or {},
        }
        self.jobs = {job["metadata"]["name"]: job for job in jobs}
        for job in jobs:
            job["metadata"]["uid"] = f"uid of {job['metadata']['name']}"
        self.pods: list[Json] = []
        self.events: dict[str, list[Json]] = {}
        self.asked: list[str] = []
        self.hidden = ""
        self.gpu_users = None  # nothing limits GPUs here: test_gpu_use.py
        self.queues = None  # nothing here is in one: test_queue.py

    def now(self) -> datetime:
        return NOW

    async def get_fine_tune_job(self, key: NamespacedName) -> Json | None:
        return self.body

    async def get_job(self, namespace: str, name: str) -> Json | None:
        self._ask("job", name)
        return self.jobs.get(name)

    async def get_config_map(self, namespace: str, name: str) -> Json | None:
        self._ask("config map", name)
        return None

    async def list_pods(self, name: NamespacedName) -> list[Json]:
        self._ask("pods")
        return self.pods

    async def list_jobs(self, name: NamespacedName) -> list[Json]:
        self._ask("jobs")
        return list(self.jobs.values())

    async def list_events(self, namespace: str, uid: str, reason: str) -> list[Json]:
        return self.events.get(reason, [])

    def _ask(self, kind: str, name: str = "") -> None:
        self.asked.append(f"{kind} {name}".rstrip())
        if kind == self.hidden:
            raise ForbiddenError(403, f"GET {kind}", "no right")

    async def observe(self, terminated: TerminatedPods | None = None, reports: ReportStore | None = None) -> Any:
        key = NamespacedName("team", "bot")
        pods, received = terminated or TerminatedPods(), reports or ReportStore()
        return await observe(self, key, pods, received, INSTALLATION)  # type: ignore[arg-type]


def a_child_pod(uid: str, job: Json, created: float = 0, **status: Any) -> Json:
    """Returns a pod of a Job as the API server shows it."""
    owner = {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
    labels = {"finetune.dev/job-uid": METADATA.uid}
    metadata = {
        "namespace": "team",
        "name": f"pod-{uid}",
        "uid": uid,
        "creationTimestamp": at(created),
        "labels": labels,
    }
    return {"metadata": metadata | {"ownerReferences": [owner]}, "status": status}
