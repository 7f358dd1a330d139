"""A Node whose pods are local processes: what tests and the demo start, and what they tell it to do wrong.

The node is a program of its own, so that it can be lost (killed, its pods with it) and cut off (stopped, its pods
live on).
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.process_node.kubelet import KubeletConfig
from finetune_test_programs.child_process import die_with_parent

START_SECONDS = 20.0


@dataclass(frozen=True)
class NodeOptions:
    """`images` maps the last part of an image's name, without tag, to the folder of its programs."""

    images: dict[str, Path]
    name: str = "process-node"
    capacity: dict[str, str] = field(
        default_factory=lambda: {
            "cpu": "16", "memory": "64Gi", "ephemeral-storage": "200Gi", "pods": "110", "nvidia.com/gpu": "1"}
    )  # fmt: skip


class ProcessNode:
    """A running node; made by `ProcessNode.start`."""

    def __init__(self, config: KubeletConfig) -> None:
        self._config = config
        self.log = Path(config.folder) / "node.log"
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    @contextmanager
    def start(cls, cluster: DevCluster, options: NodeOptions) -> Iterator[Self]:
        """Start a node of `cluster`, and stop it with all its pods' processes at the end."""
        folder = cluster.folder / f"node-{options.name}"
        folder.mkdir()

        certificate, key = cluster.serving_certificate(options.name, ["127.0.0.1"])

        node = cls(
            KubeletConfig(
                name=options.name,
                kubeconfig=str(cluster.user_kubeconfig(f"system:node:{options.name}", ["system:nodes"])),
                folder=str(folder),
                ca_file=str(cluster.ca_file),
                certificate=str(certificate),
                key=str(key),
                images={name: str(path) for name, path in options.images.items()},
                capacity=options.capacity,
            )
        )
        node.restore()

        try:
            yield node
        finally:
            node.lose()
            client.CoreV1Api(cluster.api_client()).delete_node(options.name)

    def restore(self) -> None:
        """Start the node program; returns when it is registered."""
        command = [sys.executable, "-m", "finetune_devcluster.process_node", json.dumps(asdict(self._config))]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                preexec_fn=die_with_parent)  # fmt: skip
        self._answer("ready")

    def lose(self) -> None:
        """Kill the node program; the kernel kills its pods' processes with it. Nothing is reported to the cluster."""
        if self._process:
            with self._process:  # closes its pipes and waits
                self._process.kill()

    def cut_off(self) -> None:
        """Stop the program: no heartbeat, no status, while the pods' processes live on."""
        self._running().send_signal(signal.SIGSTOP)

    def reconnect(self) -> None:
        """Let a program that was cut off go on."""
        self._running().send_signal(signal.SIGCONT)

    def never_start_pods(self, on: bool = True) -> None:
        """Hold new pods before their volumes are made."""
        self._tell(verb="never-start", on=on)

    def break_image(self, image: str, on: bool = True) -> None:
        """Fail to pull an image."""
        self._tell(verb="break-image", image=image, on=on)

    def evict(self, pod_uid: str) -> None:
        """Evict a pod as a kubelet does whose node runs out of memory."""
        self._tell(verb="evict", uid=pod_uid)

    def kill_out_of_memory(self, pod_uid: str) -> None:
        """End a pod's containers as the kernel's OOM killer does."""
        self._tell(verb="out-of-memory", uid=pod_uid)

    def _running(self) -> subprocess.Popen[str]:
        assert self._process
        return self._process

    def _tell(self, **command: str | bool) -> None:
        process = self._running()
        assert process.stdin
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        if error := json.loads(self._answer()).get("error"):
            raise RuntimeError(f"process node: {error}")

    def _answer(self, expected: str = "") -> str:
        """The next line of the program; a program that does not answer is killed, so that nothing waits for ever."""
        process = self._running()
        assert process.stdout

        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline().strip()
        finally:
            watchdog.cancel()

        if not line or (expected and line != expected):
            raise RuntimeError(f"the process node did not answer:\n{self.log.read_text()[-3000:]}")
        return line
