"""The batch/v1 Job of a planned pod: the trainer's, and preflight's with its own plan. Kubernetes' own Job controller
starts, retries and stops the trainer's pod. A Job in a queue of Kueue is made suspended, and Kueue alone starts it.

It does so even while the operator is down. It learns once, by `podFailurePolicy`, what each exit code means. Only three
fields change afterwards: `suspend`, `activeDeadlineSeconds` and, once the job is over, `ttlSecondsAfterFinished`.
"""

from typing import Any

from finetune_api.failures import PodFailureAction, exit_codes_with
from finetune_api.job import ObjectMeta
from finetune_api.spec.scheduling import SchedulingSpec
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.vocabulary import QUEUE_LABEL, QUEUE_PRIORITY_LABEL, TRAINER_CONTAINER
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, TRAINER, child_labels, child_metadata
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.trainer_pod import build_pod_spec


def remaining_deadline(total_seconds: int | None, active_seconds: int) -> int | None:
    """Seconds left of `runPolicy.activeDeadlineSeconds` for a Job that starts, or goes on, after it has run for
    `active_seconds`; None if there is no deadline. At least 1, so that it is the Job controller that ends the job, with
    its own reason."""
    return None if total_seconds is None else max(1, total_seconds - active_seconds)


def build_trainer_job(
    job: ObjectMeta, spec: FineTuneJobSpec, image: str, config_map: str, active_seconds: int = 0
) -> dict[str, Any]:
    """Builds the Job that trains. `config_map`: the one that its pods mount; `active_seconds`: how long the FineTuneJob
    has run already, in preflight and before somebody deleted its Job."""
    return build_child_job(PodPlan.for_component(TRAINER, job, spec, image, config_map), active_seconds)


def build_child_job(plan: PodPlan, active_seconds: int) -> dict[str, Any]:
    """Builds the Job that runs the planned pod until it succeeds or has used up its retries."""
    policy = plan.spec.run_policy
    metadata = child_metadata(plan.job, plan.job_name, plan.component)
    # The Job controller forgets its start time while the Job is suspended.
    scheduling = plan.spec.scheduling
    metadata |= {
        "labels": scheduling.labels | _queue_labels(scheduling) | metadata["labels"],
        "annotations": scheduling.annotations | {ACTIVE_SECONDS_ANNOTATION: str(active_seconds)},
    }

    job_spec: dict[str, Any] = {
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimit": policy.max_retries,
        "suspend": policy.suspend or scheduling.queue_name is not None,  # a queue starts its Jobs itself
        "podReplacementPolicy": "Failed",  # never two trainers at once
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": {
            "metadata": _pod_metadata(plan),
            "spec": build_pod_spec(plan),
        },
    }
    if plan.nodes > 1:
        # The pod of index 0 alone has a result. Older API servers ignore the policy: the others then end with 0, too.
        job_spec["completionMode"] = "Indexed"
        job_spec["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    deadline = remaining_deadline(policy.active_deadline_seconds, active_seconds)
    if deadline is not None:
        job_spec["activeDeadlineSeconds"] = deadline

    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_spec}


def _queue_labels(scheduling: SchedulingSpec) -> dict[str, str]:
    labels = {QUEUE_LABEL: scheduling.queue_name, QUEUE_PRIORITY_LABEL: scheduling.workload_priority_class_name}
    return {key: value for key, value in labels.items() if value is not None}


def _pod_metadata(plan: PodPlan) -> dict[str, Any]:
    """Labels and annotations of the pod: schedulers other than Kueue read theirs there."""
    scheduling = plan.spec.scheduling
    pod = plan.spec.pod
    annotations = pod.annotations | scheduling.annotations
    metadata: dict[str, Any] = {
        "labels": pod.labels | scheduling.labels | child_labels(plan.job, plan.component),
    }
    return metadata | ({"annotations": annotations} if annotations else {})


def _failure_rules() -> list[dict[str, Any]]:
    """Rules of `podFailurePolicy`: the first match wins, and what matches none counts towards `backoffLimit`."""
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        _exit_code_rule(PodFailureAction.IGNORE),
        _exit_code_rule(PodFailureAction.FAIL_JOB),
    ]


def _exit_code_rule(action: PodFailureAction) -> dict[str, Any]:
    values = sorted(int(code) for code in exit_codes_with(action))
    return {
        "action": action.value,
        "onExitCodes": {"containerName": TRAINER_CONTAINER, "operator": "In", "values": values},
    }
