"""The trainer's batch/v1 Job: Kubernetes' own Job controller runs, retries and stops the trainer's pod.

It goes on doing so while the operator is down. What an exit code means is told to it once (`podFailurePolicy`); only
three fields change afterwards: `suspend`, `activeDeadlineSeconds` and, once the job is over, `ttlSecondsAfterFinished`.
"""

from typing import Any

from finetune_api.failures import PERMANENT, ExitCode
from finetune_api.job import ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.names import (
    ACTIVE_SECONDS_ANNOTATION,
    TRAINER,
    TRAINER_CONTAINER,
    child_labels,
    child_metadata,
    child_name,
)
from finetune_operator.desired.trainer_pod import build_trainer_pod_spec


def remaining_deadline(total_seconds: int | None, active_seconds: int) -> int | None:
    """What is left of `runPolicy.activeDeadlineSeconds` for a Job that starts (again) after `active_seconds` of
    running. At least 1: the Job controller then ends the job, with its own reason."""
    return None if total_seconds is None else max(1, total_seconds - active_seconds)


def build_trainer_job(job: ObjectMeta, spec: FineTuneJobSpec, image: str, active_seconds: int = 0) -> dict[str, Any]:
    """The trainer's Job of a FineTuneJob that has run for `active_seconds` already: in preflight, and before its Job
    was deleted by hand."""
    pod = build_trainer_pod_spec(job, spec, image)
    return build_child_job(job, spec, pod, name=child_name(job), component=TRAINER, active_seconds=active_seconds)


def build_child_job(
    job: ObjectMeta, spec: FineTuneJobSpec, pod: dict[str, Any], *, name: str, component: str, active_seconds: int
) -> dict[str, Any]:
    """A Job that runs one pod of the trainer's image to its end."""
    metadata = child_metadata(job, name, component)
    metadata |= {"annotations": {ACTIVE_SECONDS_ANNOTATION: str(active_seconds)}}
    job_spec: dict[str, Any] = {
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": spec.run_policy.max_retries,
        "suspend": spec.run_policy.suspend,
        "podReplacementPolicy": "Failed",  # never two trainers at once
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": {"metadata": {"labels": child_labels(job, component)}, "spec": pod},
    }
    deadline = remaining_deadline(spec.run_policy.active_deadline_seconds, active_seconds)
    if deadline is not None:
        job_spec["activeDeadlineSeconds"] = deadline
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_spec}


def _failure_rules() -> list[dict[str, Any]]:
    """First match wins. Everything else counts towards backoffLimit."""
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        _exit_codes("Ignore", ExitCode.INTERRUPTED),
        _exit_codes("FailJob", *PERMANENT),
    ]


def _exit_codes(action: str, *codes: ExitCode) -> dict[str, Any]:
    values = sorted(int(code) for code in codes)
    return {
        "action": action,
        "onExitCodes": {"containerName": TRAINER_CONTAINER, "operator": "In", "values": values},
    }
