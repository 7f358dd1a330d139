"""The chart installed by helm on a real API server: what its account may do, what an upgrade keeps, who admits its pod.

On a cluster of its own: the suite's shared one has another operator's roles under the same names.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from finetune_api.job import ObjectMeta
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import child_metadata
from finetune_operator.reports.own_certificate import MIN_SEED_BYTES
from finetune_test_programs.chart import of_kind, render

pytestmark = pytest.mark.cluster
CHECKOUT = Path(__file__).parents[2]
CHART = str(CHECKOUT / "charts/finetune-operator")
SYSTEM, TEAM, OTHER_TEAM = "system", "team", "other-team"
ACCOUNT = f"system:serviceaccount:{SYSTEM}:finetune-operator"
FIRST = "first"
"""Name of the job in the notes."""

# verb, resource, subresource
NEEDED = (
    ("watch", "finetunejobs.finetune.dev", ""),
    ("patch", "finetunejobs.finetune.dev", "status"),
    ("create", "jobs.batch", ""),
    ("patch", "jobs.batch", ""),
    ("create", "configmaps", ""),
    ("list", "pods", ""),
    ("create", "events", ""),
)
IN_ITS_OWN_NAMESPACE = (
    ("get", "leases.coordination.k8s.io/finetune-operator", ""),
    ("update", "leases.coordination.k8s.io/finetune-operator", ""),
    ("create", "leases.coordination.k8s.io", ""),
)
REFUSED = (
    ("update", "leases.coordination.k8s.io", ""),
    ("delete", "leases.coordination.k8s.io/finetune-operator", ""),
    ("list", "leases.coordination.k8s.io", ""),
    ("get", "secrets", ""),
    ("list", "secrets", ""),
    ("create", "pods", "exec"),
    ("get", "pods", "log"),
    ("create", "pods", ""),
    ("delete", "jobs.batch", ""),
    ("patch", "finetunejobs.finetune.dev", ""),
    ("delete", "finetunejobs.finetune.dev", ""),
    ("list", "configmaps", ""),
    ("patch", "configmaps", ""),
    ("create", "serviceaccounts", "token"),
    ("impersonate", "users", ""),
)


class Release:
    """The chart's release on a control plane without nodes: nothing waits for the pod."""

    def __init__(self, cluster: DevCluster) -> None:
        self.cluster = cluster
        self._reviews: Any = client.AuthorizationV1Api(cluster.api_client())

    def install(self, *settings: str) -> None:
        """Install, or upgrade to, exactly these settings."""
        where = ("--namespace", SYSTEM, "--create-namespace", "--reset-values")
        self.cluster.helm("upgrade", "--install", "finetune-operator", CHART, *where, *settings)

    def may(self, verb: str, resource: str, subresource: str, namespace: str) -> bool:
        """Whether the operator's account may do this, by the API server's own answer."""
        named, _, name = resource.partition("/")
        kind, _, group = named.partition(".")
        asked = {"verb": verb, "group": group, "resource": kind, "subresource": subresource, "name": name}
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{SYSTEM}", "system:authenticated"]
        review = {"spec": {"user": ACCOUNT, "groups": groups, "resourceAttributes": asked | {"namespace": namespace}}}
        return bool(self._reviews.create_subject_access_review(review).status.allowed)

    def get(self, *what: str) -> dict[str, Any]:
        """An object of the system namespace."""
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", *what, "-n", SYSTEM, "-o", "json").stdout)
        return found


@pytest.fixture(scope="module")
def release() -> Iterator[Release]:
    with DevCluster.start() as cluster:
        made = Release(cluster)
        made.install()
        cluster.kubectl("create", "namespace", TEAM)
        cluster.kubectl("create", "namespace", OTHER_TEAM)
        cluster.kubectl("label", "namespace", TEAM, "pod-security.kubernetes.io/enforce=restricted")
        yield made


def test_the_account_has_what_it_needs_and_nothing_more(release: Release) -> None:
    release.install()
    assert [rule for rule in NEEDED if not release.may(*rule, TEAM)] == []
    assert [rule for rule in IN_ITS_OWN_NAMESPACE if not release.may(*rule, SYSTEM)] == []
    assert [rule for rule in IN_ITS_OWN_NAMESPACE if release.may(*rule, TEAM)] == []
    assert [rule for rule in REFUSED if release.may(*rule, TEAM) or release.may(*rule, SYSTEM)] == []
    assert release.may("create", "tokenreviews.authentication.k8s.io", "", TEAM)


