"""A job and its children at one moment: all that the pure functions know.

A job has up to two runs, each a batch/v1 Job with its pods: preflight, which checks the inputs, and training. A spec
that this version of the operator cannot read makes an `UnreadableSnapshot`, so that no code that works on a `Snapshot`
has to ask whether there is a spec.
"""

from dataclasses import dataclass, field
from datetime import datetime

from finetune_api.base import Json
from finetune_api.cost.prices import Price
from finetune_api.job import ObjectMeta
from finetune_api.outcome import Outcome
from finetune_api.spec.sources import Source
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Phase, PreflightMode
from finetune_operator.desired.names import PREFLIGHT, TRAINER, Component, child_name, controller_uid, names_its_data
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.job_set import JobSet, find_foreign
from finetune_operator.observe.report_store import Channel, ReceivedReport
from finetune_operator.observe.workload import QueueView

EVENTS_AFTER_SECONDS = 3.0
"""Time that a pod may take to be made, and its container to be created, before Events are asked what keeps them. To
find those of one object, the API server reads all Events of a namespace."""


@dataclass(frozen=True)
class Waiting:
    """Cause of a wait: a reason for machines and a sentence for people."""

    reason: str
    message: str
    is_stalled: bool = False
    """True if the run waits for a person rather than for the cluster."""


@dataclass(frozen=True)
class Predecessor:
    """A deleted FineTuneJob of the same name of which something still runs."""

    job_name: str
    """Name of its batch/v1 Job."""

    pod_name: str | None
    """Name of its pod; None between two attempts."""

    kept: str | None = None
    """What `--cascade=orphan` kept of it, as kubectl names it: its Job, or the JobSet that would make the Job again.
    None if the garbage collector is stopping it."""


@dataclass(frozen=True)
class GpuUser:
    """A job that holds GPUs of its namespace, or waits for them."""

    name: str
    gpus: int


@dataclass(frozen=True)
class GpuUse:
    """Use of the GPUs that a namespace may have, as one of its jobs sees it that wants to start."""

    limit: int
    using: tuple[GpuUser, ...] = ()
    """Other jobs that hold GPUs, by name."""

    ahead: tuple[GpuUser, ...] = ()
    """Jobs that were created before this one and wait, the oldest first."""


@dataclass(frozen=True)
class ChildRun:
    """One of a job's two runs: its Job, its pods and its newest report."""

    component: Component
    job: ChildJob | None = None
    """None before the Job is created, after it was deleted, and for preflight once its result is in the status."""

    pods: tuple[TrainerPod, ...] = ()
    """The Job's pods, oldest first. A pod that has vanished is here as long as `TerminatedPods` remembers it. Of a run
    on several nodes, those that lead, each with the end of its attempt."""

    report: ReceivedReport | None = None
    """Newest progress report of the newest pod. Preflight sends none."""

    doubt: str | None = None
    """Why the newest pod's termination message is not believed; None if it is, or if there is none."""

    others: tuple[TrainerPod, ...] = ()
    """The newest pods of the further nodes, by index."""

    job_set: JobSet | None = None
    """What makes the Job, where a JobSet does."""

    @property
    def newest_pod(self) -> TrainerPod | None:
        """The pod that speaks for the run."""
        return self.pods[-1] if self.pods else None

    @property
    def awaited_pod(self) -> TrainerPod | None:
        """The newest pod. Where it runs and waits for others to meet, the first of those that does not run yet; None if
        that one is not even made."""
        pod = self.newest_pod
        if pod is None or self.job is None or not pod.is_running:
            return pod

        others = {other.index: other for other in self.others}
        for index in range(1, self.job.nodes):
            other = others.get(index)
            if other is None or not (other.is_running or other.is_finished):
                return other
        return pod

    def seconds_until_events(self, now: datetime) -> float | None:
        """Returns the seconds after which only Events can say why no pod of the run starts: it is refused, or its
        volumes cannot be mounted. 0 if that is so now; None if something else says why, or if the run ends."""
        since = self._unexplained_since
        return max(0.0, EVENTS_AFTER_SECONDS - (now - since).total_seconds()) if since else None

    @property
    def _unexplained_since(self) -> datetime | None:
        if self.job is None or self.job.suspended or self.job.is_over or self.has_exited_with_0:
            return None
        pod, begun = self.awaited_pod, self.job.started or self.job.created
        if pod is None:
            return begun
        if pod.is_finished:
            return self.end_time or begun
        return pod.scheduled or begun if pod.waiting_reason == "ContainerCreating" else None

    @property
    def outcome(self) -> Outcome | None:
        """Termination message of the newest pod, if it has ended and left one that can be read and is believed."""
        pod = self.newest_pod
        return pod.termination.outcome() if pod and pod.termination and self.doubt is None else None

    @property
    def has_exited_with_0(self) -> bool:
        """True if the newest pod's trainer ended with exit code 0, whatever it wrote before."""
        pod = self.newest_pod
        return pod is not None and pod.termination is not None and pod.termination.exit_code == 0

    @property
    def end_time(self) -> datetime | None:
        """Time at which the newest pod's trainer ended."""
        pod = self.newest_pod
        return pod.termination.finished if pod and pod.termination else None


@dataclass(frozen=True)
class Peers:
    """Objects that a job on several nodes needs beside its Job, as they were read; None where one is missing, or not
    needed."""

    service: Json | None = None
    network_policy: Json | None = None


