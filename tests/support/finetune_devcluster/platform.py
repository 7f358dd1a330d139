"""Everything a FineTuneJob needs, running: control plane, node, S3, and the operator installed by helm as a pod.

The demo and the end-to-end tests stand on this. Nothing here is special to them: the operator runs with the chart's own
service account and RBAC, the namespaces of jobs enforce the `restricted` Pod Security level, credentials are Secrets.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.process_node.node import NodeOptions, ProcessNode
from finetune_test_programs.child_process import free_port
from finetune_test_servers.s3_server import S3Server

CHECKOUT = Path(__file__).parents[3]
CHART = CHECKOUT / "charts/finetune-operator"
SYSTEM_NAMESPACE = "finetune-system"
ALLOWED = {
    "allowedOverrides.fields": "{caBundle,cacheClaim}",  # as of a cluster whose users may create pods anyway
    "allowedOverrides.env": "{HTTPS_PROXY,HF_ENDPOINT,HF_HUB_DISABLE_XET}",
}
"""What jobs may set of their pods; charts of earlier versions do not know it."""

CREDENTIALS_SECRET = "s3-credentials"
TERMINAL_PHASES = ("Succeeded", "Failed")
RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
}


@dataclass(frozen=True)
class Platform:
    """A running platform; made by `Platform.start`."""

    cluster: DevCluster
    store: S3Server
    node: ProcessNode

    @classmethod
    @contextmanager
    def start(cls, announce: Callable[[str], None] = lambda line: None) -> Iterator[Self]:
        """Start control plane, S3 and node, install the operator, and stop everything at the end."""
        with ExitStack() as stack:
            announce("starting etcd, kube-apiserver, kube-controller-manager and kube-scheduler")
            cluster = stack.enter_context(DevCluster.start())
            announce("starting an S3 server")
            store = stack.enter_context(S3Server.start())
            announce("starting a node that runs pods as processes")
            images = {
                "finetune-operator": CHECKOUT / ".venv-operator/bin",
                "finetune-trainer": CHECKOUT / ".venv/bin",
            }
            node = stack.enter_context(ProcessNode.start(cluster, NodeOptions(images=images)))
            platform = cls(cluster, store, node)
            announce("installing the operator with helm")
            platform.install_operator()
            yield platform

    def install_operator(self, chart: Path = CHART, **overrides: str) -> None:
        """Install or upgrade a chart, and wait until the operator is ready."""
        port = free_port()
        values = {
            "progress.port": str(port),
            "progress.url": f"https://127.0.0.1:{port}",
            "health.port": str(free_port()),
            "endpoints.loopback": "true",  # S3 is on this machine
            "replicas": "1",  # pods of this node share the machine's address, and so its ports
            **(ALLOWED if chart == CHART else {}),
            **overrides,
        }
        settings = [argument for key, value in values.items() for argument in ("--set-string", f"{key}={value}")]

        where = ("--namespace", SYSTEM_NAMESPACE)

        try:
            self.cluster.helm(
                "upgrade", "--install", "finetune-operator", str(chart), *where, "--create-namespace", "--wait",
                "--timeout", "60s", *settings)  # fmt: skip
        except RuntimeError as error:
            pods = self.cluster.kubectl("get", "pods", "-o", "wide", *where, check=False).stdout
            raise RuntimeError(f"{error}\n{pods}\n{self.operator_log()}") from None

    def operator_log(self) -> str:
        """The end of the operator's log."""
        names = ("--namespace", SYSTEM_NAMESPACE, "deployment/finetune-operator")
        return self.cluster.kubectl("logs", "--tail=60", *names, check=False).stdout

    def create_namespace(self, name: str) -> str:
        """A namespace as a platform team would set it up: restricted pods, and the bucket's credentials as a Secret."""
        core: Any = client.CoreV1Api(self.cluster.api_client())  # which takes plain objects, but does not say so
        core.create_namespace({"metadata": {"name": name, "labels": RESTRICTED}})
        secret = {"AWS_ACCESS_KEY_ID": self.store.access_key, "AWS_SECRET_ACCESS_KEY": self.store.secret_key}
        core.create_namespaced_secret(name, {"metadata": {"name": CREDENTIALS_SECRET}, "stringData": secret})
        return name

    def apply(self, manifest: dict[str, Any]) -> Any:
        """Apply a FineTuneJob as kubectl would (server-side)."""
        metadata = manifest["metadata"]
        return self._jobs().patch_namespaced_custom_object(
            "finetune.dev",
            "v1alpha1",
            metadata["namespace"],
            "finetunejobs",
            metadata["name"],
            manifest,
            field_manager="platform",
            _content_type="application/apply-patch+yaml",
        )

    def job(self, namespace: str, name: str) -> Any:
        """The FineTuneJob as it is now."""
        return self._jobs().get_namespaced_custom_object("finetune.dev", "v1alpha1", namespace, "finetunejobs", name)

    def delete(self, namespace: str, name: str) -> None:
        """Delete the FineTuneJob; the garbage collector does the rest."""
        self._jobs().delete_namespaced_custom_object("finetune.dev", "v1alpha1", namespace, "finetunejobs", name)

    def wait_for(
        self, namespace: str, name: str, holds: Callable[[dict[str, Any]], bool], *, timeout: float, what: str
    ) -> dict[str, Any]:
        """Poll the job until `holds(job)`; raises TimeoutError with the last status."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.job(namespace, name)
            if holds(job):
                return job
            time.sleep(0.2)
        raise TimeoutError(f"{namespace}/{name}: not {what} after {timeout:g} s; status: {job.get('status')}")

    def wait_for_end(self, namespace: str, name: str, *, timeout: float) -> dict[str, Any]:
        """Wait until the job is terminal, whichever way."""
        return self.wait_for(namespace, name, is_terminal, timeout=timeout, what="terminal")

    def trainer_pods(self, namespace: str, name: str, component: str = "trainer") -> list[Any]:
        """The trainer's pods of a job, or those of preflight, oldest first."""
        selector = f"finetune.dev/job-name={name},app.kubernetes.io/component={component}"
        core = client.CoreV1Api(self.cluster.api_client())
        pods = core.list_namespaced_pod(namespace, label_selector=selector)
        return sorted(pods.items, key=lambda pod: pod.metadata.creation_timestamp)

    def trainer_log(self, namespace: str, name: str) -> str:
        """Log of the newest trainer pod, or of preflight's, for failure messages; empty if there is none."""
        pods = self.trainer_pods(namespace, name) or self.trainer_pods(namespace, name, "preflight")
        return self.pod_log(pods[-1]) if pods else ""

    def pod_log(self, pod: Any) -> str:
        """The end of a pod's log."""
        core = client.CoreV1Api(self.cluster.api_client())
        try:
            return str(core.read_namespaced_pod_log(pod.metadata.name, pod.metadata.namespace, tail_lines=60))
        except ApiException as error:
            return f"(no log: {error.reason})"

    def _jobs(self) -> Any:  # the client types custom objects as `object`
        return client.CustomObjectsApi(self.cluster.api_client())


def is_terminal(job: dict[str, Any]) -> bool:
    """True once a FineTuneJob can no longer change."""
    return job.get("status", {}).get("phase") in TERMINAL_PHASES
