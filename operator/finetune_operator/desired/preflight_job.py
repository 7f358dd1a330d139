"""The batch/v1 Job that checks model, data and output on a CPU, before the trainer's Job is created.

It has the trainer's image, ConfigMap, Secrets and exit codes. It has no GPU, and no token either, because it reports by
its termination message only. Whatever binds the trainer to GPU nodes (RuntimeClass, labels that describe hardware) is
left out, so that the checks do not scale up a GPU node. Tolerations stay, because they bind a pod to nothing.
"""

from typing import Any

from finetune_api.job import ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.names import PREFLIGHT
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.trainer_job import build_child_job

CPU = "500m"
MEMORY = "1Gi"  # twice the measured peak for 1 GB of rows, or for one row of 50 MB (docs/lab-notes.md)
MAX_GRACE_SECONDS = 30  # preflight has nothing to save when it is stopped
_KEPT_LABELS = ("kubernetes.io/", "topology.kubernetes.io/")  # where a node is, and which programs it can execute


def build_preflight_job(
    job: ObjectMeta, spec: FineTuneJobSpec, image: str, config_map: str, active_seconds: int = 0
) -> dict[str, Any]:
    """Builds the Job of preflight. `config_map`: the one that its pods mount; `active_seconds`: how long the job
    has run already, which is 0 unless somebody deleted this Job."""
    return build_child_job(PodPlan.for_component(PREFLIGHT, job, _on_a_cpu(spec), image, config_map), active_seconds)


def _on_a_cpu(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """The same spec with the resources of preflight."""
    resources, policy = spec.resources, spec.run_policy
    changes: dict[str, Any] = {"gpus": 0, "nodes": 1, "cpu": CPU, "memory": MEMORY, "ephemeral_storage": None}

    # A job without a GPU keeps its node selector: it chose CPU nodes itself.
    if resources.gpus:
        kept = {key: value for key, value in resources.node_selector.items() if key.startswith(_KEPT_LABELS)}
        changes |= {"node_selector": kept, "runtime_class_name": None}

    grace = min(MAX_GRACE_SECONDS, policy.termination_grace_period_seconds)
    return spec.model_copy(
        update={
            "resources": resources.model_copy(update=changes),
            "run_policy": policy.model_copy(update={"termination_grace_period_seconds": grace}),
        }
    )
