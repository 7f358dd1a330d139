"""A neighbour with every right on pods in a namespace of its own must not reach the jobs of another."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException, NotFoundException

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import LOCATION, PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster


@pytest.fixture
def neighbour(dev_cluster: DevCluster, namespace: str) -> Iterator[str]:
    """Another team's namespace."""
    core: Any = client.CoreV1Api(dev_cluster.api_client())
    name = f"{namespace}-neighbour"
    core.create_namespace({"metadata": {"name": name}})
    yield name
    for pod in core.list_namespaced_pod(name).items:
        with suppress(NotFoundException):  # without its finalizer it may be gone by now
            core.patch_namespaced_pod(pod.metadata.name, name, {"metadata": {"finalizers": []}})
    core.delete_namespace(name)


def forge(core: Any, namespace: str, original: Any) -> Any:
    """Create a pod that says of itself what a trainer's pod does: its labels, and its Job as the controller.

    The garbage collector deletes it, as its owner is not there; the finalizer keeps it for as long as its maker likes.
    """
    (owner,) = original.metadata.owner_references
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": owner.name, "uid": owner.uid, "controller": True}
    metadata = {"name": "forged", "labels": original.metadata.labels, "ownerReferences": [reference]}
    metadata["finalizers"] = ["neighbour.example/hold"]
    containers = [{"name": "trainer", "image": "busybox"}]

    def create() -> Any:
        try:
            return core.create_namespaced_pod(namespace, {"metadata": metadata, "spec": {"containers": containers}})
        except ApiException as error:  # the namespace's default ServiceAccount takes a moment
            if error.status != 403:
                raise
            return None

    return wait_for(create, "a pod in the neighbour's namespace")


def test_a_pod_of_another_namespace_cannot_end_a_job(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any, dev_cluster: DevCluster, neighbour: str
) -> None:
    jobs.create("victim")
    pod = kubelet.wait_for_pod("victim")
    kubelet.run(pod)
    jobs.wait_for_phase("victim", "Running")

    forged = forge(client.CoreV1Api(dev_cluster.api_client()), neighbour, pod)
    PlayedKubelet(dev_cluster, neighbour).end(forged, 0, outcomes.success.encode())
    jobs.label("victim", "looked-at", "again")  # the operator looks at the job, with the forged pod in mind
    time.sleep(2)
    assert jobs.get("victim")["status"]["phase"] == "Running"

    kubelet.end(pod, 0, outcomes.success.encode())
    status = jobs.wait_for_phase("victim", "Succeeded")["status"]
    assert [attempt["uid"] for attempt in status["attempts"]] == [pod.metadata.uid]


FORGED = {
    "a manifest elsewhere": {"manifest_uri": "s3://evil/manifest.json"},
    "another pod's attempt": {"artifacts": "attempts/<job uid>.0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0/adapter/"},
    "a reused result elsewhere": {"artifacts": "../victim/attempts/a/adapter/", "reused": True},
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_result_elsewhere_is_not_taken(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any, forged: dict[str, Any]
) -> None:
    """Whoever may change the status of pods can write any last word, but not turn it into the job's result."""
    changes = dict(forged)
    if "artifacts" in changes:
        uri = LOCATION + changes["artifacts"]
        changes["artifacts"] = (outcomes.artifact.model_copy(update={"uri": uri}),)

    jobs.create("forged")
    pod = kubelet.wait_for_pod("forged")
    kubelet.run(pod)
    kubelet.end(pod, 0, outcomes.success.model_copy(update=changes).encode())
    status = jobs.wait_for_phase("forged", "Failed", seconds=30)["status"]
    assert status["failure"]["reason"] == "UntrustedResult"
    assert status["failure"]["message"].startswith("the pod says that the job wrote s3://")
    assert f"below s3://results/{pod.metadata.namespace}/forged/ only" in status["failure"]["message"]
    assert (status["artifacts"], status.get("manifestUri"), status.get("reused")) == ([], None, None)
    assert "UntrustedResult" in jobs.event_reasons("forged")


def test_jobs_of_one_name_have_places_of_their_own(
    operator: OperatorProcess, jobs: Any, dev_cluster: DevCluster, neighbour: str
) -> None:
    namesakes = (jobs, type(jobs)(dev_cluster, neighbour))
    for each in namesakes:
        each.create("bot")
    for each in namesakes:
        place = f"{each.namespace}/bot"
        found = each.wait("bot", lambda status: "resultLocation" in status, "a place")["status"]["resultLocation"]
        assert found == f"s3://results/{place}/"
        (config_map,) = each.config_maps("bot")
        assert yaml.safe_load(config_map.data["run_config.yaml"])["outputPrefix"] == place
    namesakes[1].delete_all()
