"""The real Kueue on a dev cluster: its CustomResourceDefinitions, webhooks, manager and visibility API.

Its manager is a local process. Webhooks and the visibility API reach it on loopback, by URL and by a Service of type
ExternalName, as there is no network of Services here. It manages batch/v1 Jobs, unless `integrations` say more.
"""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from finetune_devcluster.cluster import DevCluster
from finetune_test_programs.binaries import KUEUE_CERTIFICATES, kueue_binary, kueue_manifests
from finetune_test_programs.child_process import Program, free_port

KUEUE_NAMESPACE = "kueue-system"
WEBHOOKS_OF = ("clusterqueue", "cohort", "job", "jobset", "resourceflavor", "workload")


def kueue_object(kind: str, name: str, spec: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """An object of Kueue; keyword arguments are fields beside its spec."""
    body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}} | fields
    return body | ({"spec": spec} if spec is not None else {})


def cluster_queue(stop_policy: str = "None", pods: int = 1) -> dict[str, Any]:
    """ClusterQueue `all` with room for some trainers' pods: that of a small job asks for 4 cores and 32Gi."""
    quota = [{"name": "cpu", "nominalQuota": 4 * pods}, {"name": "memory", "nominalQuota": f"{32 * pods}Gi"}]
    group = {"coveredResources": ["cpu", "memory"], "flavors": [{"name": "any", "resources": quota}]}
    spec = {
        "namespaceSelector": {},
        "resourceGroups": [group],
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "stopPolicy": stop_policy,
    }
    return kueue_object("ClusterQueue", "all", spec)


def install_kueue_crds(cluster: DevCluster) -> None:
    """Install Kueue's CustomResourceDefinitions and wait until they are served."""
    cluster.kubectl("apply", "--server-side", "-f", str(kueue_manifests() / "crd/bases"))
    wanted = {"workloads", "localqueues", "clusterqueues", "resourceflavors", "workloadpriorityclasses"}
    deadline = time.monotonic() + 60
    while not wanted <= _served(cluster):
        if time.monotonic() > deadline:
            raise TimeoutError("Kueue's CustomResourceDefinitions are not served after 60 s")
        time.sleep(0.2)


def remove_kueue_crds(cluster: DevCluster) -> None:
    """Remove what `install_kueue_crds` has installed."""
    cluster.kubectl("delete", "-f", str(kueue_manifests() / "crd/bases"))


def _served(cluster: DevCluster) -> set[str]:
    found = cluster.kubectl("get", "--raw", "/apis/kueue.x-k8s.io/v1beta2", check=False)
    return {each["name"] for each in json.loads(found.stdout)["resources"]} if found.returncode == 0 else set()


class Kueue:
    """Kueue's manager, which may be stopped and started again."""

    def __init__(self, cluster: DevCluster, **configuration: Any) -> None:
        """`configuration`: fields of Kueue's Configuration, such as manageJobsWithoutQueueName."""
        self._cluster = cluster
        self._folder = cluster.folder / "kueue"
        self._configuration = configuration
        self._program: Program | None = None
        self._health_port, self._webhook_port, self._visibility_port = free_port(), free_port(), free_port()

    @classmethod
    @contextmanager
    def run(cls, cluster: DevCluster, **configuration: Any) -> Iterator["Kueue"]:
        """Install and start Kueue; it is stopped at the end, and its webhooks are taken away."""
        kueue = cls(cluster, **configuration)
        kueue._prepare()
        kueue.start()
        try:
            yield kueue
        finally:
            kueue.stop()
            cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=json.dumps(kueue._webhooks()))

    def start(self) -> None:
        """Start the manager and wait until it answers, its visibility API too."""
        flags = [f"--kubeconfig={self._cluster.kubeconfig}", f"--config={self._folder / 'configuration.yaml'}"]
        flags.append(f"--visibility-server-port={self._visibility_port}")
        command = ["env", f"--chdir={self._folder}", str(kueue_binary()), *flags]
        self._program = Program("kueue", command, self._folder / "kueue.log")

        deadline = time.monotonic() + 90
        while not (self._is_ready() and self._shows_the_line()):
            self._program.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"Kueue is not ready after 90 s:\n{self._program.tail()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop the manager."""
        if self._program is not None:
            self._program.stop()

    @contextmanager
    def managing_every_job(self) -> Iterator[None]:
        """Let Kueue hold every Job that names no queue, for a while."""
        for choice in (True, False):
            self.stop()
            self._configuration["manageJobsWithoutQueueName"] = choice
            self._configure()
            self.start()
            if choice:
                yield

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or change objects."""
        document = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self._cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(document))

    def _prepare(self) -> None:
        certificates = self._folder / KUEUE_CERTIFICATES
        certificates.mkdir(parents=True)
        certificate, key = self._cluster.serving_certificate("kueue", ["127.0.0.1", "localhost"])
        (certificates / "tls.crt").write_bytes(certificate.read_bytes())
        (certificates / "tls.key").write_bytes(key.read_bytes())

        self._configure()
        install_kueue_crds(self._cluster)
        self.apply(*self._visibility(), *self._webhooks()["items"])

    def _configure(self) -> None:
        (self._folder / "configuration.yaml").write_text(yaml.safe_dump(self._manager_configuration()))

    def _manager_configuration(self) -> dict[str, Any]:
        return {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self._health_port}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {
                "host": "127.0.0.1",
                "port": self._webhook_port,
                "certDir": str(self._folder / KUEUE_CERTIFICATES),
            },
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "integrations": {"frameworks": ["batch/job"]},
        } | self._configuration

    def _visibility(self) -> list[dict[str, Any]]:
        service = {"name": "visibility-server", "namespace": KUEUE_NAMESPACE}
        group, version = "visibility.kueue.x-k8s.io", "v1beta2"
        spec = {"group": group, "version": version, "groupPriorityMinimum": 100, "versionPriority": 100}
        spec |= {"insecureSkipTLSVerify": True, "service": service | {"port": self._visibility_port}}
        return [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": KUEUE_NAMESPACE}},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": service,
                "spec": {
                    "type": "ExternalName",
                    "externalName": "localhost",
                    "ports": [{"port": self._visibility_port}],
                },
            },
            {
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": f"{version}.{group}"},
                "spec": spec,
            },
        ]

    def _webhooks(self) -> dict[str, Any]:
        """Kueue's own webhooks of Jobs and of its objects, by URL."""
        text = (kueue_manifests() / "webhook/manifests.yaml").read_text()
        authority = self._cluster.kubectl("config", "view", "--raw", "--flatten", "-o", "json").stdout
        bundle = json.loads(authority)["clusters"][0]["cluster"]["certificate-authority-data"]

        items = []
        for configuration in yaml.safe_load_all(text):
            hooks = [hook for hook in configuration["webhooks"] if hook["name"][1:].split(".")[0] in WEBHOOKS_OF]
            for hook in hooks:
                path = hook["clientConfig"]["service"]["path"]
                hook["clientConfig"] = {"url": f"https://127.0.0.1:{self._webhook_port}{path}", "caBundle": bundle}
            items.append(configuration | {"webhooks": hooks})
        return {"apiVersion": "v1", "kind": "List", "items": items}

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health_port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _shows_the_line(self) -> bool:
        path = "/apis/visibility.kueue.x-k8s.io/v1beta2"
        return self._cluster.kubectl("get", "--raw", path, check=False).returncode == 0
