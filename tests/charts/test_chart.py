"""The chart as helm renders it: least privilege, restricted pods, a certificate for the address that pods are told."""

import json
from typing import Any

import pytest
import yaml

from finetune_operator.cluster.access import (
    AUTHORITY_RULES,
    CLUSTER_RULES,
    JOB_SET_RULES,
    OWN_RULES,
    QUEUE_RULES,
    RULES,
)
from finetune_operator.cluster.generate import generated_files
from finetune_operator.settings import Settings
from finetune_test_programs.chart import CHART, environment, of_kind, operator_pod, render, run_helm

pytestmark = pytest.mark.cluster
FORBIDDEN_RESOURCES = {"secrets", "pods/exec", "pods/log", "pods/attach", "*"}


def rules(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules of the operator itself, not of users and not of who reads its metrics."""
    roles = of_kind(documents, "Role", "ClusterRole")
    others = ("-metrics-reader", "finetunejobs-viewer", "finetunejobs-editor")
    return [rule for role in roles if not role["metadata"]["name"].endswith(others) for rule in role["rules"]]


@pytest.fixture(scope="module")
def rendered() -> list[dict[str, Any]]:
    return render()


def test_no_rule_reaches_secrets_shells_or_logs(rendered: list[dict[str, Any]]) -> None:
    for rule in rules(rendered):
        assert not FORBIDDEN_RESOURCES & set(rule["resources"])
        assert "*" not in rule["verbs"]
        assert "*" not in rule["apiGroups"]
        assert not {"delete", "deletecollection", "escalate", "impersonate"} & set(rule["verbs"])


def test_the_operator_is_tested_under_the_rules_that_the_chart_gives(rendered: list[dict[str, Any]]) -> None:
    assert rules(rendered) == [rule.to_wire() for rule in (*RULES, *CLUSTER_RULES, *OWN_RULES, *AUTHORITY_RULES)]


def test_rights_on_kueue_are_given_only_when_they_are_asked_for(rendered: list[dict[str, Any]]) -> None:
    granted = [rule.to_wire() for rule in QUEUE_RULES]
    assert not [rule for rule in rules(rendered) if rule in granted]
    everywhere = render("--set", "kueue.enabled=true,kueue.queuePreflight=true")
    assert [rule for rule in rules(everywhere) if rule in granted] == granted
    values = environment(everywhere)
    assert (values["FINETUNE_KUEUE"], values["FINETUNE_QUEUE_PREFLIGHT"]) == ("true", "true")

    scoped = render("--set", "watchNamespaces={team,lab},kueue.enabled=true")
    assert [rule for rule in rules(of_kind(scoped, "Role")) if rule in granted] == granted * 2
    assert not [rule for rule in rules(of_kind(scoped, "ClusterRole")) if rule in granted]


def test_rights_on_job_sets_are_given_only_when_they_are_asked_for(rendered: list[dict[str, Any]]) -> None:
    (granted,) = (rule.to_wire() for rule in JOB_SET_RULES)
    assert (granted["resources"], granted["verbs"]) == (["jobsets"], ["get", "create", "patch"])
    assert granted not in rules(rendered)
    assert environment(rendered)["FINETUNE_JOB_SETS"] == "false"
    asked = render("--set", "jobSets.enabled=true")
    assert rules(asked).count(granted) == 1
    assert environment(asked)["FINETUNE_JOB_SETS"] == "true"


def test_the_generated_rules_are_fresh() -> None:
    assert generated_files()
    for path, text in generated_files().items():
        assert path.read_text() == text, f"{path.name} is stale: run `make generate`"


def test_a_namespaced_install_has_no_cluster_role_but_that_of_reviews() -> None:
    documents = render("--set", "watchNamespaces={team,lab}")
    assert rules(of_kind(documents, "ClusterRole")) == [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
    ]
    for kind in ("Role", "RoleBinding"):
        found = {document["metadata"]["name"]: [] for document in of_kind(documents, kind)}
        for document in of_kind(documents, kind):
            found[document["metadata"]["name"]].append(document["metadata"]["namespace"])
        assert found == {"finetune-operator-system": ["team", "lab"], "finetune-operator-own": ["system"]}
    (own,) = (role for role in of_kind(documents, "Role") if role["metadata"]["name"].endswith("-own"))
    assert {rule["resources"][0] for rule in own["rules"]} == {"leases", "configmaps"}


@pytest.mark.parametrize(
    ("watched", "denied"), [("", "kube-system,kube-public,kube-node-lease,system"), ("team,kube-system", "")]
)
def test_system_namespaces_are_denied_unless_they_are_listed(watched: str, denied: str) -> None:
    names = json.dumps(watched.split(",") if watched else [])
    found = environment(render("--set-json", f"watchNamespaces={names}"))
    assert found["FINETUNE_NAMESPACES"] == watched
    assert found["FINETUNE_DENIED_NAMESPACES"] == denied


def test_the_operator_pod_is_restricted(rendered: list[dict[str, Any]]) -> None:
    spec = operator_pod(rendered)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_test_of_the_installation_is_the_operators_image_and_no_pod_of_the_service() -> None:
    documents, hooks = render(), render(test=True)
    (pod,), (deployment,), (service,) = (
        of_kind(hooks, "Pod"),
        of_kind(documents, "Deployment"),
        of_kind(documents, "Service"),
    )
    (container,), (tried,) = operator_pod(documents)["containers"], pod["spec"]["containers"]
    for key in ("image", "env", "securityContext"):
        assert tried[key] == container[key]
    assert pod["spec"]["securityContext"] == operator_pod(documents)["securityContext"]
    assert not service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert not deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert [volume["configMap"]["name"] for volume in pod["spec"]["volumes"]] == ["finetune-operator-authority"]

    given = of_kind(render("--set", "tls.secretName=given", test=True), "Pod")[0]["spec"]["volumes"]
    assert [volume["secret"]["items"] for volume in given] == [[{"key": "ca.crt", "path": "ca.crt"}]], "never the key"


def test_two_replicas_are_spread_and_replaced_one_after_the_other(rendered: list[dict[str, Any]]) -> None:
    (deployment,), (budget,) = of_kind(rendered, "Deployment"), of_kind(rendered, "PodDisruptionBudget")
    spec = deployment["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}
    assert budget["spec"] == {"maxUnavailable": 1, "selector": spec["selector"]}

    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway"
    assert spread["labelSelector"] == spec["selector"]
    assert spread["labelSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    (single,) = of_kind(render("--set", "replicas=1"), "Deployment")
    assert single["spec"]["replicas"] == 1


def test_the_environment_is_complete(rendered: list[dict[str, Any]]) -> None:
    (container,) = operator_pod(rendered)["containers"]
    of_the_pod = {"metadata.namespace": "system", "status.podIP": "10.0.0.7"}  # and these the kubelet fills in
    complete = {
        entry["name"]: entry.get("value") or of_the_pod[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container["env"]
        if entry.get("value") != ""
    } | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}

    settings = Settings.from_environment(complete)
    assert (settings.lease_namespace, settings.pod_ip) == ("system", "10.0.0.7")


def test_a_digest_wins_over_a_tag() -> None:
    digest = "sha256:" + "0" * 64
    (deployment,) = of_kind(render("--set", f"image.digest={digest},image.tag=x"), "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"finetune-operator@{digest}"


def test_the_crd_can_be_left_out_and_is_kept_on_uninstall(rendered: list[dict[str, Any]]) -> None:
    (definition,) = of_kind(rendered, "CustomResourceDefinition")
    assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not of_kind(render("--set", "crds.enabled=false"), "CustomResourceDefinition")


@pytest.mark.parametrize(
    "setting",
    [
        "watchNamespace=team",
        "watchNamespaces={Team}",
        "progress.prot=1",
        "logLevel=LOUD",
        "replicas=0",
        "progress.url=http://plain",
        "image.digest=latest",
        "resultLocation=shared",
        "resultLocation=\\{user\\}/\\{name\\}",
    ],
)
def test_wrong_values_are_refused_by_the_schema(setting: str) -> None:
    done = run_helm("template", "x", str(CHART), "--kube-version", "1.36.3", "--set", setting)
    assert done.returncode != 0
    assert "values don't meet the specifications" in done.stderr


MONITORED = tuple(
    argument
    for name in ("serviceMonitor", "podMonitor", "alerts", "dashboard")
    for argument in ("--set", f"metrics.{name}.enabled=true")
)


def test_monitoring_objects_come_only_when_they_are_asked_for(rendered: list[dict[str, Any]]) -> None:
    kinds = ("ServiceMonitor", "PodMonitor", "PrometheusRule", "ConfigMap")
    assert {each["metadata"]["name"] for each in of_kind(rendered, *kinds)} == {"finetune-operator-authority"}
    found = of_kind(render(*MONITORED, "--set", "metrics.tokenSecret.name=scraper,tls.secretName=given"), *kinds)
    assert sorted(each["kind"] for each in found) == sorted(kinds)


def test_prometheus_reads_metrics_over_tls_with_a_token_and_the_right_name(rendered: list[dict[str, Any]]) -> None:
    (monitor,) = of_kind(render("--set", "metrics.serviceMonitor.enabled=true"), "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["bearerTokenFile"] == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert "insecureSkipVerify" not in endpoint["tlsConfig"]
    assert endpoint["tlsConfig"]["serverName"] in str(environment(rendered)["FINETUNE_TLS_NAMES"]).split(",")
    (published,) = of_kind(rendered, "ConfigMap")
    assert endpoint["tlsConfig"]["ca"] == {"configMap": {"name": published["metadata"]["name"], "key": "ca.crt"}}
    assert environment(rendered)["FINETUNE_AUTHORITY_CONFIG_MAP"] == published["metadata"]["name"]

    (service,) = of_kind(rendered, "Service")
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


def test_a_pod_monitor_without_a_token_is_refused_with_the_value_to_set() -> None:
    done = run_helm(
        "template", "release", str(CHART), "--kube-version", "1.36.3", "--set", "metrics.podMonitor.enabled=true"
    )
    assert done.returncode != 0
    assert "metrics.podMonitor needs metrics.tokenSecret.name" in done.stderr


def test_the_rule_has_every_alert_with_a_link_to_the_runbook() -> None:
    (rule,) = of_kind(
        render(*MONITORED[4:6], "--set", "metrics.alerts.runbookUrl=https://wiki/runbook"), "PrometheusRule"
    )
    source = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    (group,), (expected,) = rule["spec"]["groups"], source["groups"]
    assert [alert["alert"] for alert in group["rules"]] == [alert["alert"] for alert in expected["rules"]]
    for alert, original in zip(group["rules"], expected["rules"], strict=True):
        assert alert["expr"] == original["expr"]
        assert alert["annotations"].pop("runbook_url") == f"https://wiki/runbook#{alert['alert'].lower()}"
        assert alert["annotations"] == original["annotations"]
