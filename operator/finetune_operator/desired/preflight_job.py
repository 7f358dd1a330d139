"""The Job that checks model, data and output on a CPU, before the trainer's Job is made.

Same image, same ConfigMap, same Secrets, same meaning of exit codes; no GPU, and no token at all, as it reports by its
termination message only. What binds the trainer to GPU nodes (RuntimeClass, labels that describe hardware) is left out,
so that the checks wake no GPU node; tolerations stay, as they bind a pod to nothing.
"""

from typing import Any

from finetune_api.job import ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.names import PREFLIGHT, preflight_name
from finetune_operator.desired.trainer_job import build_child_job
from finetune_operator.desired.trainer_pod import build_trainer_pod_spec

CPU = "500m"
MEMORY = "1Gi"  # twice of what 1 GB of rows or a row of 50 MB takes (docs/decisions.md)
GRACE_SECONDS = 30  # nothing has to be saved
_KEPT_LABELS = ("kubernetes.io/", "topology.kubernetes.io/")  # where a node is and what it can execute


def build_preflight_job(job: ObjectMeta, spec: FineTuneJobSpec, image: str, active_seconds: int = 0) -> dict[str, Any]:
    """The Job of preflight, for a FineTuneJob that has run for `active_seconds` already (0 unless this Job was deleted
    by hand)."""
    pod = build_trainer_pod_spec(job, _on_a_cpu(spec), image, verb="preflight", reports=False)
    name = preflight_name(job)
    return build_child_job(job, spec, pod, name=name, component=PREFLIGHT, active_seconds=active_seconds)


def _on_a_cpu(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    resources, policy = spec.resources, spec.run_policy
    changes: dict[str, Any] = {"gpus": 0, "cpu": CPU, "memory": MEMORY, "ephemeral_storage": None}
    if resources.gpus:
        kept = {key: value for key, value in resources.node_selector.items() if key.startswith(_KEPT_LABELS)}
        changes |= {"node_selector": kept, "runtime_class_name": None}
    grace = min(GRACE_SECONDS, policy.termination_grace_period_seconds)
    return spec.model_copy(
        update={
            "resources": resources.model_copy(update=changes),
            "run_policy": policy.model_copy(update={"termination_grace_period_seconds": grace}),
        }
    )
