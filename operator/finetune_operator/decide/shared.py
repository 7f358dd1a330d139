"""Rules that hold for both runs, preflight and training (pure)."""

from dataclasses import replace

from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision, Installation
from finetune_operator.decide.open_run import describe_open_run, follow_spec
from finetune_operator.desired.names import TRAINER
from finetune_operator.desired.run_config_map import build_run_config, build_run_config_map, follow_progress_target
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.status_reasons import StatusReason

ORPHAN_SECONDS = 2.0  # short: the pod is already being stopped


def child_is_being_deleted(_: Snapshot, run: ChildRun, *__: object) -> Decision | None:
    """Somebody deleted the run's Job, and it is still there."""
    if run.job is None or not run.job.deleting:
        return None
    message = f"somebody deleted Job {run.job.name}: it is created again as soon as it is gone"
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
    if former.is_kept:
        message += f" without it. To start now, delete it: kubectl delete job {former.job_name}"

    seconds = RETRY_SECONDS if former.is_kept else ORPHAN_SECONDS
    return Decision(_waiting_phase(run), StatusReason.PREDECESSOR_RUNNING, message, requeue_seconds=seconds)


def config_map_is_outdated(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The ConfigMap that the run's Job mounts is missing, or names an outdated progress URL or certificate."""
    actions = config_map_actions(snapshot, run, installation)
    if actions == Actions():
        return None
    return replace(describe_open_run(snapshot, run), actions=actions, requeue_seconds=0)


def run_is_open(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision:
    """The run's Job exists and has neither succeeded nor failed."""
    changes = follow_spec(snapshot, run.job) if run.job is not None else None
    return replace(describe_open_run(snapshot, run), actions=Actions.patch(run.component, changes))


def config_map_actions(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Actions:
    """Creates the ConfigMap that both Jobs mount, or brings it up to date: completely before a Job mounts it, and
    afterwards only the address that progress is reported to."""
    told = (installation.progress_url, installation.ca_certificate, installation.endpoints)
    config = build_run_config(snapshot.metadata, snapshot.spec, snapshot.output_prefix, *told)
    desired, existing = build_run_config_map(snapshot.metadata, config), snapshot.config_map

    if existing is None:
        return Actions(create_config_map=desired)

    # A mounted file belongs to the image that reads it, which may be older than this operator.
    if run.job is not None:
        return Actions(update_config_map=follow_progress_target(existing, desired))
    return Actions(update_config_map=None if existing.get("data") == desired["data"] else {"data": desired["data"]})


def _waiting_phase(run: ChildRun) -> Phase:
    return Phase.QUEUED if run.component == TRAINER else Phase.VALIDATING
