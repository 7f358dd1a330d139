"""Rights and requests: what the operator asks for is what its rules grant, by the API server's audit log."""

import time
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.audit import audit_log, read_requests
from finetune_devcluster.cluster import DevCluster
from finetune_operator.cluster.access import CLUSTER_RULES, OWN_RULES, QUEUE_RULES, RULES
from finetune_test_operator.operator_process import ACCOUNT, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.rights_audit import Audit, Right

FORBIDDEN = ("secrets", "pods/exec", "pods/log", "pods/attach", "serviceaccounts/token")
EVERY_LIFE = (
    Right("finetune.dev", "finetunejobs", "watch"),
    Right("finetune.dev", "finetunejobs/status", "patch"),
    Right("batch", "jobs", "create"),
    Right("", "configmaps", "create"),
    Right("", "pods", "watch"),
    Right("", "events", "create"),
)


def test_no_rule_is_about_secrets_or_the_inside_of_pods() -> None:
    for rule in (*RULES, *QUEUE_RULES, *OWN_RULES, *CLUSTER_RULES):
        assert rule.resource not in FORBIDDEN
        assert "*" not in (rule.group, rule.resource, *rule.verbs)
        assert not {"delete", "deletecollection", "escalate", "bind", "impersonate"} & {*rule.verbs}


@pytest.mark.cluster
def test_what_the_operator_asks_for_is_what_its_rules_grant(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any, dev_cluster: DevCluster
) -> None:
    jobs.create("audited")
    pod = kubelet.wait_for_pod("audited")
    kubelet.run(pod)
    jobs.wait_for_phase("audited", "Running")
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("audited", "Succeeded")

    # Everything since this cluster started, the tests before this one included.
    audit = Audit.of(read_requests(audit_log(dev_cluster.folder)))
    assert audit.undocumented == {}
    assert {right for right in EVERY_LIFE if audit.whole_cluster[right] == 0} == set()


def test_a_request_that_no_rule_grants_is_found(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    line = (
        '{"user": {"username": "system:serviceaccount:x:finetune-operator"}, "verb": "list", "requestURI": "/api/v1/'
        'secrets?limit=1", "objectRef": {"resource": "secrets", "apiVersion": "v1"}, "annotations": {}}\n'
    )
    log.write_text(line + line.replace('"list"', '"get"')[:-1])
    audit = Audit.of(read_requests(log))
    assert audit.undocumented == {Right("", "secrets", "list"): 1}
    assert Right("batch", "jobs", "create") in audit.unused


@pytest.mark.cluster
def test_some_api_servers_ask_for_the_right_on_finalizers(operator: OperatorProcess, jobs: Any) -> None:
    rbac: Any = client.RbacAuthorizationV1Api(jobs.cluster.api_client())
    role = rbac.read_cluster_role(ACCOUNT)
    whole = list(role.rules)
    role.rules = [rule for rule in whole if rule.resources != ["finetunejobs/finalizers"]]
    rbac.replace_cluster_role(ACCOUNT, role)
    try:
        wait_for(lambda: _is_refused(jobs), "a child whose owner reference blocks deletion is refused", 30)
    finally:
        role = rbac.read_cluster_role(ACCOUNT)
        role.rules = whole
        rbac.replace_cluster_role(ACCOUNT, role)


def _is_refused(jobs: Any) -> bool:
    name = f"owner-{time.monotonic_ns()}"
    jobs.create(name)
    found = jobs.wait(name, lambda s: s.get("phase") not in (None, "Pending") or _stalled(s), "looked at")
    return "blockOwnerDeletion" in _stalled(found["status"])


def _stalled(status: Any) -> str:
    conditions = status.get("conditions", [])
    return " ".join(
        str(each["message"]) for each in conditions if (each["type"], each["status"]) == ("Stalled", "True")
    )
