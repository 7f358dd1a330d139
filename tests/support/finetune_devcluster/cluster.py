"""A Kubernetes cluster for tests and the demo: started here in seconds, or an existing one.

    with DevCluster.start() as cluster:
        cluster.kubectl("get", "namespaces")

`FINETUNE_DEV_KUBECONFIG` (or `ClusterOptions.kubeconfig`) names an existing cluster, such as kind's, to use instead.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kubernetes import client, config

from finetune_devcluster.control_plane import ControlPlane, ReadyCheck
from finetune_test_programs.binaries import helm_binary, kube_binary
from finetune_test_servers.certificates import Authority, KeyPair

FOLDER_PREFIX = "finetune-devcluster-"


@dataclass(frozen=True)
class ClusterOptions:
    """Choice of a cluster: a new one (None), or the existing one of a kubeconfig."""

    kubeconfig: Path | None = None


@dataclass(frozen=True)
class DevCluster:
    """A running cluster. `folder` holds logs, certificates and whatever else lives as long as the cluster."""

    folder: Path
    kubeconfig: Path
    api_url: str
    ca_file: Path
    authority: Authority | None
    """None for an existing cluster, whose certificates are not ours to sign."""

    @classmethod
    @contextmanager
    def start(cls, options: ClusterOptions | None = None) -> Iterator[Self]:
        """Start a cluster (or attach to one), and stop it at the end."""
        existing = (options or ClusterOptions()).kubeconfig or os.environ.get("FINETUNE_DEV_KUBECONFIG")
        _remove_stale_folders()
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))

        try:
            if existing:
                yield cls._attach(Path(existing), folder)
            else:
                with cls._started(folder) as cluster:
                    yield cluster
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def _attach(cls, kubeconfig: Path, folder: Path) -> Self:
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
        return cls(folder, kubeconfig, str(settings.host), Path(str(settings.ssl_ca_cert)), None)

    @classmethod
    @contextmanager
    def _started(cls, folder: Path) -> Iterator[Self]:
        kube = kube_binary()
        authority = Authority.create(folder / "certificates")
        plane = ControlPlane(kube, folder, authority)
        cluster = cls(folder, folder / "admin.kubeconfig", plane.api_url, authority.ca.certificate, authority)
        admin = authority.client("admin", "devcluster-admin", ("system:masters",))
        cluster._write_kubeconfig(cluster.kubeconfig, "admin", admin)

        try:
            plane.start(cluster.kubeconfig, ReadyCheck(plane.api_url, authority, admin))
            cluster._wait_for_default_service_account(plane)
            yield cluster
        finally:
            plane.stop()

    def api_client(self) -> client.ApiClient:
        """The Kubernetes client, as cluster administrator."""
        settings = client.Configuration()
        config.load_kube_config(str(self.kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
        return client.ApiClient(settings)

    def user_kubeconfig(self, name: str, groups: tuple[str, ...] | list[str] = ()) -> Path:
        """Kubeconfig of another user, such as system:node:NAME of group system:nodes."""
        file = name.replace(":", "-")
        path = self.folder / f"{file}.kubeconfig"
        self._write_kubeconfig(path, name, self._own_authority().client(file, name, tuple(groups)))
        return path

    def serving_certificate(self, name: str, hosts: list[str] | tuple[str, ...]) -> tuple[Path, Path]:
        """Certificate and key of an HTTPS server that the API server is to trust."""
        pair = self._own_authority().server(f"serving-{name}", name, tuple(hosts))
        return pair.certificate, pair.key

    def wait_for_definition(self, name: str = "finetunejobs.finetune.dev", seconds: float = 20.0) -> None:
        """Wait until the API server serves a custom resource. Raises TimeoutError.

        `kubectl wait` fails at once for a definition that has no conditions yet, and so does `kubectl get` with a
        path through them.
        """
        deadline, path = time.monotonic() + seconds, "jsonpath={.status.conditions[?(@.type=='Established')].status}"
        while self.kubectl("get", "crd", name, "-o", path, check=False).stdout != "True":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} is not served after {seconds:g} s")
            time.sleep(0.1)

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator; a failure raises with what kubectl said."""
        return self._run([str(kube_binary()), "kubectl", *arguments], stdin, check)

    def helm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run helm as administrator; a failure raises with what helm said."""
        return self._run([str(helm_binary()), *arguments], None, check)

    def _run(self, command: list[str], text: str | None, check: bool) -> subprocess.CompletedProcess[str]:
        home = self.folder / "home"  # reads and writes nothing in the user's own
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig), "HOME": str(home)}

        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def _own_authority(self) -> Authority:
        if self.authority is None:
            raise RuntimeError("certificates of an existing cluster cannot be signed here: start a cluster instead")
        return self.authority

    def _write_kubeconfig(self, path: Path, user: str, pair: KeyPair) -> None:
        document: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "dev", "cluster": {"server": self.api_url, "certificate-authority": str(self.ca_file)}}
            ],
            "users": [
                {"name": user, "user": {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}}
            ],
            "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": user}}],
            "current-context": "dev",
        }
        path.write_text(json.dumps(document))

    def _wait_for_default_service_account(self, plane: ControlPlane, timeout: float = 60) -> None:
        """Wait for the last object that a new cluster creates; pods cannot be created earlier."""
        core = client.CoreV1Api(self.api_client())

        deadline = time.monotonic() + timeout
        while not core.list_namespaced_service_account("default").items:
            plane.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no default service account after {timeout} s")
            time.sleep(0.1)


def _remove_stale_folders() -> None:
    """Remove the folders of owners that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        owner = folder.name.removeprefix(FOLDER_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
