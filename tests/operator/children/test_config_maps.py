"""ConfigMaps on a real API server: none changes, what replaces one is noticed, and those of older operators stay."""

from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_operator.desired.names import child_metadata, child_name, names_its_data
from finetune_operator.desired.run_config_map import RUN_CONFIG_KEY
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_test_operator.operator_process import ACCOUNT, NAMESPACE, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.snapshot_builder import a_spec

pytestmark = pytest.mark.cluster
OTHER = {"data": {RUN_CONFIG_KEY: "somebody: else"}}


@pytest.fixture
def core(jobs: Any) -> Any:
    return client.CoreV1Api(jobs.cluster.api_client())


def _config_map(jobs: Any, name: str) -> Any:
    return wait_for(lambda: jobs.config_maps(name), f"the ConfigMap of {name}")[0]


def test_neither_an_administrator_nor_the_operator_can_change_one(
    operator: OperatorProcess, jobs: Any, core: Any
) -> None:
    jobs.create("fixed", suspend=True)
    name = _config_map(jobs, "fixed").metadata.name

    with pytest.raises(ApiException) as refused:
        core.patch_namespaced_config_map(name, jobs.namespace, OTHER)
    assert refused.value.status == 422
    assert "immutable" in str(refused.value.body)

    patch = ("patch", "configmap", name, "-n", jobs.namespace, "-p", '{"metadata":{"labels":{"a":"b"}}}')
    account = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
    forbidden = jobs.cluster.kubectl(*patch, "--as", account, check=False)
    assert forbidden.returncode != 0
    assert 'cannot patch resource "configmaps"' in forbidden.stderr
    assert jobs.cluster.kubectl(*patch).returncode == 0, "an administrator may label it"


def _replace(jobs: Any, core: Any, body: Json) -> bool:
    """Puts another ConfigMap in a deleted one's place; False if the operator was quicker."""
    core.delete_namespaced_config_map(body["metadata"]["name"], jobs.namespace)
    try:
        core.create_namespaced_config_map(jobs.namespace, body)
    except ApiException as error:
        if error.status != 409:
            raise
        return False
    return True


def test_one_that_was_deleted_is_made_again_and_one_that_was_replaced_stops_the_job(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, core: Any
) -> None:
    jobs.create("copied")
    kubelet.run(kubelet.wait_for_pod("copied"))
    jobs.wait_for_phase("copied", "Running")
    original = _config_map(jobs, "copied")
    name = original.metadata.name

    core.delete_namespaced_config_map(name, jobs.namespace)
    jobs.label("copied", "touched", "1")
    again = _config_map(jobs, "copied")
    assert (again.metadata.name, again.data) == (name, original.data)
    assert again.metadata.uid != original.metadata.uid

    owners = jobs.cluster.api_client().sanitize_for_serialization(original.metadata.owner_references)
    metadata = {"name": name, "ownerReferences": owners, "labels": original.metadata.labels}
    wait_for(lambda: _replace(jobs, core, {"metadata": metadata, "immutable": True} | OTHER), "it is replaced")

    jobs.label("copied", "touched", "2")
    jobs.wait("copied", lambda s: "does not hold what the operator wrote" in str(s.get("conditions")), "noticed")
    core.delete_namespaced_config_map(name, jobs.namespace)
    jobs.label("copied", "touched", "3")
    jobs.wait_for_phase("copied", "Running")
    assert _config_map(jobs, "copied").data == original.data


def test_a_job_that_an_older_operator_began_goes_on_with_its_own_file(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, core: Any, outcomes: Any
) -> None:
    operator.kill()
    created = jobs.create("older")
    metadata = ObjectMeta.model_validate(created["metadata"])

    # One ConfigMap, with the name of the Job, which could be changed.
    old_file = {"metadata": child_metadata(metadata, child_name(metadata)), "data": {RUN_CONFIG_KEY: "old: true"}}
    before = core.create_namespaced_config_map(jobs.namespace, old_file)
    manifest = build_trainer_job(metadata, a_spec(resources={"gpus": 0}), "finetune-trainer:old", child_name(metadata))
    client.BatchV1Api(jobs.cluster.api_client()).create_namespaced_job(jobs.namespace, manifest)
    pod = kubelet.wait_for_pod("older")
    kubelet.run(pod)

    operator.start()
    jobs.wait_for_phase("older", "Running")
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("older", "Succeeded")
    (after,) = jobs.config_maps("older")
    assert after.metadata.resource_version == before.metadata.resource_version
    assert [each.metadata.uid for each in kubelet.pods("older")] == [pod.metadata.uid]


def test_its_name_says_what_it_holds(operator: OperatorProcess, jobs: Any) -> None:
    jobs.create("named", suspend=True)
    found = jobs.cluster.api_client().sanitize_for_serialization(_config_map(jobs, "named"))
    assert names_its_data(found)
    config = next(each for each in jobs.child("named")["spec"]["template"]["spec"]["volumes"] if "configMap" in each)
    assert config["configMap"]["name"] == found["metadata"]["name"]