@dataclass(frozen=True, kw_only=True)
class AnySnapshot:
    """A job and its children at one moment, whatever its spec says."""

    metadata: ObjectMeta
    status: FineTuneJobStatus
    """The status that the operator wrote last."""

    result_location: str | None = None
    """Address below which the job writes: that of the status, which never changes. None if it has none yet and the spec
    cannot be read."""

    price: Price | None = None
    """Price of a GPU for a new pod; None if the administrator set none."""

    config_map: Json | None = None
    """The one that the current run's Job mounts; without a Job, the one that it would mount."""

    peers: Peers = Peers()
    preflight: ChildRun = ChildRun(PREFLIGHT)
    training: ChildRun = ChildRun(TRAINER)
    orphaned_pods: tuple[TrainerPod, ...] = ()
    """Pods that still run although somebody deleted their Job."""

    predecessor: Predecessor | None = None
    """Looked for until the trainer's Job exists."""

    blocker: Waiting | None = None
    """What keeps the newest pod from being created or started, if only Events show it."""

    queue: QueueView | None = None
    """What the queue of the current run says that its Job does not; None if it is in none, or on its way."""

    job_set_problem: str | None = None
    """Why no JobSet can be made for a job that asks for one; None if one can, or is there."""

    gpu_use: GpuUse | None = None
    """Of a job that would take GPUs now, where the administrator has set a limit."""

    channel: Channel = field(default_factory=Channel)
    """What is known about the way of reports."""

    now: datetime

    @property
    def current_run(self) -> ChildRun:
        """Training as soon as its Job exists, preflight before."""
        return self.training if self.training.job is not None else self.preflight

    @property
    def foreign_child(self) -> str | None:
        """Kind and name of an object that has the name of our child but belongs to somebody else."""
        # Children of a predecessor with the same name are foreign too: it had another UID.
        for run in (self.training, self.preflight):
            if foreign := find_foreign(self.metadata.uid, run.job, run.job_set):
                return foreign

        for kind, body in (("Service", self.peers.service), ("NetworkPolicy", self.peers.network_policy)):
            if body is not None and controller_uid(body["metadata"]) != self.metadata.uid:
                return f"{kind} {body['metadata']['name']}"

        if self.config_map is not None and controller_uid(self.config_map["metadata"]) != self.metadata.uid:
            return f"ConfigMap {self.config_map['metadata']['name']}"

        return None

    @property
    def altered_config_map(self) -> str | None:
        """Name of the ConfigMap if it holds other data than its name says, or if anybody may change it."""
        if self.config_map is None or names_its_data(self.config_map):
            return None

        # Up to version 0.1 there was one for each job, which had the name of the trainer's Job and could be changed.
        name = str(self.config_map["metadata"]["name"])
        return None if name == child_name(self.metadata) else name

    def with_spec(self, spec: FineTuneJobSpec | str) -> "Snapshot | UnreadableSnapshot":
        """Adds the spec, or the sentence that says why it cannot be read."""
        if isinstance(spec, str):
            return UnreadableSnapshot(**vars(self), spec_error=spec)
        return Snapshot(**vars(self), spec=spec)


@dataclass(frozen=True, kw_only=True)
class Snapshot(AnySnapshot):
    """A job whose spec this version of the operator can read."""

    spec: FineTuneJobSpec

    @property
    def output_prefix(self) -> str:
        """Prefix of every key that the job writes, without a slash at either end."""
        assert self.result_location is not None  # a spec that can be read has one
        return Source.parse(self.result_location).path.strip("/")

    @property
    def is_settled(self) -> bool:
        """True if the job needs nothing more, whatever becomes of its children."""
        return is_settled(self.metadata, self.spec, self.status)

    @property
    def awaits_preflight(self) -> bool:
        """True if preflight comes first, and its result is not in the status yet."""
        return self.training.job is None and awaits_preflight(self.spec, self.status)


@dataclass(frozen=True, kw_only=True)
class UnreadableSnapshot(AnySnapshot):
    """A job whose spec this version of the operator cannot read; perhaps a newer version wrote it."""

    spec_error: str
    """The fields that could not be read, and why."""


@dataclass(frozen=True, kw_only=True)
class BlindSnapshot(AnySnapshot):
    """A job whose children the operator may not read: it knows nothing of them, not even that there are none."""

    refusal: str
    """The request that was refused, and the API server's words, which name verb and resource."""


def is_settled(metadata: ObjectMeta, spec: FineTuneJobSpec | str, status: FineTuneJobStatus) -> bool:
    """True if a job needs nothing more, whatever became of its Job: it succeeded, and no TTL is to be given."""
    return (
        status.phase is Phase.SUCCEEDED
        and status.observed_generation == metadata.generation  # a TTL that was taken back is taken from the Job too
        and isinstance(spec, FineTuneJobSpec)
        and spec.run_policy.ttl_seconds_after_finished is None
        and spec.scheduling.queue_name is None  # a Job that its queue holds has to leave it
    )


def awaits_preflight(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> bool:
    """True if a job is to be checked and was not. The spec's inputs cannot change, so one result holds for ever."""
    is_known = status.preflight is not None and status.preflight.result is not None
    return spec.run_policy.preflight is PreflightMode.RUN and not is_known
