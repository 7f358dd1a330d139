"""Identities of clouds on the real API server: pods reach the webhooks of AWS and Azure in the shape that they key on.

The webhooks are played by one HTTPS server that does what the clouds' own do: it reads the pod's ServiceAccount and, if
that has the cloud's annotation, mounts a token for the cloud into every container. Google's needs no webhook.
"""

import base64
import json
import re
import shlex
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from kubernetes import client

from finetune_api.base import Json
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.operator_process import CHECKOUT, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster
ALLOWED = {"fields": ["labels"], "serviceAccounts": ["on-*"]}
AZURE_LABEL = {"azure.workload.identity/use": "true"}
ROLE, CLIENT_ID, GOOGLE = "arn:aws:iam::1:role/trainer", "0000-client", "trainer@acme.iam.gserviceaccount.com"
CLOUDS: dict[str, tuple[str, dict[str, str], str, dict[str, str]]] = {
    # path of the webhook: annotation of the ServiceAccount, selector of pods, token's audience, variables
    "/aws": (
        "eks.amazonaws.com/role-arn",
        {},
        "sts.amazonaws.com",
        {"AWS_ROLE_ARN": ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/identity/token"},
    ),
    "/azure": (
        "azure.workload.identity/client-id",
        AZURE_LABEL,
        "api://AzureADTokenExchange",
        {"AZURE_CLIENT_ID": CLIENT_ID, "AZURE_FEDERATED_TOKEN_FILE": "/var/run/secrets/identity/token"},
    ),
}


class Webhook(BaseHTTPRequestHandler):
    """Answers admission reviews of pods."""

    core: ClassVar[Any]

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = review["request"]
        patch = self._patch(request["object"]["spec"], request["namespace"], self.path.partition("?")[0])
        answer = {"uid": request["uid"], "allowed": True}
        if patch:
            answer |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}
        body = json.dumps(review | {"response": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _patch(self, spec: Json, namespace: str, path: str) -> list[Json]:
        annotation, _, audience, variables = CLOUDS[path]
        account = self.core.read_namespaced_service_account(spec.get("serviceAccountName", "default"), namespace)
        if annotation not in (account.metadata.annotations or {}):
            return []

        token = {"audience": audience, "expirationSeconds": 3600, "path": "token"}
        volume = {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}]}}
        patch: list[Json] = [{"op": "add", "path": "/spec/volumes/-", "value": volume}]
        for number in range(len(spec["containers"])):
            mount = {"name": "identity", "mountPath": "/var/run/secrets/identity", "readOnly": True}
            patch.append({"op": "add", "path": f"/spec/containers/{number}/volumeMounts/-", "value": mount})
            patch += [
                {"op": "add", "path": f"/spec/containers/{number}/env/-", "value": {"name": name, "value": value}}
                for name, value in variables.items()
            ]
        return patch


@pytest.fixture
def webhooks(dev_cluster: DevCluster, namespace: str) -> Iterator[None]:
    """Both clouds' webhooks, for the pods of the test's namespace, which enforces the level restricted."""
    dev_cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    certificate, key = dev_cluster.serving_certificate("identity-webhook", ["127.0.0.1"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    core = client.CoreV1Api(dev_cluster.api_client())
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Webhook,), {"core": core}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    manifest = _configuration(namespace, server.server_port, dev_cluster.ca_file.read_bytes())
    dev_cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    try:
        yield
    finally:
        dev_cluster.kubectl("delete", "-f", "-", stdin=json.dumps(manifest))
        server.shutdown()
        thread.join()
        server.server_close()


def _configuration(namespace: str, port: int, authority: bytes) -> Json:
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "cloud-identities"},
        "webhooks": [
            {
                "name": f"{path[1:]}.identities.test",
                "clientConfig": {
                    "url": f"https://127.0.0.1:{port}{path}",
                    "caBundle": base64.b64encode(authority).decode(),
                },
                "rules": [pods],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "objectSelector": {"matchLabels": selector},
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "failurePolicy": "Fail",
            }
            for path, (_, selector, _, _) in CLOUDS.items()
        ],
    }


@pytest.fixture
def permissive(operator: OperatorProcess) -> Iterator[OperatorProcess]:
    """The operator of an administrator who lets jobs choose labels and some accounts."""
    operator.kill()
    operator.environment["FINETUNE_ALLOWED_OVERRIDES"] = json.dumps(ALLOWED)
    operator.start()
    yield operator
    operator.kill()
    del operator.environment["FINETUNE_ALLOWED_OVERRIDES"]
    operator.start()


