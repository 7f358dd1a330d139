"""The status of a job that no operator has looked at: kstatus must not take it for one that is done."""

import copy
import json
import time
from typing import Any

import pytest
import yaml

from finetune_api.definition import custom_resource_definition
from finetune_api.job import FineTuneJob
from finetune_api.status import NO_GENERATION
from finetune_client.rows import Row
from finetune_devcluster.cluster import DevCluster
from finetune_operator.observe.observe import read_status

pytestmark = pytest.mark.cluster
UNSEEN = {"observedGeneration": NO_GENERATION}


def test_a_new_job_has_it(jobs: Any, minimal: dict[str, Any]) -> None:
    assert jobs.apply(minimal) == ""
    stored = jobs.get("tried")
    assert stored["status"] == UNSEEN
    assert FineTuneJob.from_object(stored).status == read_status(UNSEEN)
    assert (Row.of(stored).phase, Row.of(stored).reason) == ("", "")


@pytest.mark.parametrize("options", [("apply", "--server-side", "--field-manager=operator"), ("replace",)])
def test_whoever_writes_a_status_replaces_it(
    crd_cluster: DevCluster, jobs: Any, minimal: dict[str, Any], namespace: str, options: tuple[str, ...]
) -> None:
    assert jobs.apply(minimal) == ""
    body = minimal | {"status": {"observedGeneration": 1, "phase": "Queued"}}
    if options == ("replace",):
        body["metadata"] = jobs.get("tried")["metadata"]
    where = ("--subresource=status", "-n", namespace, "-f", "-")
    crd_cluster.kubectl(*options, *where, stdin=yaml.safe_dump(body))
    assert jobs.get("tried")["status"] == {"observedGeneration": 1, "phase": "Queued"}


def test_a_job_that_was_made_before_gets_it_too(crd_cluster: DevCluster, minimal: dict[str, Any]) -> None:
    """A copy of the CRD without the default, then with it; without it, the job has no status at all."""
    definition = copy.deepcopy(custom_resource_definition())
    names, name = definition["spec"]["names"], "oldjobs.old.finetune.dev"
    definition["metadata"]["name"], definition["spec"]["group"] = name, "old.finetune.dev"
    names |= {"plural": "oldjobs", "singular": "oldjob", "kind": "OldJob", "listKind": "OldJobList"}
    del names["shortNames"], names["categories"]
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    default = schema.pop("default")

    def apply(document: dict[str, Any]) -> None:
        crd_cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(document))

    def status() -> Any:
        return json.loads(crd_cluster.kubectl("get", "oldjobs", "tried", "-o", "json").stdout).get("status")

    apply(definition)
    try:
        crd_cluster.wait_for_definition(name)
        apply(minimal | {"apiVersion": "old.finetune.dev/v1alpha1", "kind": "OldJob"})
        assert status() is None
        schema["default"] = default
        apply(definition)
        deadline = time.monotonic() + 20
        while status() != UNSEEN:
            assert time.monotonic() < deadline, status()
            time.sleep(0.2)
    finally:
        crd_cluster.kubectl("delete", "crd", name)
