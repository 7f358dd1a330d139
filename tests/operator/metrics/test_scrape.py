"""GET /metrics of a real operator: over TLS, for those who may, and with the right numbers after a job's life."""

import json
import ssl
import urllib.error
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import NAMESPACE, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster
READER = "metrics-reader"


def _account_objects(name: str, *, may_read: bool) -> list[dict[str, Any]]:
    """A service account; one that may read metrics has the role of the chart."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NAMESPACE}}
    rbac = "rbac.authorization.k8s.io/v1"
    rules = [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]
    role = {"apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules}
    binding = {
        "apiVersion": rbac,
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}],
    }
    return [account, role, binding] if may_read else [account]


@pytest.fixture(scope="module")
def tokens(dev_cluster: DevCluster, operator_process: OperatorProcess) -> dict[str, str]:
    """Tokens of an account that may read metrics, and of one that may not."""
    objects = [*_account_objects(READER, may_read=True), *_account_objects("stranger", may_read=False)]
    items = {"apiVersion": "v1", "kind": "List", "items": objects}
    dev_cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(items))
    return {
        name: dev_cluster.kubectl("create", "token", name, "-n", NAMESPACE).stdout.strip()
        for name in (READER, "stranger")
    }


def scrape(operator: OperatorProcess, token: str | None) -> dict[str, float]:
    """Every value, by name and labels."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{operator.progress_url}/metrics", headers=headers)
    with urllib.request.urlopen(request, context=operator.tls(), timeout=10) as answer:
        text = answer.read().decode()
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def refusal(operator: OperatorProcess, token: str | None) -> tuple[int, str]:
    """Status and message of a refused scrape."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        scrape(operator, token)
    with raised.value as error:
        return error.code, json.loads(error.read())["message"]


def test_only_who_may_read_metrics_reads_them(operator: OperatorProcess, tokens: dict[str, str]) -> None:
    assert refusal(operator, None)[0] == 401
    assert refusal(operator, "forged") == (401, "the token is not valid")

    status, message = refusal(operator, tokens["stranger"])
    assert status == 403
    assert message.startswith(f"system:serviceaccount:{NAMESPACE}:stranger may not read metrics: bind a ClusterRole")

    assert scrape(operator, tokens[READER])["finetune_leader[]"] == 1


def test_metrics_are_not_in_the_clear(operator: OperatorProcess) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}/metrics", timeout=5)
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        urllib.request.urlopen(f"http://127.0.0.1:{operator.progress_port}/metrics", timeout=5)


def test_the_life_of_a_job_is_counted(
    operator: OperatorProcess, kubelet: PlayedKubelet, jobs: Any, outcomes: Any, tokens: dict[str, str]
) -> None:
    before = scrape(operator, tokens[READER])

    jobs.create("measured")
    pod = kubelet.wait_for_pod("measured")
    kubelet.run(pod)
    jobs.wait_for_phase("measured", "Running")
    during = scrape(operator, tokens[READER])
    assert during["finetune_jobs[('phase', 'Running')]"] == before["finetune_jobs[('phase', 'Running')]"] + 1

    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("measured", "Succeeded")
    after = scrape(operator, tokens[READER])

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert after["finetune_jobs[('phase', 'Running')]"] == before["finetune_jobs[('phase', 'Running')]"]
    assert grown("finetune_jobs[('phase', 'Succeeded')]") == 1
    assert grown("finetune_job_completions_total[('reason', 'Completed'), ('result', 'Succeeded')]") == 1
    assert grown("finetune_artifact_bytes_total[('type', 'Adapter')]") == outcomes.artifact.bytes
    assert grown("finetune_api_requests_total[('code', '201'), ('verb', 'POST')]") >= 3, "ConfigMap, Job, Events"
    assert grown("finetune_reconcile_duration_seconds_count[]") >= 3
    assert grown("finetune_watch_events_total[('stream', 'pods')]") >= 2
    assert (
        after["finetune_certificate_expiry_timestamp_seconds[]"]
        > after["finetune_watch_last_event_timestamp_seconds[('stream', 'pods')]"]
    )
    assert not [name for name in after if "measured" in name], "no label names a job"