def create(jobs: Any, name: str, pod: Json, preflight: str = "Skip") -> None:
    spec = {
        "model": {"source": "s3://models/tiny/"},
        "dataset": {"source": "s3://data/chat.jsonl"},
        "output": {"s3": {"bucket": "results"}},
        "resources": {"gpus": 0},
        "pod": pod,
        "runPolicy": {"preflight": preflight},
    }
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    api: Any = client.CustomObjectsApi(jobs.cluster.api_client())
    api.create_namespaced_custom_object("finetune.dev", "v1alpha1", jobs.namespace, "finetunejobs", body)


def variables(pod: Any) -> dict[str, str]:
    """Variables of a pod's container."""
    return {each.name: each.value for each in pod.spec.containers[0].env}


def tokens(pod: Any) -> list[str]:
    """Audiences of the tokens that a pod mounts; that of the API server is None."""
    sources = [source for volume in pod.spec.volumes if volume.projected for source in volume.projected.sources]
    return [source.service_account_token.audience for source in sources if source.service_account_token]


@pytest.mark.usefixtures("webhooks")
def test_pods_get_the_identity_of_each_cloud_and_no_token_for_the_api(
    permissive: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    accounts = {
        "on-aws": {"eks.amazonaws.com/role-arn": ROLE},
        "on-azure": {"azure.workload.identity/client-id": CLIENT_ID},
        "on-google": {"iam.gke.io/gcp-service-account": GOOGLE},
    }
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    for name, annotations in accounts.items():
        core.create_namespaced_service_account(namespace, {"metadata": {"name": name, "annotations": annotations}})

    create(jobs, "aws", {"serviceAccountName": "on-aws"})
    create(jobs, "aws-checks", {"serviceAccountName": "on-aws"}, preflight="Run")
    create(jobs, "azure", {"serviceAccountName": "on-azure", "labels": AZURE_LABEL})
    create(jobs, "azure-unlabelled", {"serviceAccountName": "on-azure"})
    create(jobs, "google", {"serviceAccountName": "on-google"})
    create(jobs, "nobody", {})
    pods = {name: kubelet.wait_for_pod(name) for name in ("aws", "azure", "azure-unlabelled", "google", "nobody")}
    pods["aws-checks"] = kubelet.wait_for_pod("aws-checks", component="preflight")

    for name in ("aws", "aws-checks"):
        assert variables(pods[name]).items() >= CLOUDS["/aws"][3].items()
        assert "sts.amazonaws.com" in tokens(pods[name])
    assert variables(pods["azure"]).items() >= CLOUDS["/azure"][3].items()
    assert "api://AzureADTokenExchange" in tokens(pods["azure"])
    assert pods["google"].spec.service_account_name == "on-google"

    # Without the label, and without an account, there is no identity; nowhere is there a token for the API.
    for name in ("azure-unlabelled", "nobody"):
        assert not {"AZURE_CLIENT_ID", "AWS_ROLE_ARN"} & variables(pods[name]).keys()
    for pod in pods.values():
        assert pod.spec.automount_service_account_token is False
        assert None not in tokens(pod)


def test_an_account_that_is_not_allowed_is_refused_before_any_pod(permissive: OperatorProcess, jobs: Any) -> None:
    create(jobs, "climbs", {"serviceAccountName": "admin"}, preflight="Run")
    failure = jobs.wait_for_phase("climbs", "Failed")["status"]["failure"]
    assert failure["reason"] == "PodFieldNotAllowed"
    assert "spec.pod.serviceAccountName (allowedOverrides.serviceAccounts: on-*)" in failure["message"]
    assert jobs.find_child("climbs") is None
    assert jobs.config_maps("climbs") == []


def test_the_commands_of_the_page_make_accounts_that_the_clouds_know(dev_cluster: DevCluster, namespace: str) -> None:
    page = (CHECKOUT / "docs/identities.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    core: Any = client.CoreV1Api(dev_cluster.api_client())
    seen = []
    for block in blocks:
        for command in block.strip().splitlines():
            program, *words = shlex.split(command)
            assert program == "kubectl"
            dev_cluster.kubectl(*(namespace if word == "team" else word for word in words))
        if "serviceaccount" in block:
            account = core.read_namespaced_service_account("trainer", namespace)
            seen.append([*(account.metadata.annotations or {})])
            core.delete_namespaced_service_account("trainer", namespace)

    known = [annotation for annotation, *_ in CLOUDS.values()]
    assert seen == [[known[0]], [], ["iam.gke.io/gcp-service-account"], [known[1]]]
    (policy,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    actions = {action for statement in json.loads(policy)["Statement"] for action in statement["Action"]}
    assert actions == set(re.findall(r"s3:\w+", page.partition("## What the trainer needs")[2].partition("Buckets")[0]))
