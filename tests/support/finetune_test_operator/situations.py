"""Every situation that a FineTuneJob can be in, with the status that the operator's own code gives it.

`LIVES` are whole lives, a situation a minute. `MOMENTS` are single situations of a job that was never looked at before,
and `CHECKED_MOMENTS` those of one whose checks have passed; `ends` has an end for every failure reason.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from finetune_api import API_VERSION, KIND
from finetune_api.base import Json
from finetune_api.failures import FAILURES, ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Stage
from finetune_operator.decide.decide import decide
from finetune_operator.errors import ApiError
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.report_store import Channel, Heard
from finetune_operator.observe.snapshot import (
    BlindSnapshot,
    GpuUse,
    GpuUser,
    Predecessor,
    Snapshot,
    UnreadableSnapshot,
    Waiting,
)
from finetune_operator.observe.workload import QueueView
from finetune_operator.reconcile import explain_refusal
from finetune_operator.status.status import build_status
from finetune_test_operator.outcomes import BAD_ROW, END, FAILED, STAGES, SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    METADATA,
    NOW,
    POD,
    a_blind_snapshot,
    a_pod,
    a_preflight_job,
    a_preflight_snapshot,
    a_report,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    a_workload,
    an_ended_pod,
    an_unreadable_snapshot,
    at,
    decision_about,
)

CHECKED = Outcome(result=Result.SUCCEEDED, message="400 rows", stage=Stage.PREFLIGHT, finished=END)
PAUSED = a_spec(runPolicy={"suspend": True})
LIMITED = a_spec(runPolicy={"startupDeadlineSeconds": 90})
NO_NODE = a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}])
NO_IMAGE = a_pod(state={"waiting": {"reason": "ErrImagePull", "message": "not found"}})
RUNS = a_running_pod()
TRAINS = a_snapshot(pods=(RUNS,), report=a_report(stages=STAGES))

Life = Mapping[str, Snapshot | UnreadableSnapshot | BlindSnapshot]
LIVES: dict[str, Life] = {
    "it passes": {
        "nothing exists yet": a_preflight_snapshot(job=None, config_map=None),
        "the pod of the checks waits": a_preflight_snapshot(a_pod()),
        "the checks run": a_preflight_snapshot(RUNS),
        "the checks passed": a_preflight_snapshot(an_ended_pod(0, CHECKED)),
        "the trainer's Job is made": a_snapshot(job=None),
        "no node fits": a_snapshot(pods=(NO_NODE,)),
        "the trainer runs, silently": a_snapshot(pods=(RUNS,)),
        "the trainer trains": TRAINS,
        "it uploads": a_snapshot(pods=(RUNS,), report=a_report(stage=Stage.UPLOADING)),
        "it has succeeded": a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),)),
    },
    "somebody mends it": {
        "an image is missing": a_snapshot(pods=(NO_IMAGE,)),
        "a quota refuses the pod": a_snapshot(blocker=Waiting("PodRejected", "exceeded quota", is_stalled=True)),
        "it trains": TRAINS,
        "a newer operator's spec cannot be read": an_unreadable_snapshot("spec.magic: unknown", pods=(RUNS,)),
    },
    "it is paused": {
        "it trains": TRAINS,
        "the checkpoint is written": a_snapshot(PAUSED, pods=(RUNS,)),
        "it is suspended": a_snapshot(PAUSED, job=a_trainer_job(PAUSED)),
        "it is resumed": a_snapshot(),
        "it is deleted": a_snapshot(
            metadata=METADATA.model_copy(update={"deletion_timestamp": at(0)}), pods=(a_running_pod(),)
        ),
    },
    "it crashes, and its data are bad": {
        "it runs": a_snapshot(pods=(RUNS,)),
        "another pod follows": a_snapshot(pods=(an_ended_pod(139),)),
        "the last pod has ended": a_snapshot(pods=(an_ended_pod(11, BAD_ROW),)),
        "it has failed": a_snapshot(pods=(an_ended_pod(11, BAD_ROW),), job=a_trainer_job(failed=FAILED)),
    },
    "its pod does not start in time": {
        "no node fits": a_snapshot(LIMITED, pods=(NO_NODE,)),
        "no node fits still": a_snapshot(LIMITED, pods=(NO_NODE,)),
        "it has failed": a_snapshot(LIMITED, pods=(NO_NODE,)),
    },
    "the checks refuse it": {
        "bad data": a_preflight_snapshot(an_ended_pod(11, BAD_ROW), job=a_preflight_job(failed=FAILED)),
    },
    "its result was there": {
        "it is reused": a_preflight_snapshot(an_ended_pod(0, CHECKED.model_copy(update={"reused": True}))),
    },
    "its name is taken": {"a foreign Job is in its place": a_snapshot(job=a_trainer_job(owner="someone"))},
}


def live(life: Life) -> dict[str, FineTuneJobStatus]:
    """The status in each situation; one a minute."""
    status, found = FineTuneJobStatus(), {}
    for minute, (situation, snapshot) in enumerate(life.items()):
        seen = replace(snapshot, status=status, now=NOW + timedelta(minutes=minute))
        status = build_status(seen, decision_about(seen))
        found[situation] = status
    return found


UNCHECKED = a_spec(runPolicy={"preflight": "Skip"})
QUEUED = a_spec(scheduling={"queueName": "research"})
QUEUED_AND_PAUSED = a_spec(scheduling={"queueName": "research"}, runPolicy={"suspend": True})
MISSING = Waiting("ContainerConfigError", 'the trainer cannot start: secret "s3" not found', is_stalled=True)
KUEUE_EVICTS = ("Evicted", "True", "Preempted", "Preempted to accommodate a workload")
COMPLETE = TrueCondition("CompletionsReached", "", NOW)
TOO_LARGE = {"reason": FailureReason.CUDA_OUT_OF_MEMORY, "exit_code": ExitCode.OUT_OF_MEMORY, "stage": Stage.TRAINING}
SILENT = {"report": a_report(), "channel": Channel(NOW, Heard(POD, NOW)), "now": NOW + timedelta(seconds=2000)}


def _in_queue(**fields: Json | str | bool) -> Snapshot:
    view = QueueView("research", **fields)  # type: ignore[arg-type]
    return a_snapshot(QUEUED, job=a_trainer_job(QUEUED), queue=view)


MOMENTS: Life = {
    "the trainer's Job is made, without checks": a_snapshot(UNCHECKED, job=None),
    "the Job has no pod yet": a_snapshot(),
    "a pod starts": a_snapshot(pods=(a_pod(),)),
    "a deleted job of the same name still runs": a_snapshot(
        UNCHECKED, job=None, predecessor=Predecessor("bot-0", "bot-0-x")
    ),
    "the Job is being deleted": a_snapshot(job=a_trainer_job(deleting=True)),
    "the trainer has read model and data, without checks": a_snapshot(
        UNCHECKED, pods=(RUNS,), report=a_report(stages=STAGES)
    ),
    "the namespace has no GPU left": a_snapshot(UNCHECKED, job=None, gpu_use=GpuUse(1, (GpuUser("other", 1),))),
    "suspended, before the checks": a_preflight_snapshot(spec=PAUSED, job=a_preflight_job(PAUSED)),
    "Kueue has no room": _in_queue(workload=a_workload(("QuotaReserved", "False", "Pending", "no quota"))),  # type: ignore[arg-type]
    "Kueue has evicted it": _in_queue(workload=a_workload(KUEUE_EVICTS)),  # type: ignore[arg-type]
    "its queue is missing": _in_queue(problem="namespace team has no LocalQueue research"),
    "its Workload was deactivated": _in_queue(workload=a_workload(active=False)),  # type: ignore[arg-type]
    "Kueue wants a queue": a_snapshot(job=a_trainer_job(suspended=True, is_held_by_kueue=True)),
    "only Kueue may suspend it": a_snapshot(
        QUEUED_AND_PAUSED, job=a_trainer_job(QUEUED), queue=QueueView("research", is_visible=False)
    ),
    "a Secret is missing": a_snapshot(pods=(a_pod(),), blocker=MISSING),
    "the namespace is denied": a_snapshot(job=None, metadata=METADATA.model_copy(update={"namespace": "kube-system"})),
    "no JobSet can be made": a_snapshot(
        UNCHECKED, job=None, job_set_problem="this cluster does not serve jobset.x-k8s.io/v1alpha2"
    ),
    "a right to read is lost": a_blind_snapshot("the API server refused GET jobs: forbidden", FineTuneJobStatus()),
}
CHECKED_MOMENTS: Life = {
    "no node fits, after the checks": a_snapshot(pods=(NO_NODE,)),
    "an image is missing, after the checks": a_snapshot(pods=(NO_IMAGE,)),
    **{
        f"stage {stage.value}": a_snapshot(pods=(RUNS,), report=a_report(stage=stage))
        for stage in Stage
        if stage is not Stage.PREFLIGHT
    },
    "the trainer is silent": a_snapshot(pods=(RUNS,), **SILENT),  # type: ignore[arg-type]
    "the GPU time is spent": a_snapshot(
        a_spec(runPolicy={"maxGpuSeconds": 1}), pods=(RUNS,), now=NOW + timedelta(seconds=60)
    ),
    "suspended, after the checks": a_snapshot(PAUSED, job=a_trainer_job(PAUSED)),
    "succeeded, after the checks": a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),)),
    "its outcome is lost": a_snapshot(job=a_trainer_job(complete=COMPLETE)),
    "out of GPU memory, after the checks": a_snapshot(
        pods=(an_ended_pod(13, BAD_ROW.model_copy(update=TOO_LARGE)),),
        job=a_trainer_job(failed=FAILED),
    ),
}


def ends() -> Life:
    """A job that has failed, for every failure reason with which a job can fail."""
    crash, late = TrueCondition("BackoffLimitExceeded", "", NOW), TrueCondition("DeadlineExceeded", "", NOW)
    found: dict[str, Snapshot] = {}
    for reason, row in FAILURES.items():
        if row.exit_code is not None:
            said = Outcome(result=Result.FAILED, reason=reason, message="m", exit_code=row.exit_code, finished=END)
            pod = an_ended_pod(row.exit_code, said)
            found[f"failed: {reason}"] = a_snapshot(pods=(pod,), job=a_trainer_job(failed=crash))
    hours = a_spec(runPolicy={"activeDeadlineSeconds": 60})
    budget = a_spec(runPolicy={"maxGpuSeconds": 1})
    over, late_now = (
        a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),), job=a_trainer_job(complete=COMPLETE)),
        NOW + timedelta(seconds=9000),
    )
    waits = live({"it waits": a_snapshot(LIMITED)})["it waits"]
    found |= {
        f"failed: {FailureReason.DEADLINE_EXCEEDED}": a_snapshot(hours, job=a_trainer_job(hours, failed=late)),
        f"failed: {FailureReason.GPU_BUDGET_EXHAUSTED}": a_snapshot(
            budget, job=a_trainer_job(budget, deadline=1), pods=(RUNS,), now=late_now
        ),
        f"failed: {FailureReason.STARTUP_DEADLINE_EXCEEDED}": a_snapshot(LIMITED, status=waits, now=late_now),
        f"failed: {FailureReason.UNTRUSTED_RESULT}": replace(
            over, training=replace(over.training, doubt="it names a manifest in another bucket")
        ),
        f"failed: {FailureReason.TRAINER_CRASHED}": a_snapshot(
            pods=(an_ended_pod(139),), job=a_trainer_job(failed=crash)
        ),
        f"failed: {FailureReason.EVICTED}": a_snapshot(
            pods=(an_ended_pod(137, reason="Evicted"),), job=a_trainer_job(failed=crash)
        ),
    }
    return found


def all_statuses() -> dict[str, FineTuneJobStatus]:
    """The status of every situation."""
    checks = live(LIVES["it passes"])["the checks passed"]
    found = {f"{name}: {moment}": status for name, life in LIVES.items() for moment, status in live(life).items()}
    found |= {name: _status_of(snapshot) for name, snapshot in {**MOMENTS, **ends()}.items()}
    found |= {name: _status_of(replace(snapshot, status=checks)) for name, snapshot in CHECKED_MOMENTS.items()}

    greedy = a_snapshot(a_spec(resources={"gpus": 2}), job=None)
    limited = decide(greedy, replace(INSTALLATION, max_gpus_per_namespace=1))
    found["failed: GpuLimitExceeded"] = build_status(greedy, limited)

    account = a_snapshot(a_spec(pod={"serviceAccountName": "admin"}), job=None)
    found["failed: PodFieldNotAllowed"] = build_status(account, decide(account, INSTALLATION))

    refused = a_snapshot(UNCHECKED, job=None)
    decision = explain_refusal(decision_about(refused), ApiError(422, "POST jobs", "spec.template: Invalid value"))
    return found | {"the API server refuses the Job": build_status(refused, decision)}


SPEC: Json = {
    "model": {"source": "s3://models/tiny/"},
    "dataset": {"source": "s3://data/chat.jsonl"},
    "output": {"s3": {"bucket": "results"}},
    "resources": {"gpus": 1, "nodeSelector": {}},
    "runPolicy": {"suspend": False},
}
"""What tools read of a spec; without the other defaults, so that a new field changes no file."""


def as_object(status: Json | None, *, generation: int = 1, deleted: bool = False) -> Json:
    """The FineTuneJob as the API server gives it to a tool."""
    metadata = {"name": METADATA.name, "namespace": METADATA.namespace, "uid": METADATA.uid, "generation": generation}
    body = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata | ({"deletionTimestamp": at(0)} if deleted else {}),
        "spec": SPEC,
    }
    return body if status is None else body | {"status": status}


def _status_of(snapshot: Snapshot | UnreadableSnapshot | BlindSnapshot) -> FineTuneJobStatus:
    return build_status(snapshot, decision_about(snapshot))
