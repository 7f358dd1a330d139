"""A kubelet played by the test: pods of FineTuneJobs get whatever status the test wants, on a real API server.

Everything else that a job needs (Job controller, garbage collector, scheduler) is real.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api.base import Json
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_NAME_LABEL, JOB_UID_LABEL
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import TRAINER

T = TypeVar("T")
NODE = "played-node"
LOCATION = "s3://results/<namespace>/<job>/"
UPLOADS = f"{LOCATION}attempts/<job uid>.<pod uid>/"
"""Where a pod writes, in a message that is the same for every pod; `end` fills it in."""


def wait_for(get: Callable[[], T | None], what: str, seconds: float = 15) -> T:
    """Poll until `get` returns something true."""
    deadline = time.monotonic() + seconds
    while not (found := get()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)
    return found


class PlayedKubelet:
    """Acts on the pods of FineTuneJobs in one namespace."""

    def __init__(self, cluster: DevCluster, namespace: str) -> None:
        self._core: Any = client.CoreV1Api(cluster.api_client())  # takes plain objects, but does not say so
        self._namespace = namespace
        self._ensure_node()

    def pods(self, job: str, component: str = TRAINER) -> list[Any]:
        """The trainer's pods of a job, or those of preflight, oldest first."""
        selector = f"finetune.dev/job-name={job},{COMPONENT_LABEL}={component}"
        found = self._core.list_namespaced_pod(self._namespace, label_selector=selector).items
        return sorted(found, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))

    def find(self, name: str) -> Any | None:
        """A pod as it is now, or None if it is gone."""
        try:
            return self._core.read_namespaced_pod(name, self._namespace)
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def wait_for_pod(self, job: str, number: int = 1, seconds: float = 90, component: str = TRAINER) -> Any:
        """The job's pod number `number`, as soon as the Job controller has made it and it has not ended."""

        def get() -> Any:
            pods = self.pods(job, component)
            alive = [pod for pod in pods if pod.status.phase == "Pending"]
            return alive[-1] if len(pods) >= number and alive else None

        return wait_for(get, f"{component} pod {number} of {job}", seconds)

    def run(self, pod: Any) -> None:
        """Bind the pod and say that its trainer runs."""
        if pod.spec.node_name is None:
            binding = {"metadata": {"name": pod.metadata.name}, "target": {"kind": "Node", "name": NODE}}
            self._core.create_namespaced_binding(self._namespace, binding, _preload_content=False)
        self._set(pod, "Running", {"running": {"startedAt": _now()}})

    def wait_in(self, pod: Any, reason: str, message: str) -> None:
        """Say that the trainer's container cannot start."""
        self._set(pod, "Pending", {"waiting": {"reason": reason, "message": message}})

    def end(self, pod: Any, exit_code: int, message: str = "", reason: str = "", pod_reason: str = "") -> None:
        """Say that the trainer has ended."""
        state = {"exitCode": exit_code, "reason": reason or ("Completed" if exit_code == 0 else "Error")}
        state |= {"message": fill_in(message, pod), "startedAt": _now(), "finishedAt": _now()}
        self._set(pod, "Succeeded" if exit_code == 0 else "Failed", {"terminated": state}, pod_reason)

    def remove(self, pod: Any) -> None:
        """Take a pod that is being deleted off the API server, as a kubelet does at last."""
        try:
            self._core.delete_namespaced_pod(pod.metadata.name, self._namespace, grace_period_seconds=0)
        except ApiException as error:
            if error.status != 404:
                raise

    def _ensure_node(self) -> None:
        """The pods' node must exist: the pod garbage collector takes pods of unknown nodes away after 40 s."""
        try:
            self._core.create_node({"metadata": {"name": NODE}, "spec": {"unschedulable": True}})
        except ApiException as error:
            if error.status != 409:
                raise

    def _set(self, pod: Any, phase: str, state: Json, pod_reason: str = "") -> None:
        container = {"name": "trainer", "image": "x", "imageID": "", "ready": "running" in state, "restartCount": 0}
        status = {"phase": phase, "containerStatuses": [container | {"state": state}]}
        if pod_reason:
            status |= {"reason": pod_reason, "message": f"{pod_reason} by the test"}
        self._core.patch_namespaced_pod_status(pod.metadata.name, self._namespace, {"status": status})


def fill_in(message: str, pod: Any) -> str:
    """Return what this pod writes."""
    labels = pod.metadata.labels
    values = {"namespace": pod.metadata.namespace, "job": labels[JOB_NAME_LABEL]}
    values |= {"job uid": labels[JOB_UID_LABEL], "pod uid": pod.metadata.uid}
    for name, value in values.items():
        message = message.replace(f"<{name}>", value)
    return message


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
