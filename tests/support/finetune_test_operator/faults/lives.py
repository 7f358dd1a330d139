"""Lives of jobs, from creation to the end: what a user and a kubelet do, each time the operator has done its part."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.base import Json
from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_operator.desired.names import PREFLIGHT, preflight_name
from finetune_test_operator.jobs import FINISHED, Jobs, Outcomes
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

PATIENCE_SECONDS = 100.0
"""Time within which the operator must take each step: a silent watch is noticed after 70 s."""

TTL_SECONDS = 3600
_INTERRUPTED = Outcome(
    result=Result.INTERRUPTED,
    reason=FailureReason.INTERRUPTED,
    exit_code=ExitCode.INTERRUPTED,
    step=7,
    checkpoint_step=7,
    finished=FINISHED,
)


@dataclass(frozen=True)
class Stage:
    """Where lives are lived: one namespace, its jobs, and its kubelet."""

    jobs: Jobs
    kubelet: PlayedKubelet

    def phase(self, name: str, phase: str) -> Json:
        """The job, as soon as it is in a phase."""
        return self.jobs.wait_for_phase(name, phase, PATIENCE_SECONDS)

    def pod(self, name: str, number: int = 1, component: str = "trainer") -> Any:
        """The job's pod, as soon as it is there."""
        return self.kubelet.wait_for_pod(name, number, PATIENCE_SECONDS, component)

    def run(self, name: str, number: int = 1) -> Any:
        """Run the trainer's pod until the status says so."""
        pod = self.pod(name, number)
        self.phase(name, "Queued")  # a state that passes unseen leaves no Event, which is no fault
        self.kubelet.run(pod)
        self.phase(name, "Running")
        return pod

    def ttl(self, name: str) -> None:
        """Wait for the last write of a life."""
        wait_for(
            lambda: "ttlSecondsAfterFinished" in self.jobs.child(name)["spec"], f"{name}: its TTL", PATIENCE_SECONDS
        )


def _passes(stage: Stage, name: str) -> None:
    """Preflight, training, success."""
    stage.jobs.create(name, preflight="Run", ttlSecondsAfterFinished=TTL_SECONDS)
    _check(stage, name, 0, Outcomes.checked)
    pod = stage.run(name)
    stage.kubelet.end(pod, 0, Outcomes.success.encode())
    stage.phase(name, "Succeeded")
    stage.ttl(name)


def _refused(stage: Stage, name: str) -> None:
    """Preflight finds errors in the data."""
    stage.jobs.create(name, preflight="Run", ttlSecondsAfterFinished=TTL_SECONDS)
    _check(stage, name, ExitCode.DATA, Outcomes.refused)
    stage.phase(name, "Failed")
    naming = preflight_name
    wait_for(lambda: "ttlSecondsAfterFinished" in stage.jobs.child(name, naming)["spec"], "its TTL", PATIENCE_SECONDS)


def _fails(stage: Stage, name: str) -> None:
    """The trainer crashes twice; it may be tried twice."""
    stage.jobs.create(name, maxRetries=1, ttlSecondsAfterFinished=TTL_SECONDS)
    stage.kubelet.end(stage.run(name), 137)
    stage.kubelet.end(stage.run(name, 2), 137)
    stage.phase(name, "Failed")
    stage.ttl(name)


def _pauses(stage: Stage, name: str) -> None:
    """Suspended while it trains, resumed, success."""
    stage.jobs.create(name, ttlSecondsAfterFinished=TTL_SECONDS)
    pod = stage.run(name)
    stage.jobs.patch_run_policy(name, suspend=True)
    _wait_for_stop(stage, name)
    stage.kubelet.end(pod, ExitCode.INTERRUPTED, _INTERRUPTED.encode())
    # Nobody can know the last words of a pod that is gone before a broken watch is back.
    stage.jobs.wait(name, lambda s: s.get("checkpointStep") == 7, f"{name}: its last words", PATIENCE_SECONDS)
    stage.kubelet.remove(pod)
    stage.phase(name, "Suspended")
    wait_for(lambda: not stage.kubelet.pods(name), f"{name}: no pod", PATIENCE_SECONDS)

    stage.jobs.patch_run_policy(name, suspend=False)
    stage.kubelet.end(stage.run(name), 0, Outcomes.success.encode())
    stage.phase(name, "Succeeded")
    stage.ttl(name)


def _leaves(stage: Stage, name: str) -> None:
    """Deleted while it trains."""
    stage.jobs.create(name)
    pod = stage.run(name)
    stage.jobs.delete(name)
    _wait_for_stop(stage, name)
    stage.kubelet.end(pod, ExitCode.INTERRUPTED, _INTERRUPTED.encode())
    stage.kubelet.remove(pod)

    def is_gone() -> bool:
        return not (stage.jobs.exists(name) or stage.kubelet.pods(name) or stage.jobs.config_maps(name))

    wait_for(is_gone, f"{name}: nothing is left", PATIENCE_SECONDS)


def _check(stage: Stage, name: str, code: int, outcome: Outcome) -> None:
    pod = stage.pod(name, component=PREFLIGHT)
    stage.kubelet.run(pod)
    stage.jobs.wait(name, lambda s: "startTime" in s.get("preflight", {}), "preflight runs", PATIENCE_SECONDS)
    stage.kubelet.end(pod, code, outcome.encode())


def _wait_for_stop(stage: Stage, name: str) -> None:
    wait_for(
        lambda: any(pod.metadata.deletion_timestamp for pod in stage.kubelet.pods(name)),
        f"{name}: its pod is told to stop",
        PATIENCE_SECONDS,
    )


LIVES: Final[dict[str, Callable[[Stage, str], None]]] = {
    "passes": _passes,
    "refused": _refused,
    "fails": _fails,
    "pauses": _pauses,
    "leaves": _leaves,
}


def settle(stage: Stage, name: str, seconds: float) -> None:
    """Wait until the job has not changed for a while."""
    version, since = "", time.monotonic()
    while time.monotonic() - since < seconds:
        now = stage.jobs.get(name)["metadata"]["resourceVersion"] if stage.jobs.exists(name) else ""
        if now != version:
            version, since = now, time.monotonic()
        time.sleep(0.2)
