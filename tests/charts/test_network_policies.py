"""Who may reach whom under the chart's NetworkPolicies, by the rules of Kubernetes."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune_api.job import ObjectMeta
from finetune_operator.desired.names import child_labels
from finetune_operator.desired.peers import build_network_policy
from finetune_test_programs.chart import CHART, Object, of_kind, render, run_helm

pytestmark = pytest.mark.cluster
OPERATOR_ON = ("--set", "networkPolicy.operator.enabled=true")
TRAINERS_ON = ("--set", "networkPolicy.trainers.enabled=true,networkPolicy.trainers.namespaces={team}")


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or an address outside."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


JOB = ObjectMeta(namespace="team", name="job", uid="u")
TRAINER = Peer("team", child_labels(JOB, "trainer"), "10.1.0.5")
PREFLIGHT = Peer("team", child_labels(JOB, "preflight"), "10.1.0.6")
STRANGER = Peer("team", {"app": "notebook"}, "10.1.0.7")
INTERNET = Peer(address="203.0.113.7")
NODE_CREDENTIALS = [Peer(address=address) for address in ("169.254.169.254", "169.254.170.2", "fd00:ec2::254")]


def _operator(documents: list[Object]) -> Peer:
    (deployment,) = of_kind(documents, "Deployment")
    return Peer("system", deployment["spec"]["template"]["metadata"]["labels"], "10.1.0.4")


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    """True if a label selector takes an object; none of its operators but In is used here."""
    wanted = selector.get("matchLabels") or {}
    listed = selector.get("matchExpressions") or []
    assert all(expression["operator"] == "In" for expression in listed)
    return wanted.items() <= labels.items() and all(labels.get(each["key"]) in each["values"] for each in listed)


def _is_peer(entry: Object, peer: Peer, namespace: str) -> bool:
    if block := entry.get("ipBlock"):
        address = ipaddress.ip_address(peer.address)
        inside = [address in ipaddress.ip_network(block["cidr"])]
        return inside[0] and not any(address in ipaddress.ip_network(other) for other in block.get("except") or ())
    if not peer.namespace:
        return False
    if "namespaceSelector" in entry:
        named = {"kubernetes.io/metadata.name": peer.namespace}
        return _selects(entry["namespaceSelector"], named) and _selects(entry.get("podSelector") or {}, peer.labels)
    return peer.namespace == namespace and _selects(entry["podSelector"], peer.labels)


def _is_port(entry: Object, port: int, protocol: str) -> bool:
    return bool(entry["port"] == port and entry.get("protocol", "TCP") == protocol)


def _side_allows(documents: list[Object], pod: Peer, other: Peer, port: int, direction: str, protocol: str) -> bool:
    """True if one end's policies let a connection through; a pod that no policy selects lets all through."""
    policies = [
        each
        for each in of_kind(documents, "NetworkPolicy")
        if each["metadata"]["namespace"] == pod.namespace
        and _selects(each["spec"]["podSelector"], pod.labels)
        and direction in each["spec"]["policyTypes"]
    ]
    side = {"Ingress": "from", "Egress": "to"}[direction]
    rules: list[Any] = [
        (rule, each["metadata"]["namespace"]) for each in policies for rule in each["spec"].get(direction.lower()) or ()
    ]
    return not policies or any(
        ("ports" not in rule or any(_is_port(entry, port, protocol) for entry in rule["ports"]))
        and (side not in rule or any(_is_peer(entry, other, namespace) for entry in rule[side]))
        for rule, namespace in rules
    )


