"""The Node and its heartbeat Lease, as a kubelet writes them."""

import datetime
import platform

from finetune_devcluster.process_node.api import Object
from finetune_devcluster.process_node.container import now

LEASE_DURATION_SECONDS = 20


def node_object(name: str) -> Object:
    """The Node at its registration."""
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def node_status(capacity: dict[str, str], kubelet_port: int) -> Object:
    """Capacity (extended resources included), addresses and conditions of a healthy node."""
    moment = now()
    healthy = [("Ready", "True", "KubeletReady")]
    healthy += [(kind, "False", "Kubelet" + kind) for kind in ("MemoryPressure", "DiskPressure", "PIDPressure")]

    return {
        "capacity": capacity,
        "allocatable": capacity,
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet_port}},
        "nodeInfo": {
            "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": platform.release(),
            "osImage": "process node", "containerRuntimeVersion": "process://1", "kubeletVersion": "v1.36.3",
            "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64",
        },
        "conditions": [
            {
                "type": kind, "status": status, "reason": reason, "message": "",
                "lastHeartbeatTime": moment, "lastTransitionTime": moment,
            }
            for kind, status, reason in healthy
        ],
    }  # fmt: skip


def lease_object(name: str) -> Object:
    """The heartbeat, renewed now."""
    renewed = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": LEASE_DURATION_SECONDS, "renewTime": renewed},
    }
