"""Names, labels and owner references: how children are found again, whoever made them and whenever."""

import hashlib
from typing import Any, Final

from finetune_api import API_VERSION, GROUP, KIND
from finetune_api.job import ObjectMeta

JOB_NAME_LABEL: Final = f"{GROUP}/job-name"
JOB_UID_LABEL: Final = f"{GROUP}/job-uid"
ACTIVE_SECONDS_ANNOTATION: Final = f"{GROUP}/active-seconds"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
TRAINER: Final = "trainer"
PREFLIGHT: Final = "preflight"
TRAINER_CONTAINER: Final = "trainer"  # of preflight's pod too: it runs the same image
FIELD_MANAGER: Final = "finetune-operator"

_HASH_LENGTH = 5
_MAX_NAME_LENGTH = 63  # a Job's name is also a label of its pods


def child_name(job: ObjectMeta) -> str:
    """Name of the trainer's Job and of the ConfigMap: the job's own, cut, and five hex digits of its UID's SHA-256, so
    that a job that is deleted and made again never meets the children of its predecessor."""
    return _name(job, "")


def preflight_name(job: ObjectMeta) -> str:
    """Name of the Job that runs preflight. No trainer's Job can have it, as that ends in hex digits."""
    return _name(job, f"-{PREFLIGHT}")


def _name(job: ObjectMeta, suffix: str) -> str:
    digest = hashlib.sha256(job.uid.encode()).hexdigest()[:_HASH_LENGTH]
    stem = job.name.replace(".", "-")[: _MAX_NAME_LENGTH - _HASH_LENGTH - 1 - len(suffix)].rstrip("-")
    return f"{stem}-{digest}{suffix}"


def child_labels(job: ObjectMeta, component: str | None = None) -> dict[str, str]:
    """Labels of a child, and of a Job's pods."""
    labels = {JOB_NAME_LABEL: job.name, JOB_UID_LABEL: job.uid, "app.kubernetes.io/managed-by": FIELD_MANAGER}
    return labels | ({COMPONENT_LABEL: component} if component else {})


def child_metadata(job: ObjectMeta, name: str, component: str | None = None) -> dict[str, Any]:  # Any: it is JSON
    """Metadata of an owned child: the garbage collector removes it after its FineTuneJob."""
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": child_labels(job, component),
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
