"""What the trainer's Job and that of preflight need alike before they are made (pure)."""

from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision, Installation
from finetune_operator.desired.run_config_map import build_run_config, build_run_config_map, follow_progress_target
from finetune_operator.observe.snapshot import Observed
from finetune_operator.reasons import Reason

STRAY_SECONDS = 2.0


def config_map_actions(observed: Observed, installation: Installation) -> Actions:
    """Make the ConfigMap that both mount, or bring it up to date: as a whole, until a Job mounts it."""
    assert observed.spec is not None
    config = build_run_config(observed.metadata, observed.spec, installation.progress_url, installation.ca_certificate)
    desired, existing = build_run_config_map(observed.metadata, config), observed.config_map
    if existing is None:
        return Actions(create_config_map=desired)
    if observed.child is not None:
        return Actions(update_config_map=follow_progress_target(existing, desired))
    return Actions(update_config_map=None if existing.get("data") == desired["data"] else {"data": desired["data"]})


def wait_for_strays(observed: Observed, phase: Phase) -> Decision | None:
    """Wait while a pod of a Job that was deleted by hand still runs: there are never two at once."""
    if not observed.strays:
        return None
    message = f"pod {observed.strays[0].name} of a Job that was deleted by someone else still runs"
    return Decision(phase, Reason.JOB_DELETED, message, requeue_seconds=STRAY_SECONDS)


def wait_for_deletion(observed: Observed, phase: Phase) -> Decision | None:
    """Wait while a Job that was deleted by hand is still there."""
    if observed.child is None or not observed.child.deleting:
        return None
    message = f"Job {observed.child.name} was deleted by someone else: it is made again as soon as it is gone"
    return Decision(phase, Reason.JOB_DELETED, message, requeue_seconds=RETRY_SECONDS)
