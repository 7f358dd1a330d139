"""What the trainer's Job and that of preflight need alike before they are made (pure)."""

from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision, Installation
from finetune_operator.desired.run_config_map import build_run_config, build_run_config_map, follow_progress_target
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.reasons import Reason

ORPHAN_SECONDS = 2.0


def config_map_actions(snapshot: Snapshot, installation: Installation) -> Actions:
    """Make the ConfigMap that both mount, or bring it up to date: as a whole, until a Job mounts it."""
    assert snapshot.spec is not None
    config = build_run_config(snapshot.metadata, snapshot.spec, installation.progress_url, installation.ca_certificate)
    desired, existing = build_run_config_map(snapshot.metadata, config), snapshot.config_map
    if existing is None:
        return Actions(create_config_map=desired)
    if snapshot.child is not None:
        return Actions(update_config_map=follow_progress_target(existing, desired))
    return Actions(update_config_map=None if existing.get("data") == desired["data"] else {"data": desired["data"]})


def wait_for_orphaned_pods(snapshot: Snapshot, phase: Phase) -> Decision | None:
    """Wait while a pod of a Job that was deleted by hand still runs: there are never two at once."""
    if not snapshot.orphaned_pods:
        return None
    message = f"pod {snapshot.orphaned_pods[0].name} of a Job that was deleted by someone else still runs"
    return Decision(phase, Reason.JOB_DELETED, message, requeue_seconds=ORPHAN_SECONDS)


def wait_for_deletion(snapshot: Snapshot, phase: Phase) -> Decision | None:
    """Wait while a Job that was deleted by hand is still there."""
    if snapshot.child is None or not snapshot.child.deleting:
        return None
    message = f"Job {snapshot.child.name} was deleted by someone else: it is made again as soon as it is gone"
    return Decision(phase, Reason.JOB_DELETED, message, requeue_seconds=RETRY_SECONDS)
