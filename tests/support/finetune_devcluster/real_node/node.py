"""A real node of the dev cluster: kubelet, containerd and runc, in namespaces of their own, with images of our store.

Needs root and Debian's containerd, runc, iptables and containernetworking-plugins. The kubelet is that of the dev
cluster's binary. Nothing is left of it: processes and mounts go with the namespaces, its control groups are removed.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.real_node.network import DNS, GATEWAY, cni_configuration
from finetune_images.local_store import buildah
from finetune_test_programs.binaries import kube_binary
from finetune_test_programs.child_process import Program, free_port

MACHINE = Path(__file__).parent / "machine.sh"
PAUSE = "localhost/pause:1"
PAUSE_SOURCE = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
GROUPS = Path("/sys/fs/cgroup")
PROGRAMS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
}
"""What a node runs, and the package of Debian that has it."""


class RealNode:
    """A running node; made by `RealNode.start`."""

    name = "real-node"

    def __init__(self, cluster: DevCluster, folder: Path) -> None:
        self._cluster = cluster
        self._core = client.CoreV1Api(cluster.api_client())
        self._program: Program | None = None
        self._started = 0.0
        self.folder = folder

    @classmethod
    @contextmanager
    def start(cls, cluster: DevCluster, images: list[str]) -> Iterator[Self]:
        """Start a node that has the images of these names, and stop it with everything on it."""
        folder = Path(tempfile.mkdtemp(prefix="finetune-node-"))
        node = cls(cluster, folder)
        try:
            node._prepare(images)
            node.switch_on(timeout=600)
            yield node
        finally:
            node.switch_off()
            _remove_groups(node._group)
            shutil.rmtree(folder)

    def switch_on(self, timeout: float = 120) -> None:
        """Start the machine; returns when the node is ready."""
        machine = ["unshare", "--mount", "--pid", "--fork", "--kill-child", str(MACHINE)]
        command = [*machine, str(self.folder), str(kube_binary()), self.name, GATEWAY]
        self._started = time.time()
        self._program = Program("node", command, self.folder / "machine.log")
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            self._program.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the node is not ready after {timeout:g} s:\n{self.log()}")
            time.sleep(0.5)

    def switch_off(self) -> None:
        """Take the machine's power: no program on it has time to say anything."""
        if self._program is not None:
            self._program.process.kill()
            self._program.process.wait()

    def log(self, characters: int = 3000) -> str:
        """The end of its programs' logs."""
        logs = [self.folder / "machine.log", *sorted((self.folder / "log").glob("*.log"))]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-characters:]}" for path in logs)

    @property
    def _group(self) -> str:
        return self.folder.name

    def _is_ready(self) -> bool:
        """True once the kubelet of this start says so: an old word may still be there."""
        nodes: list[Any] = self._core.list_node().items
        for node in nodes:
            ready = next((each for each in node.status.conditions or [] if each.type == "Ready"), None)
            if node.metadata.name == self.name and ready and ready.status == "True":
                return bool(ready.last_heartbeat_time.timestamp() > self._started)
        return False

    def _prepare(self, images: list[str]) -> None:
        if missing := [package for program, package in PROGRAMS.items() if shutil.which(program) is None]:
            needed = " ".join(dict.fromkeys(missing))
            raise RuntimeError(f"a real node needs programs that this machine lacks: `apt-get install {needed}`")
        for name in ("images", "cni-conf", "log"):
            (self.folder / name).mkdir()
        configuration = cni_configuration("/var/lib/cni/networks")
        (self.folder / "cni-conf/10-finetune.conflist").write_text(json.dumps(configuration))
        (self.folder / "containerd.toml").write_text(_containerd_configuration(self.folder))
        (self.folder / "kubelet.json").write_text(json.dumps(self._kubelet_configuration()))
        kubeconfig = self._cluster.user_kubeconfig(f"system:node:{self.name}", ["system:nodes"])
        shutil.copy(kubeconfig, self.folder / "kubelet.kubeconfig")

        _ensure_pause_image()
        for number, image in enumerate([PAUSE, *images]):
            buildah("push", "--quiet", image, f"docker-archive:{self.folder}/images/{number}.tar:{image}", capture=True)
        _make_groups(self._group)

    def _kubelet_configuration(self) -> dict[str, Any]:
        certificate, key = self._cluster.serving_certificate(self.name, [GATEWAY])
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": GATEWAY,
            "port": free_port(),
            "healthzPort": free_port(),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self._cluster.ca_file)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "containerRuntimeEndpoint": f"unix://{self.folder}/containerd.sock",
            "clusterDNS": [DNS],
            "clusterDomain": "cluster.local",
            "volumePluginDir": str(self.folder / "plugins"),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._group}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1Mi"},
            "nodeStatusUpdateFrequency": "2s",
            "nodeStatusReportFrequency": "10s",
        }


def _containerd_configuration(folder: Path) -> str:
    return f"""version = 2
root = "{folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true  # runc may not lower it everywhere
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{folder}/cni-conf"
"""


def _ensure_pause_image() -> None:
    """Make the image of the container that holds a pod's network; a static program and nothing else."""
    if buildah("images", "--quiet", "--filter", f"reference={PAUSE}", capture=True):
        return
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pause"
        command = ["gcc", "-static", "-Os", "-x", "c", "-o", str(program), "-"]
        subprocess.run(command, input=PAUSE_SOURCE, text=True, check=True)
        container = buildah("from", "scratch", capture=True)
        buildah("add", "--quiet", container, program, "/pause", capture=True)
        buildah("config", "--entrypoint", '["/pause"]', "--user", "65532", container)
        buildah("commit", "--quiet", "--rm", container, PAUSE, capture=True)


def _hierarchies() -> list[Path]:
    """Roots of the control groups: one of version 2, or one for each controller of version 1."""
    if (GROUPS / "cgroup.controllers").exists():
        return [GROUPS]
    return [path for path in GROUPS.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink()]


def _make_groups(name: str) -> None:
    for root in _hierarchies():
        (root / name).mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # which version 1 does not inherit
            if (root / setting).exists():
                with suppress(OSError):
                    (root / name / setting).write_text((root / setting).read_text())


def _remove_groups(name: str, timeout: float = 20) -> None:
    """Remove a node's control groups, innermost first, once the kernel has done with who was in them."""
    deadline = time.monotonic() + timeout
    while left := [path / name for path in _hierarchies() if (path / name).exists()]:
        for root in left:
            groups = [path for path in root.rglob("*") if path.is_dir()]
            for path in [*sorted(groups, key=lambda each: -len(each.parts)), root]:
                with suppress(OSError):
                    path.rmdir()
        if time.monotonic() > deadline:
            raise TimeoutError(f"the node's control groups are still in use: {left}")
        time.sleep(0.2)
