"""The JobSet of sigs.k8s.io that makes the trainer's Job of a job on several nodes, for clusters that manage JobSets.

Its one replicated job is the Job that would be made without it. JobSet's controller creates that Job, suspends it and
lets it go on. All else stays the Job's: who retries a pod, what an exit code means, whose success counts. So the JobSet
has no rules of its own: without a `failurePolicy`, a Job that fails is never made again.
"""

from typing import Any, Final

from finetune_api.job import ObjectMeta
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.vocabulary import QUEUE_LABEL, QUEUE_PRIORITY_LABEL
from finetune_operator.desired.names import REPLICATED_JOB, TRAINER, child_metadata, job_set_name
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.trainer_job import build_child_job

API_VERSION: Final = "jobset.x-k8s.io/v1alpha2"
_QUEUE_LABELS = (QUEUE_LABEL, QUEUE_PRIORITY_LABEL)


def build_job_set(
    job: ObjectMeta, spec: FineTuneJobSpec, image: str, config_map: str, active_seconds: int = 0, *, waits: bool = False
) -> dict[str, Any]:
    """Builds the JobSet. `config_map`: the one that its pods mount; `active_seconds`: how long the FineTuneJob has run
    already; `waits`: True makes it suspended, whatever the spec says. Its Job is named as `job_set_job_name` says."""
    child = build_child_job(PodPlan.for_component(TRAINER, job, spec, image, config_map), active_seconds)
    labels, job_spec = child["metadata"]["labels"], child["spec"]

    # A queue holds the JobSet. Its Job must not be in the line a second time.
    queue = {key: labels[key] for key in _QUEUE_LABELS if key in labels}
    template_labels = {key: value for key, value in labels.items() if key not in queue}
    metadata = child_metadata(job, job_set_name(job), TRAINER)

    return {
        "apiVersion": API_VERSION,
        "kind": "JobSet",
        "metadata": metadata | {"labels": labels, "annotations": dict(spec.scheduling.annotations)},
        "spec": {
            "suspend": waits or job_spec["suspend"],  # JobSet's controller writes that of the Job
            "network": {"enableDNSHostnames": False},  # the pods' names are those of our Service
            "replicatedJobs": [
                {
                    "name": REPLICATED_JOB,
                    "replicas": 1,
                    "template": {
                        "metadata": {"labels": template_labels, "annotations": child["metadata"]["annotations"]},
                        "spec": {key: value for key, value in job_spec.items() if key != "suspend"},
                    },
                }
            ],
        },
    }
