"""Objects that let the pods of a job on several nodes find each other, and keep everybody else from them.

A headless Service gives each pod a stable name, and a NetworkPolicy admits the job's own pods only: what they meet at
asks for no password. Both exist before the first pod, and go with the FineTuneJob.
"""

from typing import Any, Final

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.vocabulary import COMPONENT_LABEL, JOB_UID_LABEL
from finetune_operator.desired.names import TRAINER, child_metadata, peers_name

RENDEZVOUS_PORT: Final = 29400  # torchrun's
PORT_NAME: Final = "rendezvous"


def rendezvous_address(job: ObjectMeta, job_name: str) -> str:
    """HOST:PORT at which the pods of a job meet: that of the pod with completion index 0. `job_name`: the batch/v1
    Job's."""
    return f"{job_name}-0.{peers_name(job)}:{RENDEZVOUS_PORT}"


def build_service(job: ObjectMeta) -> dict[str, Any]:
    """Builds the headless Service. Pods have their names before they are ready: none is, until all have met."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child_metadata(job, peers_name(job), TRAINER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": own_pods(job),
            "ports": [{"name": PORT_NAME, "port": RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def build_network_policy(job: ObjectMeta) -> dict[str, Any]:
    """Builds the NetworkPolicy. All ports, as gloo and NCCL listen on any."""
    peers = {"podSelector": {"matchLabels": own_pods(job)}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(job, peers_name(job), TRAINER),
        "spec": {**peers, "policyTypes": ["Ingress"], "ingress": [{"from": [peers]}]},
    }


def own_pods(job: ObjectMeta) -> Json:
    """Labels of the trainer's pods of a job."""
    return {JOB_UID_LABEL: job.uid, COMPONENT_LABEL: TRAINER}
