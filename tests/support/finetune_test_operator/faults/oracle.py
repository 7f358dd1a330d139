"""What must hold of every life: during it (`Watcher`), and at its end, beside the references (`EndState`)."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

from finetune_api.base import Json
from finetune_api.status import MAX_STATUS_BYTES
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_NAME_LABEL, JOB_UID_LABEL
from finetune_operator.desired.names import PREFLIGHT, TRAINER, child_name, preflight_name
from finetune_test_operator.faults.fault_proxy import Course
from finetune_test_operator.faults.lives import Stage
from finetune_test_operator.faults.plans import count_writes

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
            return cls(None, events, {}, creates, len(course.deletes))

        job = stage.jobs.get(name)
        children: Json = {component: len(stage.kubelet.pods(name, component)) for component in (TRAINER, PREFLIGHT)}
        children["ConfigMaps"] = len(stage.jobs.config_maps(name))
        for naming in (child_name, preflight_name):
            child = stage.jobs.find_child(name, naming)
            owned = child and child["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
            children[naming.__name__] = [owned, child and child["spec"].get("ttlSecondsAfterFinished")]
        return cls(_masked(job["status"], name, stage.jobs.namespace), events, children, creates, len(course.deletes))

    def differences(self, reference: "EndState", let_go: int = 0) -> list[str]:
        """What differs from a reference, a sentence each. `let_go`: Events that may be missing."""
        found = [f"status.{path}: {was} is {now}" for path, was, now in _compare(reference.status, self.status)]
        events = Counter({reason: count for reason, count in self.events.items() if reason not in EXPLAINED})
        # The pod of a deleted job may be seen to end before the job is: an Event is posted before the status, whose
        # write then finds no job.
        late = Counter({"Queued": 1} if self.status is None else {})
        if more_events := events - reference.events - late:
            found.append(f"events more than the reference's: {dict(more_events)}")
        missing = reference.events - events
        if missing.total() > let_go:
            found.append(f"events are missing: {dict(missing)}")
        if self.children != reference.children:
            found.append(f"children {self.children}, not {reference.children}")
        # The look during which a job is deleted may make its ConfigMap once more; the garbage collector takes it.
        once_more = Counter({"POST configmaps": 1} if self.status is None else {})
        if more := self.creates - reference.creates - once_more:
            found.append(f"created more than once: {dict(more)}")
        if self.deletes != reference.deletes:
            found.append(f"{self.deletes} deletions, not {reference.deletes}")
        return found


def check_effort(course: Course, reference: Course) -> list[str]:
    """Whether the fault made the operator write or ask without bound."""
    found = []
    writes, usual = (count_writes(each.places) for each in (course, reference))
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
    """Is shown every version of every job and pod, and notes what must never be."""

    violations: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _ended: dict[str, str] = field(default_factory=dict)
    _active: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

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
        """Judge a version of a pod: one trainer at a time of each name, whichever job of that name it is of."""
        labels = pod["metadata"].get("labels") or {}
        if labels.get(COMPONENT_LABEL) != TRAINER:
            return
        active = self._active[labels[JOB_NAME_LABEL]]
        if kind == "DELETED" or pod["status"].get("phase") in _TERMINAL:
            active.discard(pod["metadata"]["uid"])
        else:
            active.add(pod["metadata"]["uid"])
        if len(active) > 1:
            self.violations[labels[JOB_NAME_LABEL]].append(f"{len(active)} trainers at once")


def find_canary(stage: Stage, log: str) -> list[str]:
    """Where the secret's value has come to: every object of a namespace but the Secret itself, and the logs."""
    kinds = "finetunejobs,jobs,pods,configmaps,events,leases,serviceaccounts"
    found = stage.jobs.cluster.kubectl("get", kinds, "-n", stage.jobs.namespace, "-o", "json").stdout
    places = ["an object of the API server"] if CANARY in found else []
    return places + (["the operator's log"] if CANARY in log else [])


def find_orphans(stage: Stage) -> list[str]:
    """Jobs, pods and ConfigMaps that name a FineTuneJob which does not exist."""
    get = ("get", "finetunejobs,jobs,pods,configmaps", "-n", stage.jobs.namespace, "-o", "json")
    found = json.loads(stage.jobs.cluster.kubectl(*get).stdout)["items"]
    alive = {each["metadata"]["uid"] for each in found if each["kind"] == "FineTuneJob"}
    named = [(each, (each["metadata"].get("labels") or {}).get(JOB_UID_LABEL)) for each in found]
    return [f"{each['kind']} {each['metadata']['name']}" for each, uid in named if uid and uid not in alive]


def _masked(value: Any, name: str, namespace: str) -> Any:
    def mask(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "..." if key in _MASKED or key.endswith(("Time", "Seconds")) else mask(item)
                for key, item in value.items()
            }
        return [mask(item) for item in value] if isinstance(value, list) else value

    return json.loads(_UID.sub("UID", json.dumps(mask(value)).replace(name, "NAME").replace(namespace, "NAMESPACE")))


def _compare(was: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [each for key in keys for each in _compare(was.get(key), now.get(key), f"{path}.{key}".strip("."))]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True))
        return [each for number, (a, b) in pairs for each in _compare(a, b, f"{path}[{number}]")]
    return [] if was == now else [(path, was, now)]
