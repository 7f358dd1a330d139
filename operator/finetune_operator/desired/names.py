"""Names, labels and owner references, by which children are found again: whoever created them, and whenever."""

import hashlib
import json
from typing import Any, Final, Literal

from finetune_api import API_VERSION, GROUP, KIND
from finetune_api.job import ObjectMeta
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_NAME_LABEL, JOB_UID_LABEL

Component = Literal["trainer", "preflight"]
"""One of the two Jobs of a FineTuneJob, as its label `app.kubernetes.io/component` has it."""

TRAINER: Final = "trainer"
PREFLIGHT: Final = "preflight"

ACTIVE_SECONDS_ANNOTATION: Final = f"{GROUP}/active-seconds"
ACTIVE_SINCE_ANNOTATION: Final = f"{GROUP}/active-since"
FIELD_MANAGER: Final = "finetune-operator"
LEASE_NAME: Final = "finetune-operator"

REPLICATED_JOB: Final = "train"
"""Name of the only replicated job of a JobSet, which stands in the name of its Job."""

_HASH_LENGTH = 5  # hex digits
_DIGEST_LENGTH = 16  # hex digits: nobody finds other data of the same digest
_MAX_NAME_LENGTH = 63  # characters: a Job's name is also a label of its pods, and labels end there
_MAX_JOB_SET_NAME_LENGTH = _MAX_NAME_LENGTH - len(f"-{REPLICATED_JOB}-0-63-abcde")  # its pods' names end like this
_JOB_SET_GROUP = "jobset.x-k8s.io/"


def child_name(job: ObjectMeta) -> str:
    """Name of the trainer's Job: the job's own name, shortened, and five hex digits of the SHA-256 of its UID. A job
    that is deleted and created again therefore never meets the children of its predecessor."""
    return _name(job, "")


def preflight_name(job: ObjectMeta) -> str:
    """Name of the Job that runs preflight. No trainer's Job can have it, because their names end in hex digits."""
    return _name(job, f"-{PREFLIGHT}")


def peers_name(job: ObjectMeta) -> str:
    """Name of the Service and of the NetworkPolicy of a job on several nodes. It begins with a letter, as a Service's
    has to."""
    return _name(job, "", prefix="nodes-")


def job_set_name(job: ObjectMeta) -> str:
    """Name of the JobSet of a job on several nodes. It begins with a letter and leaves room for its pods' names, as
    JobSet's webhook demands."""
    return _name(job, "", prefix="nodes-", limit=_MAX_JOB_SET_NAME_LENGTH)


def job_set_job_name(job: ObjectMeta) -> str:
    """Name that JobSet's controller gives to the Job of the JobSet. No other child has it, as their names end in the
    hash or in `-preflight`."""
    return f"{job_set_name(job)}-{REPLICATED_JOB}-0"


def config_map_name(job: ObjectMeta, data: dict[str, str]) -> str:
    """Name of the ConfigMap that holds `data`. It ends in their digest, so that no name ever stands for other data."""
    return f"{child_name(job)}-{_digest(data)}"


def names_its_data(config_map: dict[str, Any]) -> bool:
    """True if a ConfigMap's data have the digest that its name ends in, and can never change."""
    name, data = str(config_map["metadata"]["name"]), config_map.get("data") or {}
    return config_map.get("immutable") is True and name.endswith(f"-{_digest(data)}")


def _digest(data: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_DIGEST_LENGTH]


def _name(job: ObjectMeta, suffix: str, prefix: str = "", limit: int = _MAX_NAME_LENGTH) -> str:
    # Dots are allowed in the name of a FineTuneJob, but not in a pod's host name.
    digest = hashlib.sha256(job.uid.encode()).hexdigest()[:_HASH_LENGTH]
    room = limit - _HASH_LENGTH - 1 - len(prefix) - len(suffix)
    return f"{prefix}{job.name.replace('.', '-')[:room].rstrip('-')}-{digest}{suffix}"


def child_labels(job: ObjectMeta, component: Component | None = None) -> dict[str, str]:
    """Labels of a child, and of a Job's pods."""
    # The UID is what pods are found by: a name may be used again.
    labels = {JOB_NAME_LABEL: job.name, JOB_UID_LABEL: job.uid, "app.kubernetes.io/managed-by": FIELD_MANAGER}
    return labels | ({COMPONENT_LABEL: component} if component else {})


def child_metadata(job: ObjectMeta, name: str, component: Component | None = None) -> dict[str, Any]:  # Any: it is JSON
    """Metadata of an owned child: the garbage collector removes the child after its FineTuneJob."""
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
    """UID of the object that controls the one with this metadata; None if no object does."""
    reference = _controller(metadata)
    return str(reference["uid"]) if reference else None


def controlling_job(metadata: dict[str, Any]) -> str | None:
    """Name of the batch/v1 Job that controls the object with this metadata; None if no Job does."""
    reference = _controller(metadata)
    return str(reference["name"]) if reference and reference.get("kind") == "Job" else None


def controlling_job_set(metadata: dict[str, Any]) -> str | None:
    """Name of the JobSet that controls the object with this metadata; None if no JobSet does."""
    reference = _controller(metadata)
    if reference is None or reference.get("kind") != "JobSet":
        return None
    return str(reference["name"]) if str(reference.get("apiVersion")).startswith(_JOB_SET_GROUP) else None


def _controller(metadata: dict[str, Any]) -> dict[str, Any] | None:
    references: list[dict[str, Any]] = metadata.get("ownerReferences") or []
    return next((reference for reference in references if reference.get("controller")), None)
