"""A job in a company's network: model and data come through a proxy that opens TLS, from a mirror of the Hub."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.inputs import BUCKET, keys_below
from finetune_devcluster.platform import Platform
from finetune_test_servers.hub import Hub, HubRepo
from finetune_test_servers.intercepting_proxy import InterceptingProxy

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

Builder = Callable[..., dict[str, Any]]
HUB, STORE = "hub.company.test", "192.0.2.7"
"""A name that no DNS knows, and an address that no network routes to (TEST-NET-1)."""


@pytest.fixture(scope="module")
def proxy(
    platform: Platform, job_namespace: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InterceptingProxy]:
    """The proxy, before a mirror of the Hub with the tiny model and before the platform's S3; its authority is in the
    namespace, as ConfigMap company-ca."""
    store = platform.store.client()
    files = {}
    for key in keys_below(platform.store, "tiny-llama/"):
        files[key.rpartition("/")[2]] = store.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    with Hub.start() as hub:
        hub.repos["models/acme/tiny"] = HubRepo(files)
        routes = {HUB: _port(hub.url), STORE: _port(platform.store.endpoint_url)}
        with InterceptingProxy.start(tmp_path_factory.mktemp("company"), routes) as running:
            core: Any = client.CoreV1Api(platform.cluster.api_client())
            bundle = {"metadata": {"name": "company-ca"}, "data": {"ca.crt": running.ca_certificate}}
            core.create_namespaced_config_map(job_namespace, bundle)
            yield running


def _make_claim(platform: Platform, namespace: str, folder: Path) -> Path:
    """Claim hub-cache, on a folder of this machine."""
    size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
    spec = {"capacity": size, "accessModes": modes, "storageClassName": "", "hostPath": {"path": str(folder)}}
    claim = {"resources": {"requests": size}, "accessModes": modes, "storageClassName": "", "volumeName": "hub-cache"}
    core: Any = client.CoreV1Api(platform.cluster.api_client())
    core.create_persistent_volume({"metadata": {"name": "hub-cache"}, "spec": spec})
    core.create_namespaced_persistent_volume_claim(namespace, {"metadata": {"name": "hub-cache"}, "spec": claim})
    return folder


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _behind(proxy: InterceptingProxy, job: dict[str, Any], **pod: Any) -> dict[str, Any]:
    """The job, with everything on the other side of the proxy."""
    env = {"HTTPS_PROXY": proxy.url, "HF_ENDPOINT": f"https://{HUB}", "HF_HUB_DISABLE_XET": "1"}
    job["spec"]["model"]["source"] = "hf://acme/tiny"
    del job["spec"]["model"]["credentials"]
    job["spec"]["output"]["s3"]["endpointURL"] = f"https://{STORE}"
    job["spec"]["runPolicy"]["preflight"] = "Run"
    job["spec"]["pod"] = {"env": env} | pod
    return job


@pytest.mark.long
def test_a_job_succeeds_behind_a_proxy_that_opens_tls(
    platform: Platform, small_job: Builder, proxy: InterceptingProxy, job_namespace: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"not known|resolution|failure"):
        socket.getaddrinfo(HUB, 443)

    cache = _make_claim(platform, job_namespace, tmp_path)
    options = {"caBundle": {"configMapName": "company-ca"}, "cacheClaim": "hub-cache"}
    job = _behind(proxy, small_job("behind-a-proxy"), **options)
    platform.apply(job)
    done = platform.wait_for_end(**_key(job), timeout=240)
    assert done["status"]["phase"] == "Succeeded", platform.trainer_log(**_key(job))
    assert {HUB, STORE} <= set(proxy.opened)
    assert [path.name for path in cache.glob("huggingface/hub/models--acme--tiny/snapshots/*/*.safetensors")]
    assert done["status"]["progress"]["percent"] == 100  # reported to the operator, past the proxy


def test_without_the_authority_it_fails_at_once_and_says_which_field_is_missing(
    platform: Platform, small_job: Builder, proxy: InterceptingProxy
) -> None:
    seen = len(proxy.opened)
    job = _behind(proxy, small_job("untrusting"))
    platform.apply(job)
    failure = platform.wait_for_end(**_key(job), timeout=90)["status"]["failure"]
    assert failure["reason"] == "CertificateNotTrusted"
    assert "the certificate of the server is not trusted" in failure["message"]
    assert "spec.pod.caBundle" in failure["message"]
    assert len(proxy.opened) == seen, "nothing was asked over a connection that is not trusted"
    assert proxy.refused
    assert platform.trainer_pods(**_key(job)) == []


def test_a_field_that_the_administrator_keeps_is_refused_before_any_pod(platform: Platform, small_job: Builder) -> None:
    job = small_job("reaches-out", pod={"serviceAccountName": "admin", "env": {"NO_PROXY": "*"}})
    platform.apply(job)
    failure = platform.wait_for_end(**_key(job), timeout=30)["status"]["failure"]
    assert failure["reason"] == "PodFieldNotAllowed"
    assert failure["message"] == (
        "the administrator has not allowed jobs to set spec.pod.serviceAccountName (allowedOverrides.serviceAccounts: "
        "none); spec.pod.env.NO_PROXY (allowedOverrides.env: HTTPS_PROXY, HF_ENDPOINT, HF_HUB_DISABLE_XET)"
    )
    assert platform.trainer_pods(**_key(job)) == platform.trainer_pods(**_key(job), component="preflight") == []


def _key(job: dict[str, Any]) -> dict[str, str]:
    metadata: dict[str, str] = job["metadata"]
    return {"namespace": metadata["namespace"], "name": metadata["name"]}
