"""The JobSet of a job on several nodes: the golden manifest, its names, and whose field each is."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import ObjectMeta
from finetune_api.spec.run import MAX_NAME_ON_NODES, MAX_NODES
from finetune_api.vocabulary import QUEUE_LABEL, QUEUE_PRIORITY_LABEL
from finetune_operator.desired.job_set import build_job_set
from finetune_operator.desired.names import (
    child_name,
    controlling_job_set,
    job_set_job_name,
    job_set_name,
    preflight_name,
)
from finetune_operator.desired.peers import build_service
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_test_operator.snapshot_builder import INSTALLATION, METADATA, a_spec

GOLDEN = Path(__file__).parent / "golden"
TWO_NODES: dict[str, Any] = {"resources": {"nodes": 2, "gpus": 4}}
IN_A_SET: dict[str, Any] = {"resources": {"nodes": 2, "gpus": 4, "multiNode": "JobSet"}}
QUEUE: dict[str, Any] = {
    "scheduling": {
        "queueName": "gpus",
        "workloadPriorityClassName": "research",
        "annotations": {"scheduling.volcano.sh/queue-name": "team-a"},
    }
}


def _job_set(**sections: Any) -> dict[str, Any]:
    return build_job_set(METADATA, a_spec(**IN_A_SET, **sections), INSTALLATION.trainer_image, "config", 40)


def _job(**sections: Any) -> dict[str, Any]:
    return build_trainer_job(METADATA, a_spec(**TWO_NODES, **sections), INSTALLATION.trainer_image, "config", 40)


def _only_template(job_set: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    template: dict[str, Any] = replicated["template"]
    return template


def _variables(job_spec: dict[str, Any]) -> dict[str, str]:
    (container,) = job_spec["template"]["spec"]["containers"]
    return {each["name"]: each.get("value", "") for each in container["env"]}


@pytest.mark.parametrize(("name", "sections"), [("two_nodes", {}), ("in_a_queue", QUEUE)])
def test_the_job_set_is_the_golden_one(name: str, sections: dict[str, Any]) -> None:
    assert _job_set(**sections) == yaml.safe_load((GOLDEN / f"job_set_{name}.yaml").read_text())


def test_its_job_is_the_one_that_would_be_made_without_it() -> None:
    template, plain = _only_template(_job_set()), _job()
    assert template["metadata"]["labels"] == plain["metadata"]["labels"]
    assert template["metadata"]["annotations"] == plain["metadata"]["annotations"]

    # Two things differ: who writes `suspend`, and the name of the Job, in that of its first pod.
    address = _variables(template["spec"]).pop("FINETUNE_RENDEZVOUS")
    theirs = plain["spec"] | {"template": yaml.safe_load(yaml.safe_dump(plain["spec"]["template"]))}
    (container,) = theirs["template"]["spec"]["containers"]
    variable = next(each for each in container["env"] if each["name"] == "FINETUNE_RENDEZVOUS")
    assert variable["value"] != address
    variable["value"] = address
    del theirs["suspend"]
    assert template["spec"] == theirs


def test_pods_meet_at_the_first_pod_of_the_sets_job_under_our_service() -> None:
    template, service = _only_template(_job_set()), build_service(METADATA)
    host = f"{job_set_job_name(METADATA)}-0.{service['metadata']['name']}"
    assert _variables(template["spec"])["FINETUNE_RENDEZVOUS"] == f"{host}:29400"
    assert template["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


@pytest.mark.parametrize(
    ("sections", "suspended"),
    [({}, False), ({"runPolicy": {"suspend": True}}, True), (QUEUE, True)],
    ids=["it starts", "a person suspends it", "a queue starts it"],
)
def test_only_the_set_says_whether_it_is_suspended(sections: dict[str, Any], suspended: bool) -> None:
    job_set = _job_set(**sections)
    assert job_set["spec"]["suspend"] is suspended
    assert "suspend" not in _only_template(job_set)["spec"]


def test_only_the_set_is_in_the_queue() -> None:
    job_set = _job_set(**QUEUE)
    assert job_set["metadata"]["labels"][QUEUE_LABEL] == "gpus"
    assert job_set["metadata"]["labels"][QUEUE_PRIORITY_LABEL] == "research"

    template = _only_template(job_set)
    assert not {QUEUE_LABEL, QUEUE_PRIORITY_LABEL} & set(template["metadata"]["labels"])


NAMES = ["a", "bot", "a.b.c", "1", "1.b", "x" * MAX_NAME_ON_NODES, "x" * 33 + "-" * 5 + "y" * 16]
DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"


@pytest.mark.parametrize("name", NAMES)
def test_names_are_what_job_sets_webhook_demands(name: str) -> None:
    job = ObjectMeta(name=name, uid="u")
    longest_pod = f"{job_set_job_name(job)}-{MAX_NODES - 1}-abcde"
    for each in (job_set_name(job), job_set_job_name(job), longest_pod):
        assert re.fullmatch(DNS_1035, each)
        assert len(each) <= 63


def test_the_other_childs_names_would_be_refused() -> None:
    digit, long = ObjectMeta(name="1", uid="u"), ObjectMeta(name="x" * MAX_NAME_ON_NODES, uid="u")
    assert not re.fullmatch(DNS_1035, f"{child_name(digit)}-train-0")
    assert len(f"{child_name(long)}-train-0-{MAX_NODES - 1}-abcde") > 63


def test_the_sets_job_is_named_as_its_controller_names_it_and_as_no_other_child() -> None:
    (replicated,) = _job_set()["spec"]["replicatedJobs"]
    assert job_set_job_name(METADATA) == f"{job_set_name(METADATA)}-{replicated['name']}-0"
    assert len({job_set_job_name(METADATA), child_name(METADATA), preflight_name(METADATA)}) == 3
    assert job_set_name(ObjectMeta(name="bot", uid="1")) != job_set_name(ObjectMeta(name="bot", uid="2"))


CONTROLLERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "a JobSet": ({"apiVersion": "jobset.x-k8s.io/v1alpha2"}, "set"),
    "a JobSet of a later version": ({"apiVersion": "jobset.x-k8s.io/v1"}, "set"),
    "a JobSet of another group": ({"apiVersion": "example.com/v1"}, None),
    "a JobSet of no group": ({}, None),
    "something else of the group": ({"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "Other"}, None),
    "a JobSet that does not control it": ({"apiVersion": "jobset.x-k8s.io/v1alpha2", "controller": False}, None),
}


@pytest.mark.parametrize(("fields", "found"), CONTROLLERS.values(), ids=CONTROLLERS)
def test_a_controlling_job_set_is_known_by_kind_and_group(fields: dict[str, Any], found: str | None) -> None:
    reference = {"kind": "JobSet", "name": "set", "uid": "u", "controller": True} | fields
    assert controlling_job_set({"ownerReferences": [reference]}) == found
    assert controlling_job_set({}) is None