def test_a_namespaced_install_may_act_in_its_namespaces_only(release: Release) -> None:
    release.install("--set", f"watchNamespaces={{{TEAM},{OTHER_TEAM}}}")
    for namespace in (TEAM, OTHER_TEAM):
        assert [rule for rule in NEEDED if not release.may(*rule, namespace)] == []
    assert [rule for rule in NEEDED if release.may(*rule, "default")] == []
    assert release.may("create", "tokenreviews.authentication.k8s.io", "", "default")


def test_kubernetes_keeps_the_token_that_the_authority_follows_from(release: Release) -> None:
    release.install()
    token = _token(release)
    assert len(token) > MIN_SEED_BYTES
    release.install("--set", "logLevel=DEBUG")
    assert _token(release) == token

    # Somebody who deletes the Secret costs nobody anything: the account's token is the same again.
    release.cluster.kubectl("delete", "secret", "-n", SYSTEM, "finetune-operator-authority")
    release.install()
    assert _token(release) == token
    # A new account has a new one.
    release.cluster.kubectl("delete", "serviceaccount", "-n", SYSTEM, "finetune-operator-authority")
    release.cluster.kubectl("delete", "secret", "-n", SYSTEM, "finetune-operator-authority", "--ignore-not-found")
    release.install()
    assert _token(release) not in ("", token)


def _token(release: Release) -> str:
    """Returns the token once Kubernetes has made it."""
    key = ("-n", SYSTEM, "secret/finetune-operator-authority", "--for=jsonpath={.data.token}", "--timeout=20s")
    release.cluster.kubectl("wait", *key)
    return str(release.get("secret", "finetune-operator-authority")["data"]["token"])


def test_what_the_operator_publishes_outlives_an_upgrade(release: Release) -> None:
    release.install()
    assert release.may("patch", "configmaps/finetune-operator-authority", "", SYSTEM)
    assert not release.may("patch", "configmaps/other", "", SYSTEM)
    entry = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "finetune-operator-authority"}}
    apply = ("apply", "--server-side", "--field-manager=finetune-operator", "-n", SYSTEM, "-f", "-")
    release.cluster.kubectl(*apply, stdin=json.dumps(entry | {"data": {"ca.crt": "PEM"}}))
    release.install("--set", "logLevel=DEBUG")
    assert release.get("configmap", "finetune-operator-authority")["data"] == {"ca.crt": "PEM"}


