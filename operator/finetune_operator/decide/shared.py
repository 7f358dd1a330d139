"""Rules that hold for both runs, preflight and training (pure)."""

from dataclasses import replace

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision
from finetune_operator.decide.open_run import describe_open_run, follow_spec, follow_suspension_of_set
from finetune_operator.decide.waiting.queue import follow_suspension
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import TRAINER
from finetune_operator.desired.peers import build_network_policy, build_service
from finetune_operator.desired.run_config_map import build_run_config_map, reports_elsewhere
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.status_reasons import StatusReason

ORPHAN_SECONDS = 2.0  # short: the pod is already being stopped


def child_is_being_deleted(_: Snapshot, run: ChildRun, *__: object) -> Decision | None:
    """Somebody deleted the run's Job, or its JobSet, and it is still there."""
    kinds = (("JobSet", run.job_set), ("Job", run.job))
    gone = next((f"{kind} {each.name}" for kind, each in kinds if each is not None and each.deleting), None)
    if gone is None:
        return None
    message = f"somebody deleted {gone}: it is created again as soon as it is gone"
    return Decision(_waiting_phase(run), StatusReason.JOB_DELETED, message, requeue_seconds=RETRY_SECONDS)


def orphaned_pods_still_run(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """Somebody deleted the run's Job, and its pod still runs. A new Job has to wait: there are never two pods at
    once."""
    if run.job is not None or not snapshot.orphaned_pods:
        return None
    message = f"waiting until pod {snapshot.orphaned_pods[0].name} has ended, because somebody deleted its Job"
    return Decision(_waiting_phase(run), StatusReason.JOB_DELETED, message, requeue_seconds=ORPHAN_SECONDS)


def predecessor_still_runs(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """A FineTuneJob of this name was deleted, and something of it still runs. Both would write to one place in S3, so
    the new one has to wait. What was kept on purpose is not stopped: it may be hours of training."""
    former = snapshot.predecessor
    if run.job is not None or former is None:
        return None

    what = f"pod {former.pod_name} of Job {former.job_name}" if former.pod_name else f"Job {former.job_name}"
    message = f"waiting until {what} has ended: it belongs to a FineTuneJob of the same name that was deleted"
    if former.kept:
        message += f" without it. To start now, delete it: kubectl delete {former.kept}"

    seconds = RETRY_SECONDS if former.kept else ORPHAN_SECONDS
    return Decision(_waiting_phase(run), StatusReason.PREDECESSOR_RUNNING, message, requeue_seconds=seconds)


def config_map_is_missing(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """Somebody deleted the ConfigMap that the run's Job mounts. It is made again if what would be written now has the
    name that the Job asks for, and so the same data."""
    if run.job is None or snapshot.config_map is not None:
        return None
    wanted = wanted_config_map(snapshot, installation)
    if wanted["metadata"]["name"] != run.job.config_map_name:
        return None
    return replace(describe_open_run(snapshot, run), actions=Actions(create_config_map=wanted), requeue_seconds=0)


def peers_are_missing(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """Somebody deleted the Service or the NetworkPolicy of a job on several nodes. Both are made again: without the
    first, pods that are made from now on do not find each other; without the second, anybody reaches them."""
    actions = missing_peers(snapshot)
    if run.job is None or not actions.creates:
        return None
    return replace(describe_open_run(snapshot, run), actions=actions, requeue_seconds=0)


def missing_peers(snapshot: Snapshot) -> Actions:
    """Builds what a job on several nodes needs beside its Job, as far as it is not there."""
    if snapshot.spec.resources.nodes == 1:
        return Actions()
    peers, job = snapshot.peers, snapshot.metadata
    return Actions(
        create_service=build_service(job) if peers.service is None else None,
        create_network_policy=build_network_policy(job) if peers.network_policy is None else None,
    )


def run_is_open(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision:
    """The run's Job exists and has neither succeeded nor failed."""
    changes = follow_spec(snapshot, run, run.job) if run.job is not None else None
    decision = describe_open_run(snapshot, run)
    decision = replace(decision, message=_with_config_map(decision, snapshot, run, installation))
    actions = replace(
        Actions.patch(run.component, changes),
        patch_job_set=follow_suspension_of_set(snapshot, run),
        patch_workload=follow_suspension(snapshot, run),
    )
    return replace(decision, actions=actions)


def wanted_config_map(snapshot: Snapshot, installation: Installation) -> Json:
    """Builds the ConfigMap that a Job mounts which is created now."""
    return build_run_config_map(snapshot.metadata, snapshot.spec, snapshot.output_prefix, installation)


def _with_config_map(decision: Decision, snapshot: Snapshot, run: ChildRun, installation: Installation) -> str:
    """Returns the message of a decision, with what its ConfigMap has to do with it."""
    if run.job is None:
        return decision.message
    mounted = snapshot.config_map

    # Kubernetes says only that a pod cannot start, and a person cannot write the file.
    if mounted is None and decision.reason == FailureReason.CONTAINER_CONFIG_ERROR:
        return (
            f"ConfigMap {run.job.config_map_name} was deleted, and an operator with other settings wrote it. Let the "
            f"job be started anew, from its newest checkpoint: kubectl delete job {run.job.name}"
        )

    is_silent = decision.reason == StatusReason.TRAINER_STARTED
    if is_silent and mounted is not None and reports_elsewhere(mounted, snapshot.metadata, installation):
        return (
            f"{decision.message}: its Job was created before the operator's progress address or certificate changed. "
            "It trains on, and its result is read at its end"
        )
    return decision.message


def _waiting_phase(run: ChildRun) -> Phase:
    return Phase.QUEUED if run.component == TRAINER else Phase.VALIDATING
