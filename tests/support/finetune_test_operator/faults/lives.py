"""Lives of jobs, from creation to the end: what a user and a kubelet do, each time the operator has done its part."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.base import Json
from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_NAME_LABEL
from finetune_operator.desired.names import PREFLIGHT, TRAINER
from finetune_test_operator.faults.informer import Informer
from finetune_test_operator.jobs import FINISHED, Jobs, Outcomes
from finetune_test_operator.played_kubelet import PlayedKubelet

PATIENCE_SECONDS = 180.0
"""Time within which the operator must take each step. A silent watch is noticed after 70 s, what a stale list hid is
found within two minutes."""

CROWD = 3.0  # programs that wait for each core, from which on everything takes longer
MAX_STRETCH = 3.0

SECRET: Final = "canary"
"""Name of the Secret that every life's job names for its model, data and output."""

TTL_SECONDS = 3600
INTERRUPTED = Outcome(
    result=Result.INTERRUPTED,
    reason=FailureReason.INTERRUPTED,
    exit_code=ExitCode.INTERRUPTED,
    step=7,
    checkpoint_step=7,
    finished=FINISHED,
)


def patience() -> float:
    """Seconds to wait for the operator now: more on a machine that others keep busy, where nothing else is wrong."""
    crowd = os.getloadavg()[0] / (os.cpu_count() or 1)
    return PATIENCE_SECONDS * min(MAX_STRETCH, max(1.0, crowd / CROWD))


@dataclass(frozen=True)
class Stage:
    """Where lives are lived: one namespace, its jobs, and its kubelet."""

    jobs: Jobs
    kubelet: PlayedKubelet
    informer: Informer
    is_seen: bool = True
    """False where the operator's watches may be broken: nobody can then know the last words of a pod that is gone, so
    the kubelet leaves each pod until the operator has read them."""

    def create(self, name: str, **run_policy: Any) -> str:
        """Create a job that names the Secret; returns its UID."""
        return str(self.jobs.create(name, SECRET, **run_policy)["metadata"]["uid"])

    def wait_for(self, get: Callable[[], Any], what: str) -> Any:
        """Wait until `get` returns something true."""
        try:
            return self.informer.wait_for(get, what, patience())
        except TimeoutError as error:
            name = what.split(":")[0]
            raise TimeoutError(f"{error}; status: {self.status(name)}") from None

    def status(self, name: str) -> Json:
        """The job's status as the watch shows it."""
        return (self.informer.get("finetunejobs", name) or {}).get("status") or {}

    def phase(self, name: str, phase: str) -> None:
        """Wait until the job is in a phase."""
        self.wait_for(lambda: self.status(name).get("phase") == phase, f"{name}: {phase}")

    def found(self, kind: str, name: str, component: str = "") -> list[Json]:
        """Objects of a job, oldest first."""
        labels = {JOB_NAME_LABEL: name} | ({COMPONENT_LABEL: component} if component else {})
        return self.informer.find(kind, labels)

    def pod(self, name: str, number: int = 1, component: str = TRAINER) -> Any:
        """The job's pod number `number`, as soon as it is there and has not ended."""

        def get() -> str:
            pods = self.found("pods", name, component)
            alive = [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Pending"]
            return alive[-1] if len(pods) >= number and alive else ""

        found = self.kubelet.find(self.wait_for(get, f"{name}: {component} pod {number}"))
        assert found is not None, f"{name}: its pod is gone again"
        return found

    def run(self, name: str, number: int = 1) -> Any:
        """Run the trainer's pod until the status says so."""
        pod = self.pod(name, number)
        self.phase(name, "Queued")  # a state that passes unseen leaves no Event, which is no fault
        self.kubelet.run(pod)
        self.phase(name, "Running")
        return pod

    def ttl(self, name: str, component: str = TRAINER) -> None:
        """Wait for the last write of a life."""
        self.wait_for(
            lambda: any("ttlSecondsAfterFinished" in job["spec"] for job in self.found("jobs", name, component)),
            f"{name}: its TTL",
        )

    def stop(self, name: str, pod: Any) -> None:
        """End a pod that is told to stop, as a kubelet does."""
        self.wait_for(
            lambda: any("deletionTimestamp" in each["metadata"] for each in self.found("pods", name)),
            f"{name}: its pod is told to stop",
        )
        self.kubelet.end(pod, ExitCode.INTERRUPTED, INTERRUPTED.encode())
        if not self.is_seen and self.informer.get("finetunejobs", name):
            self.wait_for(lambda: self.status(name).get("checkpointStep") == 7, f"{name}: its last words")
        self.kubelet.remove(pod)


def _passes(stage: Stage, name: str) -> None:
    """Preflight, training, success."""
    stage.create(name, preflight="Run", ttlSecondsAfterFinished=TTL_SECONDS)
    _check(stage, name, 0, Outcomes.checked)
    pod = stage.run(name)
    stage.kubelet.end(pod, 0, Outcomes.success.encode())
    stage.phase(name, "Succeeded")
    stage.ttl(name)


def _refused(stage: Stage, name: str) -> None:
    """Preflight finds errors in the data."""
    stage.create(name, preflight="Run", ttlSecondsAfterFinished=TTL_SECONDS)
    _check(stage, name, ExitCode.DATA, Outcomes.refused)
    stage.phase(name, "Failed")
    stage.ttl(name, PREFLIGHT)


def _fails(stage: Stage, name: str) -> None:
    """The trainer crashes twice; it may be tried twice."""
    stage.create(name, maxRetries=1, ttlSecondsAfterFinished=TTL_SECONDS)
    stage.kubelet.end(stage.run(name), 137)
    stage.kubelet.end(stage.run(name, 2), 137)
    stage.phase(name, "Failed")
    stage.ttl(name)


def _pauses(stage: Stage, name: str) -> None:
    """Suspended while it trains, resumed, success."""
    stage.create(name, ttlSecondsAfterFinished=TTL_SECONDS)
    pod = stage.run(name)
    stage.jobs.patch_run_policy(name, suspend=True)
    stage.stop(name, pod)
    stage.phase(name, "Suspended")
    stage.wait_for(lambda: not stage.found("pods", name), f"{name}: no pod")

    stage.jobs.patch_run_policy(name, suspend=False)
    stage.kubelet.end(stage.run(name), 0, Outcomes.success.encode())
    stage.phase(name, "Succeeded")
    stage.ttl(name)


def _leaves(stage: Stage, name: str) -> None:
    """Deleted while it trains."""
    stage.create(name)
    pod = stage.run(name)
    stage.jobs.delete(name)
    stage.wait_for(lambda: not stage.informer.get("finetunejobs", name), f"{name}: deleted")
    stage.stop(name, pod)
    kinds = ("pods", "jobs", "configmaps")
    stage.wait_for(lambda: not any(stage.found(kind, name) for kind in kinds), f"{name}: nothing is left")


def _check(stage: Stage, name: str, code: int, outcome: Outcome) -> None:
    pod = stage.pod(name, component=PREFLIGHT)
    stage.kubelet.run(pod)
    stage.wait_for(lambda: "startTime" in stage.status(name).get("preflight", {}), f"{name}: preflight runs")
    stage.kubelet.end(pod, code, outcome.encode())


LIVES: Final[dict[str, Callable[[Stage, str], None]]] = {
    "passes": _passes,
    "refused": _refused,
    "fails": _fails,
    "pauses": _pauses,
    "leaves": _leaves,
}