def test_its_pod_is_admitted_at_the_restricted_level(release: Release) -> None:
    release.install()
    template = release.get("deployment", "finetune-operator")["spec"]["template"]
    for field in ("serviceAccountName", "serviceAccount"):  # the account lives in the system namespace
        template["spec"].pop(field)
    assert _refusal(release, template["spec"]) == ""
    root = copy.deepcopy(template["spec"])
    root["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert "allowPrivilegeEscalation" in _refusal(release, root)


def _refusal(release: Release, spec: dict[str, Any]) -> str:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tried", "namespace": TEAM}, "spec": spec}
    return release.cluster.kubectl(
        "create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod), check=False
    ).stderr


def test_the_notes_have_a_job_that_the_api_server_takes(release: Release) -> None:
    release.install("--set", f"watchNamespaces={{{TEAM}}}")
    release.cluster.wait_for_definition()
    notes = release.cluster.helm("get", "notes", "finetune-operator", "--namespace", SYSTEM).stdout
    job = notes.partition("<<'JOB'\n")[2].partition("\n  JOB\n")[0]
    tried = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
    assert f"finetunejob.finetune.dev/{FIRST} created" in release.cluster.kubectl(*tried, stdin=job).stdout

    wrong = release.cluster.kubectl(*tried, stdin=job.replace("source: hf", "sourse: hf"), check=False)
    assert "sourse" in wrong.stderr


def test_the_example_in_catalogues_of_charts_is_one_that_the_api_server_takes(release: Release) -> None:
    release.install()
    annotations = yaml.safe_load((Path(CHART) / "Chart.yaml").read_text())["annotations"]
    for example in yaml.safe_load(annotations["artifacthub.io/crdsExamples"]):
        tried = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        release.cluster.kubectl(*tried, stdin=yaml.safe_dump(example))


def test_two_releases_live_beside_each_other(release: Release) -> None:
    release.install("--set", f"watchNamespaces={{{TEAM}}}")
    others = (
        "--namespace",
        SYSTEM,
        "--set",
        f"crds.enabled=false,userRoles.create=false,watchNamespaces={{{TEAM},{OTHER_TEAM}}}",
    )
    release.cluster.helm("install", "second", CHART, *others)
    release.cluster.helm("uninstall", "second", "--namespace", SYSTEM)
    assert [rule for rule in NEEDED if not release.may(*rule, TEAM)] == []


VALUE_SETS = {
    "defaults": (),
    "every value": ("--values", str(Path(__file__).parent / "every_value.yaml")),
    "networks": (
        "--set",
        "networkPolicy.operator.enabled=true,networkPolicy.trainers.enabled=true,watchNamespaces={team}",
    ),
    "a Secret": ("--set", "tls.secretName=given,crds.keep=false,replicas=1"),
}
UNSERVED = ("monitoring.coreos.com", "cert-manager.io")
"""Groups whose definitions this cluster does not have."""


@pytest.mark.parametrize("settings", VALUE_SETS.values(), ids=VALUE_SETS)
def test_the_api_server_takes_every_object_strictly(release: Release, settings: tuple[str, ...]) -> None:
    release.cluster.kubectl("create", "namespace", "lab", check=False)
    documents = [*render(*settings, namespace=SYSTEM), *render(*settings, namespace=SYSTEM, test=True)]
    known = [each for each in documents if not each["apiVersion"].startswith(UNSERVED)]
    assert len(known) > 10
    for pod in of_kind(known, "Pod"):  # its own account comes with the test
        pod["spec"]["serviceAccountName"] = "default"
    strictly = ("apply", "--server-side", "--dry-run=server", "--force-conflicts", "--validate=strict", "-f", "-")
    release.cluster.kubectl(*strictly, stdin=yaml.safe_dump_all(known))

    for document in known:  # the check can fail
        document["sepc"] = {}
    done = release.cluster.kubectl(*strictly, stdin=yaml.safe_dump_all(known), check=False)
    assert done.returncode != 0
    assert "sepc" in done.stderr


def test_no_namespace_is_wedged_when_the_operator_is_gone(release: Release) -> None:
    release.install()
    for namespace in ("leaving", "wedged"):
        release.cluster.kubectl("create", "namespace", namespace)
        _run_job(release, namespace)
    release.cluster.helm("uninstall", "finetune-operator", "--namespace", SYSTEM)
    release.cluster.kubectl("delete", "namespace", "leaving", "--timeout=60s")
    assert release.cluster.kubectl("get", "namespace", "leaving", "--ignore-not-found").stdout == ""

    # So would it be if the operator had a finalizer on its jobs.
    job = ("-n", "wedged", "finetunejob/support-bot", "--type=merge", "-p")
    release.cluster.kubectl("patch", *job, '{"metadata":{"finalizers":["finetune.dev/cleanup"]}}')
    done = release.cluster.kubectl("delete", "namespace", "wedged", "--timeout=8s", check=False)
    assert done.returncode != 0
    release.cluster.kubectl("patch", *job, '{"metadata":{"finalizers":null}}')
    release.cluster.kubectl("wait", "--for=delete", "namespace/wedged", "--timeout=60s")


def _run_job(release: Release, namespace: str) -> None:
    """Apply a job and what the operator makes for it; the Job controller makes the pod."""
    release.cluster.wait_for_definition()
    release.cluster.kubectl("apply", "-n", namespace, "-f", str(CHECKOUT / "crds/samples/minimal.yaml"))
    found = release.cluster.kubectl("get", "ftj/support-bot", "-n", namespace, "-o", "jsonpath={.metadata.uid}").stdout
    owned = child_metadata(ObjectMeta(namespace=namespace, name="support-bot", uid=found), "support-bot-1", "trainer")
    container = {"name": "trainer", "image": "trainer:test"}
    template = {"metadata": {"labels": owned["labels"]}, "spec": {"restartPolicy": "Never", "containers": [container]}}
    child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": owned, "spec": {"template": template}}
    data = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": owned, "immutable": True, "data": {}}
    release.cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump_all([child, data]))
    pod = ("pods", "-n", namespace, "-l", "app.kubernetes.io/component=trainer", "--for=create", "--timeout=20s")
    release.cluster.kubectl("wait", *pod)


def test_uninstalling_leaves_the_jobs(release: Release) -> None:
    release.install()
    sample = str(CHECKOUT / "crds/samples/minimal.yaml")
    release.cluster.wait_for_definition()
    release.cluster.kubectl("apply", "-n", TEAM, "-f", sample)
    release.cluster.helm("uninstall", "finetune-operator", "--namespace", SYSTEM)
    assert "support-bot" in release.cluster.kubectl("get", "ftj", "-n", TEAM).stdout
    release.install()  # takes the CRD over again
    assert "support-bot" in release.cluster.kubectl("get", "ftj", "-n", TEAM).stdout
