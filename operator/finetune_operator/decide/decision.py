"""The answer to one snapshot: the phase and its reason, and the writes to child objects (pure)."""

from dataclasses import dataclass
from typing import Self

from finetune_api.base import Json
from finetune_api.outcome import Outcome
from finetune_api.status import Failure
from finetune_api.vocabulary import Phase, PreflightResult
from finetune_operator.desired.names import TRAINER, Component

RETRY_SECONDS = 30.0  # for changes that no watch of ours announces, such as those of foreign objects and Events


@dataclass(frozen=True)
class Eviction:
    """A pod to be stopped in a way that the Job controller does not count; another one of its name is left alone."""

    pod_name: str
    pod_uid: str


@dataclass(frozen=True)
class WorkloadPatch:
    """A change of Kueue's Workload."""

    workload: Json
    """The Workload as it was read."""

    changes: Json


@dataclass(frozen=True)
class Actions:
    """Writes to child objects, in the order in which they are made."""

    create_config_map: Json | None = None
    create_service: Json | None = None
    create_network_policy: Json | None = None
    create_preflight_job: Json | None = None
    create_trainer_job: Json | None = None
    create_job_set: Json | None = None
    patch_preflight_job: Json | None = None
    patch_trainer_job: Json | None = None
    patch_job_set: Json | None = None
    patch_workload: WorkloadPatch | None = None
    evict_pod: Eviction | None = None

    @property
    def creates(self) -> bool:
        """True if an object is made."""
        made = (self.create_config_map, self.create_service, self.create_network_policy)
        return any((*made, self.create_preflight_job, self.create_trainer_job, self.create_job_set))

    @property
    def starts_training(self) -> bool:
        """True if the trainer's Job, or its JobSet, is made or resumed, so that it asks for its GPUs."""
        writes = (self.create_trainer_job, self.create_job_set, self.patch_trainer_job, self.patch_job_set)
        return any(write.get("spec", {}).get("suspend") is False for write in writes if write is not None)

    @classmethod
    def patch(cls, component: Component, changes: Json | None) -> Self:
        """Patches the Job of one run; None changes nothing."""
        return cls(patch_trainer_job=changes) if component == TRAINER else cls(patch_preflight_job=changes)


@dataclass(frozen=True)
class Decision:
    """The answer to one snapshot."""

    phase: Phase
    reason: str
    message: str
    actions: Actions = Actions()
    is_stalled: bool = False
    """Value of condition Stalled: True if nothing goes on without a person, as for every failed job."""

    failure: Failure | None = None
    outcome: Outcome | None = None
    """Outcome of a job that has ended, or of its newest pod."""

    preflight: PreflightResult | None = None
    """Result of preflight, if this snapshot is the first that shows it."""

    given_up_pod: str | None = None
    """UID of a running pod that counts as stalled from now on, for its silence."""

    requeue_seconds: float | None = None
    """Time after which to look again even if nothing happens; None for no time."""

    @property
    def goes_on(self) -> bool:
        """True if the job goes on as it is: nothing is to be written but its status."""
        is_idle = self.actions == Actions() and self.given_up_pod is None
        return is_idle and not self.is_stalled and not self.phase.is_terminal

    @classmethod
    def fail(
        cls,
        failure: Failure,
        *,
        outcome: Outcome | None = None,
        preflight: PreflightResult | None = None,
        requeue_seconds: float | None = None,
    ) -> Self:
        """Ends the job with a failure, whose reason and message are the decision's."""
        return cls(
            Phase.FAILED,
            failure.reason,
            failure.message,
            is_stalled=True,
            failure=failure,
            outcome=outcome,
            preflight=preflight,
            requeue_seconds=requeue_seconds,
        )
