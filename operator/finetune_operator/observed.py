"""One job and its children at one moment: all that the pure functions know."""

from dataclasses import dataclass
from datetime import datetime

from finetune_api.job import ObjectMeta
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.children import ChildJob, Json, TrainerPod
from finetune_operator.desired.names import controller_uid
from finetune_operator.report_store import ReceivedReport
from finetune_operator.waiting import Waiting


@dataclass(frozen=True)
class Observed:
    """One job and its children at one moment. Pure functions decide on nothing else."""

    metadata: ObjectMeta
    spec: FineTuneJobSpec | None
    """None where this version cannot read it; `spec_error` says why."""

    spec_error: str
    status: FineTuneJobStatus
    """What the operator wrote last."""

    config_map: Json | None
    child: ChildJob | None
    pods: tuple[TrainerPod, ...]
    """Pods of the child Job, oldest first; those that have vanished are included as long as they are remembered."""

    strays: tuple[TrainerPod, ...]
    """Trainers that still run for a child Job that was deleted by hand."""

    obstacle: Waiting | None
    """What keeps the newest pod from existing or starting, where only events tell."""

    report: ReceivedReport | None
    """Newest progress report of the newest pod."""

    now: datetime

    @property
    def newest_pod(self) -> TrainerPod | None:
        """The pod that speaks for the job."""
        return self.pods[-1] if self.pods else None

    @property
    def foreign_child(self) -> str | None:
        """Kind and name of an object that has our child's name but belongs to someone else."""
        if self.child is not None and self.child.owner_uid != self.metadata.uid:
            return f"Job {self.child.name}"
        if self.config_map is not None and controller_uid(self.config_map["metadata"]) != self.metadata.uid:
            return f"ConfigMap {self.config_map['metadata']['name']}"
        return None
