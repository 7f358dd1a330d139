"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler as local processes on loopback, in a temporary
folder.

Nothing about the API is imitated: CEL, server-side apply, the Job controller, garbage collection, the Node authorizer
and TokenReview are the real ones. What is tuned is durability (etcd does not fsync) and how fast controllers notice a
lost node.
"""

import ssl
import time
import urllib.request
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from finetune_devcluster.audit import audit_flags
from finetune_test_programs.child_process import Program, free_port
from finetune_test_servers.certificates import Authority, KeyPair

SERVICE_RANGE = "10.96.0.0/16"
ISSUER = "https://kubernetes.default.svc.cluster.local"
NODE_GRACE_SECONDS = 20


class ReadyCheck:
    """Asks the API server's /readyz; true once it answers 200."""

    def __init__(self, url: str, authority: Authority, client: KeyPair) -> None:
        self._url = url
        self._context = ssl.create_default_context(cafile=str(authority.ca.certificate))
        self._context.load_cert_chain(client.certificate, client.key)

    def __call__(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/readyz", context=self._context, timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False


class ControlPlane:
    """The four programs. `start` returns when the API server is ready; `stop` ends them in reverse order."""

    def __init__(self, kube: Path, folder: Path, authority: Authority) -> None:
        self._kube = str(kube)
        self._folder = folder
        self._authority = authority
        self._programs: list[Program] = []
        self.port = free_port()
        self.api_url = f"https://127.0.0.1:{self.port}"

    def start(self, admin: Path, ready: ReadyCheck) -> None:
        """Start everything and wait until the API answers, as `ready` tells. `admin` is a kubeconfig of the group
        system:masters."""
        (self._folder / "logs").mkdir(exist_ok=True)
        etcd = self._start_etcd()

        self._start_api_server(etcd)
        self._wait(ready)
        self._start_controller_manager(admin)
        self._start_scheduler(admin)

    def stop(self) -> None:
        """Stop every program that runs."""
        while self._programs:
            self._programs.pop().stop()

    def check(self) -> None:
        """Raise RuntimeError with the end of its log if a program has ended."""
        for program in self._programs:
            program.check()

    def _wait(self, ready: ReadyCheck, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"kube-apiserver was not ready after {timeout} s:\n{self._programs[-1].tail()}")
            time.sleep(0.1)

    def _run(self, name: str, *flags: str) -> None:
        command = [self._kube, name, *flags]
        self._programs.append(Program(name, command, self._folder / "logs" / f"{name}.log"))

    def _start_etcd(self) -> str:
        url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))

        self._run(
            "etcd",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )
        return url

    def _start_api_server(self, etcd: str) -> None:
        hosts = ("127.0.0.1", "localhost", "kubernetes.default.svc", "10.96.0.1")
        serving = self._authority.server("apiserver", "kube-apiserver", hosts)
        kubelet_client = self._authority.client("kubelet-client", "kube-apiserver", ("system:masters",))
        tokens = self._service_account_keys()
        ca = self._authority.ca.certificate

        self._run(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={ca}",
            f"--kubelet-client-certificate={kubelet_client.certificate}",
            f"--kubelet-client-key={kubelet_client.key}",
            f"--kubelet-certificate-authority={ca}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={tokens.certificate}",
            f"--service-account-signing-key-file={tokens.key}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=Node,RBAC",
            # The second is what asks for the right on finetunejobs/finalizers, as OpenShift does.
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
            "--endpoint-reconciler-type=none",
            "--shutdown-delay-duration=0",
            *self._aggregation_flags(),
            *audit_flags(self._folder),
        )

    def _aggregation_flags(self) -> list[str]:
        """Flags by which servers of further APIs, such as Kueue's visibility, know that it is this one that asks."""
        proxy = self._authority.client("front-proxy", "front-proxy")
        return [
            f"--proxy-client-cert-file={proxy.certificate}",
            f"--proxy-client-key-file={proxy.key}",
            f"--requestheader-client-ca-file={self._authority.ca.certificate}",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        ]

    def _start_controller_manager(self, admin: Path) -> None:
        ca = self._authority.ca

        self._run(
            "kube-controller-manager",
            f"--kubeconfig={admin}",
            f"--authentication-kubeconfig={admin}",
            f"--authorization-kubeconfig={admin}",
            f"--root-ca-file={ca.certificate}",
            f"--cluster-signing-cert-file={ca.certificate}",
            f"--cluster-signing-key-file={ca.key}",
            f"--service-account-private-key-file={self._folder / 'certificates/service-accounts.key'}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={free_port()}",
            f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
            "--node-monitor-period=2s",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        )

    def _start_scheduler(self, admin: Path) -> None:
        self._run(
            "kube-scheduler",
            f"--kubeconfig={admin}",
            f"--authentication-kubeconfig={admin}",
            f"--authorization-kubeconfig={admin}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={free_port()}",
        )

    def _service_account_keys(self) -> KeyPair:
        """RSA pair that signs service-account tokens; its public half is in the `certificate` file."""
        folder = self._folder / "certificates"
        pair = KeyPair(folder / "service-accounts.pub", folder / "service-accounts.key")
        key = rsa.generate_private_key(65537, 2048)

        encoding = serialization.Encoding.PEM
        pair.certificate.write_bytes(
            key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        pair.key.touch(mode=0o600)
        pair.key.write_bytes(
            key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return pair
