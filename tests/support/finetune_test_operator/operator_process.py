"""The operator as a process of its own on a real control plane, under a service account with its documented rights.

For tests of the operator alone; the demo and the end-to-end tests install the chart instead.
"""

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_devcluster.cluster import DevCluster
from finetune_operator.cluster.access import (
    AUTHORITY_RULES,
    CLUSTER_RULES,
    JOB_SET_RULES,
    OWN_RULES,
    QUEUE_RULES,
    RULES,
)
from finetune_operator.desired.names import LEASE_NAME
from finetune_operator.settings import ServiceAccount
from finetune_test_programs.child_process import Program, free_port

CHECKOUT = Path(__file__).parents[3]
NAMESPACE = "operator-under-test"
ACCOUNT = "finetune-operator"
TRAINER_IMAGE = "finetune-trainer:test"


class OperatorProcess:
    """Starts, kills and restarts the operator. Its account and files are made once, in the cluster and in a folder."""

    def __init__(
        self,
        cluster: DevCluster,
        folder: Path,
        *namespaces: str,
        beside: "OperatorProcess | None" = None,
        lease_namespace: str = NAMESPACE,
        kueue: bool = False,
        job_sets: bool = False,
    ) -> None:
        """`namespaces`: serve these only, with rights there and nowhere else (but to review tokens).

        `beside`: another replica of the same installation, under whose address trainers report. `lease_namespace`:
        installations beside each other elect in namespaces of their own. `kueue`, `job_sets`: with rights on them.
        """
        self._rules = (*RULES, *(QUEUE_RULES if kueue else ()), *(JOB_SET_RULES if job_sets else ()))
        self.environment: dict[str, str] = {
            "FINETUNE_KUEUE": "true" if kueue else "false",
            "FINETUNE_JOB_SETS": "true" if job_sets else "false",
        }
        """Further variables of the next process."""

        self._lease_namespace = lease_namespace
        self._cluster = cluster
        self._namespaces = namespaces
        self._account = f"{ACCOUNT}-{namespaces[0]}" if namespaces else ACCOUNT
        self._folder = folder
        self._program: Program | None = None
        self._starts = 0
        self._coordination = client.CoordinationV1Api(cluster.api_client())
        self.progress_port = free_port()
        self.health_port = free_port()
        self.log_format = "text"
        self.code: Path | None = None
        """Folder with another `finetune_operator` to run, such as a mutant; None for the checkout's."""

        self._advertised = beside.progress_url if beside else self.progress_url
        self._prepare()

    @property
    def progress_url(self) -> str:
        """Base URL of this process's progress server."""
        return f"https://127.0.0.1:{self.progress_port}"

    @property
    def log(self) -> str:
        """Log of the newest process."""
        return self._running().log.read_text()

    @property
    def tls_dir(self) -> Path:
        """Folder of the progress server's certificate, as a Secret would be mounted."""
        return self._folder / "tls"

    @property
    def pid(self) -> int:
        """Process id of the newest process."""
        return self._running().process.pid

    @property
    def service_account(self) -> ServiceAccount:
        """Address of the API server, with token and authority of the operator's service account."""
        host, port = self._cluster.api_url.removeprefix("https://").rsplit(":", 1)
        return ServiceAccount(host, int(port), self._folder / "serviceaccount")

    @property
    def api_port(self) -> int:
        """Port of the API server."""
        return self.service_account.port

    @property
    def is_running(self) -> bool:
        """True while the newest process lives."""
        return self._running().process.poll() is None

    @property
    def readiness(self) -> str:
        """Answer of the readiness probe; empty if it fails."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/readyz", timeout=2) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            return ""

    @property
    def is_ready(self) -> bool:
        """True while the readiness probe succeeds."""
        return self.readiness != ""

    @property
    def is_leading(self) -> bool:
        """True while the process is ready and says that it leads."""
        return "leading" in self.readiness

    def start(self, api_port: int | None = None, *, outside: bool = False, follows: bool = False) -> None:
        """Start a process and wait until it is ready.

        `api_port`: port at which it finds the API server instead. `outside`: as on a user's machine, with a kubeconfig.
        `follows`: another process leads; otherwise this one leads at once, though a predecessor was killed.
        """
        if not follows:
            self._remove_lease()
        self._starts += 1
        command = [str(CHECKOUT / ".venv-operator/bin/finetune-operator"), "run"]
        if outside:
            environment = self._environment()
            command += ["--kubeconfig", str(self._write_kubeconfig()), "--context", "operator"]
        else:
            environment = self._environment() | self._pod_environment(api_port or self.api_port)

        log = self._folder / f"operator-{self._starts}.log"
        self._program = Program("operator", command, log, environment)

        deadline = time.monotonic() + 30
        while not (self.is_ready and self.is_leading is not follows):
            self._program.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the operator is not ready after 30 s:\n{self._program.tail()}")
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Send a signal, and do not wait for what it does."""
        self._running().process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of the newest process; returns its exit code."""
        return self._running().process.wait(15)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._running().process.kill()
        self._running().process.wait()

    def stop(self) -> int | None:
        """Send SIGTERM, and SIGKILL after 15 s. Returns the exit code."""
        if self._program is None:
            return None
        self._program.stop(grace=15)
        return self._program.process.returncode

    def tls(self) -> ssl.SSLContext:
        """TLS context of a trainer: it trusts the cluster's authority."""
        return ssl.create_default_context(cafile=str(self._cluster.ca_file))

    def _running(self) -> Program:
        if self._program is None:
            raise RuntimeError("the operator was not started")
        return self._program

    def _remove_lease(self) -> None:
        try:
            self._coordination.delete_namespaced_lease(LEASE_NAME, self._lease_namespace)
        except ApiException as error:
            if error.status != 404:
                raise

    def _environment(self) -> dict[str, str]:
        return (
            {
                "PATH": os.environ["PATH"],
                "PYTHONSAFEPATH": "1",
                "FINETUNE_NAMESPACES": ",".join(self._namespaces),
                "FINETUNE_TRAINER_IMAGE": TRAINER_IMAGE,
                "FINETUNE_PROGRESS_URL": self._advertised,
                "FINETUNE_PROGRESS_PORT": str(self.progress_port),
                "FINETUNE_HEALTH_PORT": str(self.health_port),
                "FINETUNE_TLS_DIR": str(self.tls_dir),
                "FINETUNE_LEASE_NAMESPACE": self._lease_namespace,
                "FINETUNE_LOG_FORMAT": self.log_format,
            }
            | self.environment
            | ({"PYTHONPATH": str(self.code)} if self.code else {})
        )

    def _pod_environment(self, api_port: int) -> dict[str, str]:
        """Variables that only a pod has."""
        return {
            "KUBERNETES_SERVICE_HOST": self.service_account.host,
            "KUBERNETES_SERVICE_PORT": str(api_port),
            "FINETUNE_POD_IP": "127.0.0.1",
            "FINETUNE_SERVICE_ACCOUNT_DIR": str(self.service_account.folder),
        }

    def _write_kubeconfig(self) -> Path:
        """Write a kubeconfig with the service account's own rights; its context is `operator`."""
        folder = self.service_account.folder
        cluster = {"server": self._cluster.api_url, "certificate-authority": str(folder / "ca.crt")}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "dev", "cluster": cluster}],
            "users": [{"name": "operator", "user": {"tokenFile": str(folder / "token")}}],
            "contexts": [{"name": "operator", "context": {"cluster": "dev", "user": "operator"}}],
        }
        path = self._folder / "operator.kubeconfig"
        path.write_text(json.dumps(document))
        return path

    def _prepare(self) -> None:
        self._cluster.kubectl("apply", "--server-side", "-f", str(CHECKOUT / "crds/finetune.dev_finetunejobs.yaml"))
        self._cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(self._account_objects()))

        account, tls = self._folder / "serviceaccount", self.tls_dir
        account.mkdir(parents=True)
        tls.mkdir()
        authority = self._cluster.ca_file.read_text()
        token = self._cluster.kubectl("create", "token", self._account, "-n", NAMESPACE, "--duration=6h").stdout
        (account / "token").write_text(token.strip())
        (account / "ca.crt").write_text(authority)

        certificate, key = self._cluster.serving_certificate("operator-progress", ["127.0.0.1", "localhost"])
        (tls / "tls.crt").write_bytes(certificate.read_bytes())
        (tls / "tls.key").write_bytes(key.read_bytes())
        (tls / "ca.crt").write_text(authority)

    def _account_objects(self) -> dict[str, Any]:
        rbac, kind = "rbac.authorization.k8s.io/v1", "Role" if self._namespaces else "ClusterRole"
        scopes: list[dict[str, str]] = [{"namespace": namespace} for namespace in self._namespaces] or [{}]
        scoped = [{"name": self._account} | scope for scope in scopes]
        rules = [rule.to_wire() for rule in self._rules]
        subject = {"kind": "ServiceAccount", "name": self._account, "namespace": NAMESPACE}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": self._account}
        delegation = {"name": f"{self._account}-token-review"}
        reviewer = reference | {"kind": "ClusterRole", "name": delegation["name"]}
        reviews = [rule.to_wire() for rule in CLUSTER_RULES]
        own = {"name": f"{self._account}-own", "namespace": self._lease_namespace}
        own_rules = [rule.to_wire() for rule in (*OWN_RULES, *AUTHORITY_RULES)]
        own_role = reference | {"kind": "Role", "name": own["name"]}

        return {
            "apiVersion": "v1",
            "kind": "List",
            "items": [
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
                {
                    "apiVersion": "v1",
                    "kind": "ServiceAccount",
                    "metadata": {"name": self._account, "namespace": NAMESPACE},
                },
                *({"apiVersion": rbac, "kind": kind, "metadata": metadata, "rules": rules} for metadata in scoped),
                *(_binding(f"{kind}Binding", metadata, reference, subject) for metadata in scoped),
                {"apiVersion": rbac, "kind": "Role", "metadata": own, "rules": own_rules},
                _binding("RoleBinding", own, own_role, subject),
                {"apiVersion": rbac, "kind": "ClusterRole", "metadata": delegation, "rules": reviews},
                _binding("ClusterRoleBinding", delegation, reviewer, subject),
            ],
        }


def _binding(kind: str, metadata: dict[str, Any], role: dict[str, Any], subject: dict[str, Any]) -> dict[str, Any]:
    version = "rbac.authorization.k8s.io/v1"
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "roleRef": role, "subjects": [subject]}
