"""Names, labels and owner references: how children are found again, whoever made them and whenever."""

import hashlib
from typing import Any, Final

from finetune_api import API_VERSION, GROUP, KIND
from finetune_api.job import ObjectMeta

JOB_NAME_LABEL: Final = f"{GROUP}/job-name"
JOB_UID_LABEL: Final = f"{GROUP}/job-uid"
ACTIVE_SECONDS_ANNOTATION: Final = f"{GROUP}/active-seconds"
TRAINER_CONTAINER: Final = "trainer"
FIELD_MANAGER: Final = "finetune-operator"

_HASH_LENGTH = 5
_LONGEST = 63  # a Job's name is also a label of its pods


def child_name(job: ObjectMeta) -> str:
    """Name of the child Job and ConfigMap: the job's own, cut, and five hex digits of its UID's SHA-256, so that a job
    that is deleted and made again never meets the children of its predecessor."""
    digest = hashlib.sha256(job.uid.encode()).hexdigest()[:_HASH_LENGTH]
    stem = job.name.replace(".", "-")[: _LONGEST - _HASH_LENGTH - 1].rstrip("-")
    return f"{stem}-{digest}"


def child_labels(job: ObjectMeta) -> dict[str, str]:
    """Labels of the child Job, its ConfigMap and its pods."""
    return {JOB_NAME_LABEL: job.name, JOB_UID_LABEL: job.uid, "app.kubernetes.io/managed-by": FIELD_MANAGER}


def child_metadata(job: ObjectMeta) -> dict[str, Any]:  # Any: Kubernetes objects are JSON
    """Metadata of an owned child: the garbage collector removes it after its FineTuneJob."""
    return {
        "name": child_name(job),
        "namespace": job.namespace,
        "labels": child_labels(job),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job.name,
                "uid": job.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def controller_uid(metadata: dict[str, Any]) -> str | None:
    """UID of the object that controls another one, from that one's metadata."""
    for reference in metadata.get("ownerReferences") or ():
        if reference.get("controller"):
            return str(reference["uid"])
    return None
