"""Releases beside each other, accounts and registries of one's own, and additions to the operator's pod."""

import pytest

from finetune_test_programs.chart import CHART, Object, environment, of_kind, operator_pod, render, run_helm

pytestmark = pytest.mark.cluster


def _identities(documents: list[Object]) -> set[tuple[str, str, str]]:
    """Returns who the objects are; the CRD and the roles of users belong to one release of a cluster."""
    return {
        (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
        for each in documents
        if each["kind"] != "CustomResourceDefinition" and not each["metadata"]["name"].startswith("finetunejobs-")
    }


@pytest.mark.parametrize(
    ("other", "namespace"), [("second", "system"), ("finetune-operator", "elsewhere")], ids=["a name", "a namespace"]
)
def test_two_releases_have_no_object_in_common(other: str, namespace: str) -> None:
    everything = ("--set", "watchNamespaces={team},metrics.dashboard.enabled=true,metrics.serviceMonitor.enabled=true")
    for settings in ((), everything):
        first = render(*settings)
        second = render(*settings, release=other, namespace=namespace)
        assert _identities(first) & _identities(second) == set()
        assert len(_identities(second)) == len(_identities(first))


def test_two_releases_have_a_leader_each_and_leave_the_others_pods_alone() -> None:
    first, second = render(), render(release="second")
    assert environment(first)["FINETUNE_LEASE_NAME"] == "finetune-operator"
    assert environment(second)["FINETUNE_LEASE_NAME"] == "second-finetune-operator"
    (own,) = [role for role in of_kind(second, "Role") if role["metadata"]["name"].endswith("-own")]
    leases = [rule for rule in own["rules"] if rule["resources"] == ["leases"] and "resourceNames" in rule]
    assert [rule["resourceNames"] for rule in leases] == [["second-finetune-operator"]]

    (service,), (deployment,) = of_kind(first, "Service"), of_kind(second, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert not service["spec"]["selector"].items() <= labels.items()


def test_names_can_be_chosen() -> None:
    (deployment,) = of_kind(render("--set", "fullnameOverride=ours,nameOverride=tuner"), "Deployment")
    assert deployment["metadata"]["name"] == "ours"
    assert deployment["metadata"]["labels"]["app.kubernetes.io/name"] == "tuner"
    (deployment,) = of_kind(render("--set", "nameOverride=tuner", release="r"), "Deployment")
    assert deployment["metadata"]["name"] == "r-tuner"


def test_a_long_release_name_gives_names_that_a_service_may_have() -> None:
    documents = render(release="a" * 53)
    named = [document for document in documents if document["kind"] in ("Service", "Deployment")]
    assert [len(document["metadata"]["name"]) for document in named] == [50, 50]


def test_the_account_may_be_somebody_elses() -> None:
    documents = render("--set", "serviceAccount.create=false,serviceAccount.name=given")
    assert [account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")] == [
        "finetune-operator-authority"
    ]
    assert operator_pod(documents)["serviceAccountName"] == "given"
    bindings = of_kind(documents, "RoleBinding", "ClusterRoleBinding")
    assert {subject["name"] for binding in bindings for subject in binding["subjects"]} == {"given"}

    done = run_helm("template", "x", str(CHART), "--kube-version", "1.36.3", "--set", "serviceAccount.create=false")
    assert "serviceAccount.name is needed where serviceAccount.create is false" in done.stderr


def test_one_registry_and_its_secret_serve_the_images() -> None:
    digest = "sha256:" + "0" * 64
    documents = render(
        "--set", f"imageRegistry=mirror.test/ai/,trainer.image.digest={digest},imagePullSecrets[0].name=mirror"
    )
    spec = operator_pod(documents)
    assert spec["containers"][0]["image"] == "mirror.test/ai/finetune-operator:0.1.0"
    assert environment(documents)["FINETUNE_TRAINER_IMAGE"] == f"mirror.test/ai/finetune-trainer@{digest}"
    assert spec["imagePullSecrets"] == [{"name": "mirror"}]


def test_objects_of_the_user_are_installed_with_the_chart() -> None:
    entry = '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"more","namespace":"{{ .Release.Namespace }}"}}'
    found = of_kind(render("--set-json", f"extraObjects=[{entry}]"), "ConfigMap")
    assert {"name": "more", "namespace": "system"} in [each["metadata"] for each in found]
