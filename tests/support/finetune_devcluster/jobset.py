"""The real JobSet on a dev cluster: its CustomResourceDefinition, webhooks and controller, which is a local process."""

import base64
import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from finetune_devcluster.cluster import DevCluster
from finetune_test_programs.binaries import jobset_binary, jobset_manifests
from finetune_test_programs.child_process import Program, free_port


def install_job_set_crd(cluster: DevCluster) -> None:
    """Install the CustomResourceDefinition of JobSets and wait until it is served."""
    cluster.kubectl("apply", "--server-side", "-f", str(jobset_manifests() / "crd/bases"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/jobsets.jobset.x-k8s.io", "--timeout=60s")


@contextmanager
def run_job_set(cluster: DevCluster) -> Iterator[None]:
    """Run JobSet's controller with its webhooks; it is stopped at the end, and its webhooks are taken away."""
    folder, port, health_port = cluster.folder / "jobset", free_port(), free_port()
    folder.mkdir()
    certificate, key = cluster.serving_certificate("jobset", ["127.0.0.1", "localhost"])
    (folder / "tls.crt").write_bytes(certificate.read_bytes())
    (folder / "tls.key").write_bytes(key.read_bytes())

    configuration = {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(folder)},
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health_port}"},
        "metrics": {"bindAddress": "0"},
    }
    (folder / "configuration.yaml").write_text(yaml.safe_dump(configuration))
    install_job_set_crd(cluster)

    flags = [f"--kubeconfig={cluster.kubeconfig}", f"--config={folder / 'configuration.yaml'}"]
    program = Program("jobset", [str(jobset_binary()), *flags], folder / "jobset.log")
    webhooks = json.dumps(_webhooks(cluster, port))
    try:
        _wait_until_ready(program, health_port)
        cluster.kubectl("apply", "--server-side", "-f", "-", stdin=webhooks)
        yield
    finally:
        program.stop()
        cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=webhooks)


def _wait_until_ready(program: Program, port: int) -> None:
    deadline = time.monotonic() + 90
    while True:
        program.check()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"JobSet is not ready after 90 s:\n{program.tail()}")
        time.sleep(0.2)


def _webhooks(cluster: DevCluster, port: int) -> dict[str, Any]:
    """JobSet's own webhooks, by URL."""
    bundle = base64.b64encode(cluster.ca_file.read_bytes()).decode()
    items = list(yaml.safe_load_all((jobset_manifests() / "webhook/manifests.yaml").read_text()))
    for configuration in items:
        kind = configuration["kind"].removesuffix("WebhookConfiguration").lower()
        configuration["metadata"]["name"] = f"jobset-{kind}"
        for hook in configuration["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
    return {"apiVersion": "v1", "kind": "List", "items": items}
