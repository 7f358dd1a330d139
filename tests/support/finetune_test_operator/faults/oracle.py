"""What must hold of every life: during it (`Watcher`), and at its end, beside the references (`EndState`)."""

import json
import re
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from kubernetes import client, watch
from urllib3.exceptions import HTTPError

from finetune_api.base import Json
from finetune_api.status import MAX_STATUS_BYTES
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_NAME_LABEL, JOB_UID_LABEL
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import PREFLIGHT, TRAINER, child_name, preflight_name
from finetune_test_operator.faults.fault_proxy import Course
from finetune_test_operator.faults.lives import Stage

CANARY: Final = "canary-4f1c0f0e9a7d4b"
"""Value of a Secret that jobs name; it may stand nowhere else."""

MAX_WRITES = 5  # times those of the reference
MAX_REQUESTS_PER_SECOND = 60
"""Of one job; a look takes about seven, and an undisturbed life has up to five looks a second."""

EXPLAINED = {"PermissionDenied", "ChildRejected"}
"""Events that tell of the fault itself."""

_MASKED = {"uid", "pod", "jobName", "activeSeconds", "lastTransitionTime"}
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TERMINAL = ("Succeeded", "Failed")


@dataclass(frozen=True)
class EndState:
    """What a life has left, with everything masked that differs between two equal lives."""

    status: Json | None
    events: Counter[str]
    children: Json
    creates: Counter[str]
    deletes: int

    @classmethod
    def read(cls, stage: Stage, name: str, course: Course) -> "EndState":
        """Read what is left of a job."""
        creates = Counter(each for each in course.creates if "events" not in each and "token" not in each)
        events = Counter(stage.jobs.event_reasons(name))
        if not stage.jobs.exists(name):
            # The look during which a job is deleted may make its ConfigMap again; the garbage collector takes it.
            del creates["POST configmaps"]
            return cls(None, events, {}, creates, len(course.deletes))

        job = stage.jobs.get(name)
        children: Json = {component: len(stage.kubelet.pods(name, component)) for component in (TRAINER, PREFLIGHT)}
        children["ConfigMaps"] = len(stage.jobs.config_maps(name))
        for naming in (child_name, preflight_name):
            child = stage.jobs.find_child(name, naming)
            owned = child and child["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
            children[naming.__name__] = [owned, child and child["spec"].get("ttlSecondsAfterFinished")]
        return cls(_masked(job["status"], name), events, children, creates, len(course.deletes))

    def differences(self, reference: "EndState") -> list[str]:
        """What differs from a reference, a sentence each."""
        found = [f"status.{path}: {was} is {now}" for path, was, now in _compare(reference.status, self.status)]
        events = Counter({reason: count for reason, count in self.events.items() if reason not in EXPLAINED})
        if events - reference.events:
            found.append(f"events more than the reference's: {dict(events - reference.events)}")
        if reference.events - events:
            found.append(f"events are missing: {dict(reference.events - events)}")
        if self.children != reference.children:
            found.append(f"children {self.children}, not {reference.children}")
        if self.creates - reference.creates:
            found.append(f"created more than once: {dict(self.creates - reference.creates)}")
        if self.deletes != reference.deletes:
            found.append(f"{self.deletes} deletions, not {reference.deletes}")
        return found


def check_effort(course: Course, reference: Course) -> list[str]:
    """Whether the fault made the operator write or ask without bound."""
    found = []
    writes, usual = (
        sum(1 for place in each.places if place.startswith(("POST", "PATCH", "PUT", "DELETE")))
        for each in (course, reference)
    )
    if writes >= MAX_WRITES * usual:
        found.append(f"{writes} writes, the reference has {usual}")

    times = sorted(course.times)
    for first, last in zip(times, times[MAX_REQUESTS_PER_SECOND:], strict=False):
        if last - first < 1:
            found.append(f"more than {MAX_REQUESTS_PER_SECOND} requests within a second")
            break
    return found


@dataclass
class Watcher:
    """Sees every version of every job and pod of a namespace, and notes what must never be."""

    namespace: str
    violations: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _ended: dict[str, str] = field(default_factory=dict)
    _active: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _streams: list[Any] = field(default_factory=list)

    def start(self, cluster: DevCluster) -> None:
        """Watch in threads of their own, until `stop`."""
        custom: Any = client.CustomObjectsApi(cluster.api_client())
        core: Any = client.CoreV1Api(cluster.api_client())
        path = ("finetune.dev", "v1alpha1", self.namespace, "finetunejobs")
        self._follow(self.see_job, custom.list_namespaced_custom_object, *path)
        self._follow(self.see_pod, core.list_namespaced_pod, self.namespace)

    def stop(self) -> None:
        """End the watches."""
        for stream in self._streams:
            stream.stop()

    def see_job(self, kind: str, job: Json) -> None:
        """Judge a version of a job."""
        metadata, status = job["metadata"], job.get("status") or {}
        found, phase = self.violations[metadata["name"]], str(status.get("phase", ""))
        ended = self._ended.get(metadata["uid"])
        if ended and phase != ended and kind != "DELETED":
            found.append(f"it was {ended} and is {phase}")
        if phase in _TERMINAL:
            self._ended[metadata["uid"]] = phase

        generations = [status.get("observedGeneration", 0)]
        generations += [each.get("observedGeneration", 0) for each in status.get("conditions", [])]
        if max(generations) > metadata["generation"]:
            found.append(f"observedGeneration {max(generations)} of generation {metadata['generation']}")
        text = json.dumps(status)
        if len(text.encode()) > MAX_STATUS_BYTES:
            found.append(f"the status has {len(text.encode())} bytes")
        if CANARY in text:
            found.append("a secret stands in the status")

    def see_pod(self, kind: str, pod: Json) -> None:
        """Judge a version of a pod: one trainer at a time."""
        labels = pod["metadata"].get("labels") or {}
        if labels.get(COMPONENT_LABEL) != TRAINER:
            return
        active = self._active[labels[JOB_UID_LABEL]]
        if kind == "DELETED" or pod["status"].get("phase") in _TERMINAL:
            active.discard(pod["metadata"]["uid"])
        else:
            active.add(pod["metadata"]["uid"])
        if len(active) > 1:
            self.violations[labels[JOB_NAME_LABEL]].append(f"{len(active)} trainers at once")

    def _follow(self, see: Any, listing: Any, *arguments: str) -> None:
        stream: Any = watch.Watch()  # type: ignore[no-untyped-call]
        self._streams.append(stream)

        def follow() -> None:
            with suppress(HTTPError):  # the API server ends first
                for event in stream.stream(listing, *arguments):
                    see(event["type"], event["raw_object"])

        threading.Thread(target=follow, daemon=True).start()


def find_canary(stage: Stage, log: str) -> list[str]:
    """Where the secret's value has come to: logs, Events and ConfigMaps of a namespace."""
    get = ("get", "events,configmaps,jobs,finetunejobs,pods", "-n", stage.jobs.namespace, "-o", "json")
    found = ["an object of the API server"] if CANARY in stage.jobs.cluster.kubectl(*get).stdout else []
    return found + (["the operator's log"] if CANARY in log else [])


def _masked(value: Any, name: str) -> Any:
    def mask(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "..." if key in _MASKED or key.endswith(("Time", "Seconds")) else mask(item)
                for key, item in value.items()
            }
        return [mask(item) for item in value] if isinstance(value, list) else value

    return json.loads(_UID.sub("UID", json.dumps(mask(value)).replace(name, "NAME")))


def _compare(was: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [each for key in keys for each in _compare(was.get(key), now.get(key), f"{path}.{key}".strip("."))]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True))
        return [each for number, (a, b) in pairs for each in _compare(a, b, f"{path}[{number}]")]
    return [] if was == now else [(path, was, now)]
