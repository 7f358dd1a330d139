"""An endpoint that the administrator does not allow ends a job before anything is made for it."""

from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import preflight_name
from finetune_test_operator.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("address", ["169.254.169.254", "2852039166", "localhost"])
def test_nothing_is_made_for_an_endpoint_that_is_not_allowed(
    operator: OperatorProcess, dev_cluster: DevCluster, namespace: str, jobs: Any, address: str
) -> None:
    api: Any = client.CustomObjectsApi(dev_cluster.api_client())
    spec = {
        "model": {"source": "s3://models/tiny/"},
        "dataset": {"source": "s3://data/chat.jsonl"},
        "output": {"s3": {"bucket": "results", "endpointURL": f"http://{address}"}},
    }
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "ssrf"}, "spec": spec}
    api.create_namespaced_custom_object("finetune.dev", "v1alpha1", namespace, "finetunejobs", body)

    failure = jobs.wait_for_phase("ssrf", "Failed")["status"]["failure"]
    assert failure["reason"] == "EndpointNotAllowed"
    assert failure["message"].startswith("spec.output.s3.endpointURL is not allowed: ")
    assert "ask the administrator" in failure["hint"]
    assert jobs.find_child("ssrf") is None
    assert jobs.find_child("ssrf", preflight_name) is None
    assert jobs.config_maps("ssrf") == []
