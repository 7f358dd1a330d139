"""Kubernetes' own roles view, edit and admin, and the chart's two, on a real API server that aggregates them."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.played_kubelet import wait_for
from finetune_test_programs.binaries import kube_binary

pytestmark = pytest.mark.cluster
CHECKOUT = Path(__file__).parents[2]
CHART = str(CHECKOUT / "charts/finetune-operator")
TEAM, OTHER_TEAM = "roles-team", "roles-other-team"
READ = {"get", "list", "watch"}
CHANGE = {"create", "update", "patch", "delete", "deletecollection"}
ROLES = {"view": READ, "edit": READ | CHANGE, "admin": READ | CHANGE}
OWN_ROLES = {"finetunejobs-viewer": READ, "finetunejobs-editor": READ | CHANGE}


class Users:
    """One user for each role, bound to it in one namespace."""

    def __init__(self, cluster: DevCluster) -> None:
        self.cluster = cluster
        self._reviews: Any = client.AuthorizationV1Api(cluster.api_client())

    def may(self, role: str, namespace: str = TEAM, subresource: str = "") -> set[str]:
        """The verbs that the user of a role may use on FineTuneJobs, by the API server's own answer."""
        return {verb for verb in READ | CHANGE if self._may(role, verb, namespace, subresource)}

    def _may(self, role: str, verb: str, namespace: str, subresource: str) -> bool:
        asked = {
            "verb": verb,
            "group": "finetune.dev",
            "resource": "finetunejobs",
            "subresource": subresource,
            "namespace": namespace,
        }
        review = {"spec": {"user": f"{role}-user", "resourceAttributes": asked}}
        return bool(self._reviews.create_subject_access_review(review).status.allowed)

    def kubectl(self, role: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl in the namespace, as the user of a role."""
        kubeconfig = self.cluster.user_kubeconfig(f"{role}-user")
        command = [str(kube_binary()), "kubectl", f"--kubeconfig={kubeconfig}", "-n", TEAM, *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)

    def wait_until_aggregated(self) -> None:
        """Wait for the controller, which works through the three roles one by one."""
        wait_for(lambda: all(len(self.may(role)) >= len(verbs) for role, verbs in ROLES.items()), "aggregation", 20)

    def apply_roles(self, aggregate: str) -> None:
        """Apply the chart's two roles, with or without the labels for aggregation."""
        chosen = ("-s", "templates/userroles.yaml", "--set", f"userRoles.aggregate={aggregate}")
        rendered = self.cluster.helm("template", "x", CHART, "--kube-version", "1.36.3", *chosen).stdout
        self.cluster.kubectl("apply", "-f", "-", stdin=rendered)


@pytest.fixture(scope="module")
def users(dev_cluster: DevCluster) -> Iterator[Users]:
    crd = CHECKOUT / "crds/finetune.dev_finetunejobs.yaml"
    dev_cluster.kubectl("apply", "--server-side", "-f", str(crd))
    dev_cluster.wait_for_definition()
    for namespace in (TEAM, OTHER_TEAM):
        dev_cluster.kubectl("create", "namespace", namespace)
    for role in (*ROLES, *OWN_ROLES):
        dev_cluster.kubectl("create", "rolebinding", role, "-n", TEAM, f"--clusterrole={role}", f"--user={role}-user")
    yield Users(dev_cluster)
    dev_cluster.kubectl("delete", "clusterrole", *OWN_ROLES, "--ignore-not-found")
    dev_cluster.kubectl("delete", "namespace", TEAM, OTHER_TEAM, "--wait=false")


def test_the_roles_of_a_namespace_reach_its_jobs(users: Users) -> None:
    # Without the labels, Kubernetes' own roles may not even read jobs.
    users.apply_roles("false")
    wait_for(lambda: users.may("finetunejobs-editor"), "the roles are known", 20)
    time.sleep(1)  # the controller aggregates within 0.2 s
    assert [role for role in ROLES if users.may(role)] == []

    users.apply_roles("true")
    users.wait_until_aggregated()
    assert {role: users.may(role) for role in (*ROLES, *OWN_ROLES)} == ROLES | OWN_ROLES

    # A status can be read, and is nobody's to write; another namespace is another's.
    for role in (*ROLES, *OWN_ROLES):
        assert users.may(role, subresource="status") == {"get"}
        assert users.may(role, subresource="finalizers") == set()
        assert users.may(role, OTHER_TEAM) == set()


def test_an_editor_submits_suspends_and_deletes_and_a_viewer_only_reads(users: Users) -> None:
    users.apply_roles("true")
    users.wait_until_aggregated()
    manifest = (CHECKOUT / "crds/samples/minimal.yaml").read_text()
    name = yaml.safe_load(manifest)["metadata"]["name"]
    suspend = ("patch", "ftj", name, "--type=merge", "-p", '{"spec": {"runPolicy": {"suspend": true}}}')
    written = ("patch", "ftj", name, "--subresource=status", "--type=merge", "-p", '{"status": {"phase": "Succeeded"}}')

    assert "cannot create resource" in users.kubectl("view", "create", "-f", "-", stdin=manifest).stderr
    assert users.kubectl("edit", "create", "-f", "-", stdin=manifest).returncode == 0
    assert name in users.kubectl("view", "get", "finetunejobs").stdout
    assert "cannot patch resource" in users.kubectl("view", *suspend).stderr
    assert users.kubectl("edit", *suspend).returncode == 0
    seen = json.loads(users.kubectl("view", "get", "ftj", name, "-o", "json").stdout)
    assert seen["spec"]["runPolicy"]["suspend"] is True

    for role in ("view", "edit", "admin"):
        assert 'cannot patch resource "finetunejobs/status"' in users.kubectl(role, *written).stderr
    assert "cannot delete resource" in users.kubectl("view", "delete", "ftj", name).stderr
    assert users.kubectl("edit", "delete", "ftj", name).returncode == 0
