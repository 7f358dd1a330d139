"""Decides a job's phase, reason and next action: ordered chains of pure rules, of which the first that applies wins.

Rules about the end come before rules about children, so that a job that is over never creates anything again.
"""

from finetune_operator.decide.chain import Chain
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.gpu_budget import gpu_budget_is_spent, gpu_budget_is_too_small
from finetune_operator.decide.job_rules import (
    child_name_is_taken,
    children_are_hidden,
    endpoint_is_refused,
    gpu_limit_is_exceeded,
    job_is_being_deleted,
    job_is_over,
    job_sets_are_missing,
    namespace_is_denied,
    pod_field_is_refused,
    spec_is_unreadable,
)
from finetune_operator.decide.preflight import (
    checks_are_suspended,
    checks_failed,
    checks_passed,
    preflight_job_is_missing,
)
from finetune_operator.decide.shared import (
    child_is_being_deleted,
    config_map_is_missing,
    orphaned_pods_still_run,
    peers_are_missing,
    predecessor_still_runs,
    run_is_open,
)
from finetune_operator.decide.stalls import node_outlives_its_attempt, restart_is_used_up, trainer_is_silent
from finetune_operator.decide.training import (
    gpus_are_in_use,
    job_of_set_is_missing,
    trainer_failed,
    trainer_job_is_missing,
    trainer_succeeded,
)
from finetune_operator.decide.waiting.queue import queue_is_missing
from finetune_operator.decide.waiting.startup_deadline import startup_deadline_has_passed
from finetune_operator.desired.installation import Installation
from finetune_operator.observe.snapshot import BlindSnapshot, ChildRun, Snapshot, UnreadableSnapshot

UNREADABLE: Chain[UnreadableSnapshot] = Chain(
    job_is_over,
    job_is_being_deleted,
    otherwise=spec_is_unreadable,
)

BLIND: Chain[BlindSnapshot] = Chain(
    job_is_over,
    job_is_being_deleted,
    otherwise=children_are_hidden,
)

PREFLIGHT: Chain[Snapshot] = Chain(
    # The end of the checks
    gpu_budget_is_too_small,
    checks_passed,
    checks_failed,
    # Their Job, and what it needs
    child_is_being_deleted,
    orphaned_pods_still_run,
    predecessor_still_runs,
    checks_are_suspended,
    startup_deadline_has_passed,
    preflight_job_is_missing,
    config_map_is_missing,
    otherwise=run_is_open,
)


def preflight_is_due(snapshot: Snapshot, _: ChildRun, installation: Installation) -> Decision | None:
    """Asks the chain of preflight until its result is in the status."""
    return PREFLIGHT.decide(snapshot, snapshot.preflight, installation) if snapshot.awaits_preflight else None


TRAINING: Chain[Snapshot] = Chain(
    # The FineTuneJob itself
    job_is_over,
    job_is_being_deleted,
    namespace_is_denied,
    job_sets_are_missing,
    child_name_is_taken,
    endpoint_is_refused,
    pod_field_is_refused,
    gpu_limit_is_exceeded,
    queue_is_missing,
    # Preflight, until its result is in the status
    preflight_is_due,
    # The end of training
    trainer_succeeded,
    trainer_failed,
    restart_is_used_up,
    gpu_budget_is_spent,
    # The trainer's Job, and what it needs
    child_is_being_deleted,
    orphaned_pods_still_run,
    predecessor_still_runs,
    startup_deadline_has_passed,
    job_of_set_is_missing,
    gpus_are_in_use,
    trainer_job_is_missing,
    config_map_is_missing,
    peers_are_missing,
    node_outlives_its_attempt,
    trainer_is_silent,
    otherwise=run_is_open,
)


def decide(snapshot: Snapshot | UnreadableSnapshot | BlindSnapshot, installation: Installation) -> Decision:
    """Decides about one job."""
    if isinstance(snapshot, BlindSnapshot):
        return BLIND.decide(snapshot, snapshot.training, installation)
    if isinstance(snapshot, UnreadableSnapshot):
        return UNREADABLE.decide(snapshot, snapshot.training, installation)
    return TRAINING.decide(snapshot, snapshot.training, installation)