def reaches(documents: list[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """True if a connection is allowed at both ends."""
    out = not source.namespace or _side_allows(documents, source, target, port, "Egress", protocol)
    return out and (not target.namespace or _side_allows(documents, target, source, port, "Ingress", protocol))


def test_without_them_everybody_reaches_everybody() -> None:
    documents = render()
    assert not of_kind(documents, "NetworkPolicy")
    assert reaches(documents, STRANGER, _operator(documents), 8443)
    assert reaches(documents, TRAINER, NODE_CREDENTIALS[0], 80)


def test_the_operator_is_reached_for_reports_and_probes_and_reaches_the_api_server() -> None:
    documents = render(*OPERATOR_ON)
    operator = _operator(documents)
    (test_pod,) = of_kind(render(test=True), "Pod")
    tester = Peer("system", test_pod["metadata"]["labels"], "10.1.0.9")
    kubelet, api_server = Peer(address="10.9.0.1"), Peer(address="10.9.0.2")

    for source in (TRAINER, PREFLIGHT, operator, tester):
        assert reaches(documents, source, operator, 8443)
    assert reaches(documents, kubelet, operator, 8080)
    assert [port for port in (443, 6443, 53) if not reaches(documents, operator, api_server, port)] == []
    assert reaches(documents, operator, INTERNET, 53, "UDP")

    prometheus = Peer("monitoring", {"app": "prometheus"}, "10.1.0.8")
    for source in (STRANGER, prometheus, INTERNET):
        assert not reaches(documents, source, operator, 8443)
    assert not reaches(documents, operator, INTERNET, 80)
    for target in NODE_CREDENTIALS:
        assert not reaches(documents, operator, target, 443)

    scraped = '[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"monitoring"}}}]'
    documents = render(*OPERATOR_ON, "--set-json", f"networkPolicy.operator.metricsFrom={scraped}")
    assert reaches(documents, prometheus, _operator(documents), 8443)


def test_a_job_reaches_hub_store_dns_and_operator_and_nothing_else() -> None:
    documents = render(*OPERATOR_ON, *TRAINERS_ON)
    operator = _operator(documents)
    for pod in (TRAINER, PREFLIGHT):
        assert reaches(documents, pod, INTERNET, 443)
        assert reaches(documents, pod, Peer(address="2001:db8::7"), 443)
        assert reaches(documents, pod, operator, 8443)
        assert reaches(documents, pod, Peer("kube-system", {"k8s-app": "kube-dns"}, "10.1.0.53"), 53, "UDP")
        assert not reaches(documents, pod, STRANGER, 8888)
        assert not reaches(documents, STRANGER, pod, 8888), "nobody reaches a job"
        for target in NODE_CREDENTIALS:
            assert [port for port in (80, 443) if reaches(documents, pod, target, port)] == []
    assert reaches(documents, STRANGER, INTERNET, 80), "other pods of the namespace are left alone"


@pytest.mark.parametrize("chart", [(), (*OPERATOR_ON, *TRAINERS_ON)], ids=["the job's policy alone", "and the chart's"])
def test_pods_of_several_nodes_are_reached_by_each_other_and_by_nobody_else(
    chart: tuple[str, ...],
) -> None:
    documents = render(*chart) if chart else []
    policy = build_network_policy(JOB)
    other_job = Peer("team", child_labels(JOB.model_copy(update={"uid": "other"}), "trainer"), "10.1.0.8")
    abroad = Peer("other", TRAINER.labels, "10.1.0.9")

    assert reaches([*documents, policy], TRAINER, TRAINER, 29400)
    assert reaches([*documents, policy], TRAINER, TRAINER, 45678), "gloo and NCCL listen on any port"
    assert reaches([*documents, policy], TRAINER, INTERNET, 443)
    for source in (STRANGER, other_job, PREFLIGHT, abroad, INTERNET):
        assert not reaches([*documents, policy], source, TRAINER, 29400)
    if chart:
        assert not reaches(documents, TRAINER, TRAINER, 29400), "the chart's policy alone lets nobody in"
    else:
        assert reaches([], STRANGER, TRAINER, 29400), "without the policy, anybody could join a run"


@pytest.mark.parametrize(
    ("identity", "address", "port"), [("eks", "169.254.170.23", 80), ("gke", "169.254.169.254", 80)]
)
def test_a_pods_own_identity_is_reached_only_where_it_is_on(identity: str, address: str, port: int) -> None:
    assert not reaches(render(*TRAINERS_ON), TRAINER, Peer(address=address), port)
    documents = render(*TRAINERS_ON, "--set", f"networkPolicy.trainers.podIdentity={identity}")
    assert reaches(documents, TRAINER, Peer(address=address), port)
    if identity == "eks":
        assert not reaches(documents, TRAINER, NODE_CREDENTIALS[0], 80), "the node's role stays out of reach"


def test_each_namespace_has_the_policy_and_more_networks_can_be_closed() -> None:
    wanted = "networkPolicy.trainers.exceptCIDRs={10.0.0.1/32}"
    documents = render(*TRAINERS_ON, "--set", f"watchNamespaces={{team,lab}},{wanted}")
    found = [each["metadata"]["namespace"] for each in of_kind(documents, "NetworkPolicy")]
    assert found == ["team", "lab"]
    assert not reaches(documents, TRAINER, Peer(address="10.0.0.1"), 443)
    assert reaches(documents, TRAINER, Peer(address="10.0.0.2"), 443)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("networkPolicy.trainers.enabled=true", "networkPolicy.trainers needs namespaces"),
        ("networkPolicy.operator.enabled=true,metrics.serviceMonitor.enabled=true", "metricsFrom must name who reads"),
    ],
)
def test_what_would_fail_silently_is_refused(settings: str, said: str) -> None:
    done = run_helm("template", "x", str(CHART), "--kube-version", "1.36.3", "--set", settings)
    assert done.returncode != 0
    assert said in done.stderr
