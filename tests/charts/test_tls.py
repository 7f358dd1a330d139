"""The certificate of the progress server, as the chart arranges it in three ways."""

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from finetune_operator.cluster.access import AUTHORITY_RULES
from finetune_operator.reports.own_certificate import OwnCertificate
from finetune_operator.settings import Settings
from finetune_test_programs.chart import CHART, environment, of_kind, operator_pod, render, render_text, run_helm

pytestmark = pytest.mark.cluster
CERT_MANAGER = ("--set", "tls.certManager.enabled=true")
WAYS = {"own": (), "a Secret": ("--set", "tls.secretName=given"), "cert-manager": CERT_MANAGER}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_two_renderings_are_equal(settings: tuple[str, ...]) -> None:
    assert render_text(*settings) == render_text(*settings)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("", "finetune-operator.system.svc"),
        ("https://127.0.0.1:9", "127.0.0.1"),
        ("https://reports.test", "reports.test"),
    ],
)
def test_the_certificate_is_for_the_address_that_pods_are_told(url: str, host: str, tmp_path: Path) -> None:
    found = environment(render("--set", f"progress.url={url}"))
    given = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    of_the_pod = {"FINETUNE_LEASE_NAMESPACE": "system", "FINETUNE_POD_IP": "10.0.0.7"}
    settings = Settings.from_environment({name: value or "" for name, value in found.items()} | given | of_the_pod)
    assert settings.own_tls is not None

    (tmp_path / "token").write_text("t" * 900)
    OwnCertificate(tmp_path / "token", settings.own_tls.names, tmp_path).write()
    certificate = x509.load_pem_x509_certificate((tmp_path / "tls.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    certified = names.get_values_for_type(x509.DNSName) + [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    assert host in certified
    assert "finetune-operator.system.svc.cluster.local" in certified
    assert host in settings.progress_url


def test_the_operators_authority_follows_from_a_token_of_an_account_without_rights() -> None:
    documents = render()
    (secret,) = of_kind(documents, "Secret")
    assert secret["type"] == "kubernetes.io/service-account-token"
    assert "data" not in secret
    account = secret["metadata"]["annotations"]["kubernetes.io/service-account.name"]
    subjects = [
        subject["name"]
        for binding in of_kind(documents, "RoleBinding", "ClusterRoleBinding")
        for subject in binding["subjects"]
    ]
    assert account in [each["metadata"]["name"] for each in of_kind(documents, "ServiceAccount")]
    assert account not in subjects

    spec = operator_pod(documents)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["own-tls"]["emptyDir"]["medium"] == "Memory"
    assert volumes["authority"]["secret"] == {
        "secretName": secret["metadata"]["name"],
        "items": [{"key": "token", "path": "token"}],
    }


def test_an_existing_certificate_is_used_and_none_is_made() -> None:
    documents = render("--set", "tls.secretName=from-cert-manager")
    assert not of_kind(documents, "Secret", "ConfigMap")
    assert [account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")] == ["finetune-operator"]
    assert operator_pod(documents)["volumes"] == [{"name": "tls", "secret": {"secretName": "from-cert-manager"}}]
    assert "FINETUNE_TLS_SEED" not in environment(documents)
    rules = [rule for role in of_kind(documents, "Role") for rule in role["rules"]]
    assert AUTHORITY_RULES[0].to_wire() not in rules


def test_cert_manager_makes_a_secret_under_an_authority_that_stays() -> None:
    documents = render(*CERT_MANAGER, "--set", "progress.url=https://127.0.0.1:8443")
    certificates = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "Certificate")}
    leaf, authority = certificates["finetune-operator"], certificates["finetune-operator-ca"]
    assert leaf["secretName"] == operator_pod(documents)["volumes"][0]["secret"]["secretName"]
    assert leaf["dnsNames"] == ["finetune-operator.system.svc", "finetune-operator.system.svc.cluster.local"]
    assert leaf["ipAddresses"] == ["127.0.0.1"]
    assert authority["isCA"] is True
    assert authority["privateKey"]["rotationPolicy"] == "Never"
    issuers: dict[str, Any] = {each["metadata"]["name"]: each["spec"] for each in of_kind(documents, "Issuer")}
    assert issuers[leaf["issuerRef"]["name"]] == {"ca": {"secretName": authority["secretName"]}}
    assert issuers[authority["issuerRef"]["name"]] == {"selfSigned": {}}

    named = render(*CERT_MANAGER, "--set", "tls.certManager.issuerRef.name=company")
    assert not of_kind(named, "Issuer")
    assert [each["spec"]["issuerRef"] for each in of_kind(named, "Certificate")] == [{"name": "company"}]


def test_two_sources_of_one_certificate_are_refused() -> None:
    done = run_helm("template", "x", str(CHART), "--kube-version", "1.36.3", *CERT_MANAGER, "--set", "tls.secretName=x")
    assert "tls.secretName and tls.certManager.enabled exclude each other" in done.stderr
