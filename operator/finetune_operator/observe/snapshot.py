"""One job and its children at one moment: all that the pure functions know."""

from dataclasses import dataclass, replace
from datetime import datetime

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import PreflightMode
from finetune_operator.desired.names import controller_uid
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.report_store import ReceivedReport


@dataclass(frozen=True)
class Waiting:
    """Why a job waits."""

    reason: str
    message: str
    is_stalled: bool = False
    """Whether it waits for a person rather than for the cluster."""


@dataclass(frozen=True)
class Snapshot:
    """One job and its children at one moment. Pure functions decide on nothing else."""

    metadata: ObjectMeta
    spec: FineTuneJobSpec | None
    """None where this version cannot read it; `spec_error` says why."""

    spec_error: str
    status: FineTuneJobStatus
    """What the operator wrote last."""

    config_map: Json | None
    child: ChildJob | None
    """The trainer's Job."""

    pods: tuple[TrainerPod, ...]
    """Pods of the child Job, oldest first; those that have vanished are included as long as they are remembered."""

    preflight: ChildJob | None
    """The Job of preflight; not looked at any more once its result is in the status."""

    preflight_pods: tuple[TrainerPod, ...]
    orphaned_pods: tuple[TrainerPod, ...]
    """Pods that still run for a Job that was deleted by hand."""

    blocker: Waiting | None
    """What keeps the newest pod from existing or starting, where only events tell."""

    report: ReceivedReport | None
    """Newest progress report of the newest pod."""

    now: datetime

    @property
    def newest_pod(self) -> TrainerPod | None:
        """The pod that speaks for the job."""
        return self.pods[-1] if self.pods else None

    @property
    def is_validating(self) -> bool:
        """Whether preflight comes first, and its result is not in the status yet."""
        return self.child is None and awaits_preflight(self.spec, self.status)

    def of_preflight(self) -> "Snapshot":
        """The same with preflight's Job and pods in the place of the trainer's."""
        return replace(self, child=self.preflight, pods=self.preflight_pods, report=None)

    @property
    def foreign_child(self) -> str | None:
        """Kind and name of an object that has our child's name but belongs to someone else."""
        for job in (self.child, self.preflight):
            if job is not None and job.owner_uid != self.metadata.uid:
                return f"Job {job.name}"
        if self.config_map is not None and controller_uid(self.config_map["metadata"]) != self.metadata.uid:
            return f"ConfigMap {self.config_map['metadata']['name']}"
        return None


def awaits_preflight(spec: FineTuneJobSpec | None, status: FineTuneJobStatus) -> bool:
    """Whether a job is to be checked and was not. The spec's inputs cannot change, so the result holds for the UID."""
    is_known = status.preflight is not None and status.preflight.result is not None
    return spec is not None and spec.run_policy.preflight is PreflightMode.RUN and not is_known
