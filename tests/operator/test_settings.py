"""The environment: read once, and every mistake named at once."""

from pathlib import Path

import pytest

from finetune_api.spec.endpoints import EndpointPolicy
from finetune_operator.errors import SettingsError
from finetune_operator.main import main
from finetune_operator.settings import Kubeconfig, ServiceAccount, Settings

GOOD = {
    "FINETUNE_NAMESPACES": "",
    "FINETUNE_TRAINER_IMAGE": "trainer:1",
    "FINETUNE_PROGRESS_URL": "https://operator.finetune-system.svc:8443/",
    "FINETUNE_PROGRESS_PORT": "8443",
    "FINETUNE_HEALTH_PORT": "8080",
    "FINETUNE_TLS_DIR": "/etc/finetune/tls",
    "FINETUNE_LEASE_NAMESPACE": "finetune-system",
    "FINETUNE_POD_IP": "10.0.0.7",
    "FINETUNE_SERVICE_ACCOUNT_DIR": "/var/run/secrets/kubernetes.io/serviceaccount",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "KUBERNETES_SERVICE_PORT": "443",
}


def test_a_complete_environment_is_read() -> None:
    settings = Settings.from_environment(GOOD)
    assert settings.namespaces == ()
    assert "kube-system" in settings.denied_namespaces
    folder = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    assert settings.api_server == ServiceAccount("10.0.0.1", 443, folder)
    assert settings.progress_url == "https://operator.finetune-system.svc:8443"
    assert settings.tls_dir == Path("/etc/finetune/tls")
    assert (settings.lease_namespace, settings.pod_ip) == ("finetune-system", "10.0.0.7")


def test_namespaces_stand_between_commas() -> None:
    settings = Settings.from_environment(GOOD | {"FINETUNE_NAMESPACES": "team, kube-system"})
    assert (settings.namespaces, settings.denied_namespaces) == (("team", "kube-system"), ())
    settings = Settings.from_environment(GOOD | {"FINETUNE_DENIED_NAMESPACES": ""})
    assert settings.denied_namespaces == ()


def test_the_policy_about_endpoints_knows_the_api_server() -> None:
    variables = {"FINETUNE_ENDPOINT_HOSTS": "*.example.com, minio.svc", "FINETUNE_ENDPOINT_PRIVATE": "false"}
    found = Settings.from_environment(GOOD | variables).endpoints
    assert found == EndpointPolicy(hosts=("*.example.com", "minio.svc"), private=False, api_server="10.0.0.1:443")


@pytest.mark.parametrize(("value", "limit"), [("0", None), ("", None), ("8", 8)])
def test_a_limit_of_0_is_none(value: str, limit: int | None) -> None:
    assert Settings.from_environment(GOOD | {"FINETUNE_MAX_GPUS_PER_NAMESPACE": value}).max_gpus_per_namespace == limit
    with pytest.raises(SettingsError, match="must be a whole number, 0 for no limit, found 'many'"):
        Settings.from_environment(GOOD | {"FINETUNE_MAX_GPUS_PER_NAMESPACE": "many"})


def test_what_pods_carry_comes_from_the_charts_values() -> None:
    values = {
        "FINETUNE_POD_DEFAULTS": '{"serviceAccountName": "trainer"}',
        "FINETUNE_ALLOWED_OVERRIDES": '{"env": ["NO_PROXY"]}',
    }
    pods = Settings.from_environment(GOOD | values).pods
    assert pods.defaults.service_account_name == "trainer"
    assert (pods.allowed.env, "imagePullPolicy" in pods.allowed.fields) == (("NO_PROXY",), True)
    with pytest.raises(SettingsError, match=r"podDefaults\.serviceAcountName: Extra inputs are not permitted"):
        Settings.from_environment(GOOD | {"FINETUNE_POD_DEFAULTS": '{"serviceAcountName": "trainer"}'})
    with pytest.raises(SettingsError, match="FINETUNE_ALLOWED_OVERRIDES is no JSON"):
        Settings.from_environment(GOOD | {"FINETUNE_ALLOWED_OVERRIDES": "env: all"})


def test_with_a_kubeconfig_the_pods_own_variables_are_not_needed() -> None:
    kubeconfig = Kubeconfig(Path("config"), "dev")
    pod_only = ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "FINETUNE_SERVICE_ACCOUNT_DIR")
    pod_only += ("FINETUNE_LEASE_NAMESPACE", "FINETUNE_POD_IP")
    environment = {name: value for name, value in GOOD.items() if name not in pod_only}
    settings = Settings.from_environment(environment, kubeconfig)
    assert settings.api_server == kubeconfig
    assert (settings.lease_namespace, settings.pod_ip) == ("default", "127.0.0.1")


def test_run_is_what_the_program_does_if_it_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_TRAINER_IMAGE", raising=False)
    for arguments in ([], ["run"]):
        with pytest.raises(SystemExit, match=r"finetune-operator: .*FINETUNE_TRAINER_IMAGE is not set"):
            main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--context", "dev"], "--context needs --kubeconfig"), (["walk"], "invalid choice: 'walk'")],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_everything_missing_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environment({})
    assert not [name for name in GOOD if name != "FINETUNE_NAMESPACES" and name not in str(caught.value)]


def test_results_lie_by_namespace_and_name_unless_told_otherwise() -> None:
    assert Settings.from_environment(GOOD).location_template.text == "{namespace}/{name}"
    told = Settings.from_environment(GOOD | {"FINETUNE_RESULT_LOCATION": "east/{namespace}/{uid}"}).location_template
    assert told.resolve("", namespace="team", name="bot", uid="u") == "east/team/u"


WRONG = {
    "a layout that all jobs share": ({"FINETUNE_RESULT_LOCATION": "{namespace}/x"}, r"write \{name\} or \{uid\} in it"),
    "a layout that climbs": ({"FINETUNE_RESULT_LOCATION": "../{name}"}, "found '../{name}': write a plain relative"),
    "a layout with another's word": ({"FINETUNE_RESULT_LOCATION": "{user}/{name}"}, "the placeholders {namespace}, "),
    "a port that is no number": ({"FINETUNE_HEALTH_PORT": "http"}, "FINETUNE_HEALTH_PORT must be a port"),
    "a port that does not exist": ({"FINETUNE_PROGRESS_PORT": "70000"}, "found '70000'"),
    "a log level that does not exist": ({"FINETUNE_LOG_LEVEL": "loud"}, "must be one of INFO, DEBUG, WARNING, ERROR"),
    "a namespace that cannot exist": ({"FINETUNE_NAMESPACES": "team,Lab"}, "names of namespaces .* found 'Lab'"),
    "progress without TLS": ({"FINETUNE_PROGRESS_URL": "http://operator"}, "must be an https URL"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(change: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_environment(GOOD | change)
