"""The pods of a job on several nodes as processes of this machine, with arguments and environment of their manifest."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.job import ObjectMeta
from finetune_api.outcome import Outcome
from finetune_api.run_config import RunConfig
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.peers import RENDEZVOUS_PORT
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_trainer.job.settings import CPU_RANKS
from finetune_trainer.training.metrics_log import METRICS_FILE, MetricLine

METADATA = ObjectMeta(name="tiny", namespace="default", uid="uid-1")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class NodePod:
    """One pod of an attempt."""

    process: subprocess.Popen[bytes]
    folder: Path

    def end(self, seconds: float = 240) -> int:
        """Waits for its end; returns its exit code."""
        return self.process.wait(seconds)

    @property
    def outcome(self) -> Outcome:
        """Its termination message."""
        return Outcome.decode((self.folder / "termination").read_text())

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / "log").read_text()

    @property
    def curve(self) -> dict[str, dict[int, float]]:
        """What it has measured: losses, evaluations and norms, by step."""
        lines = (self.folder / "work/metrics" / METRICS_FILE).read_text().splitlines()
        found = [MetricLine.model_validate_json(line) for line in lines]
        names = {"losses": "loss", "evaluations": "eval_loss", "norms": "grad_norm"}
        return {
            kind: {line.step: getattr(line, name) for line in found if getattr(line, name) is not None}
            for kind, name in names.items()
        }


@dataclass
class NodeJob:
    """A job on `nodes` nodes; attempts of it share what is in S3."""

    config: RunConfig
    folder: Path
    credentials: Path
    nodes: int
    ranks: int = 1
    """Processes of each pod."""
    port: int = field(default_factory=free_port)
    hosts: tuple[str, ...] | None = None
    """Names that DNS knows; None: those of all pods."""

    @contextmanager
    def attempt(
        self, name: str, indexes: tuple[int, ...] | None = None, fault: str = "", fault_at: int | None = None
    ) -> Iterator[list[NodePod]]:
        """Starts the pods of one attempt; kills what is left of them at the end. `fault_at`: the only pod with the
        fault."""
        chosen = range(self.nodes) if indexes is None else indexes
        pods = [self.start(name, index, fault if fault_at in (None, index) else "") for index in chosen]
        try:
            yield pods
        finally:
            for pod in pods:
                pod.process.kill()
                pod.process.wait()

    def start(self, attempt: str, index: int, fault: str = "") -> NodePod:
        """Starts the pod of one index."""
        folder = self.folder / attempt / str(index)
        (folder / "work").mkdir(parents=True)
        manifest = self._manifest()
        environment, command = self._environment(manifest, index, folder, f"{attempt}-{index}"), _command(manifest)

        (folder / "run_config.yaml").write_text(self.config.model_copy(update={"nodes": self.nodes}).to_yaml())
        (folder / "credentials").mkdir()
        (folder / "credentials/output").symlink_to(self.credentials)
        program = [
            sys.executable,
            "-P",
            "-m",
            "finetune_test_models.ranks.node_pod",
            *command,
            *([fault] * bool(fault)),
        ]
        with (folder / "log").open("wb") as log:
            return NodePod(subprocess.Popen(program, env=environment, stderr=log, stdout=log), folder)

    def _manifest(self) -> dict[str, object]:
        sections = {
            "model": {"source": "s3://models/tiny/"},
            "dataset": {"source": "s3://data/chat.jsonl"},
            "output": {"s3": {"bucket": "results", "credentials": {"secretName": "s3"}}},
            "resources": {"nodes": self.nodes, "gpus": 0},
            "training": {"batchSize": self.nodes * self.ranks},
        }
        return build_trainer_job(METADATA, FineTuneJobSpec.model_validate(sections), "trainer:1", "config")

    def _environment(self, manifest: dict[str, object], index: int, folder: Path, uid: str) -> dict[str, str]:
        """The container's, with its paths in `folder`, and what kubelet and Job controller add."""
        name, spec = manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]  # type: ignore[index]
        mapped = {
            "/etc/finetune/run_config.yaml": str(folder / "run_config.yaml"),
            "/workspace": str(folder / "work"),
            "/dev/termination-log": str(folder / "termination"),
            "/var/run/finetune/credentials": str(folder / "credentials"),
        }
        values = {
            each["name"]: mapped.get(each["value"], each["value"]).replace("/workspace/", f"{folder}/work/")
            for each in spec["containers"][0]["env"]
            if "value" in each
        }
        hosts = [f"{name}-{index}.{spec.get('subdomain')}" for index in range(self.nodes)]
        if "FINETUNE_RENDEZVOUS" in values:
            host, _, port = values["FINETUNE_RENDEZVOUS"].rpartition(":")
            assert (host, int(port)) == (hosts[0], RENDEZVOUS_PORT)
            values["FINETUNE_RENDEZVOUS"] = f"{host}:{self.port}"  # tests run side by side
        added = {
            "FINETUNE_ATTEMPT_ID": uid,
            "TEST_HOSTS": ",".join(hosts if self.hosts is None else self.hosts),
            "GLOO_SOCKET_IFNAME": "lo",
            CPU_RANKS: str(self.ranks),
            "OMP_NUM_THREADS": "1",
        }
        if manifest["spec"].get("completionMode") == "Indexed":  # type: ignore[attr-defined]
            added["JOB_COMPLETION_INDEX"] = str(index)
        return os.environ | values | added


def _command(manifest: dict[str, object]) -> list[str]:
    return list(manifest["spec"]["template"]["spec"]["containers"][0]["command"])  # type: ignore[index]
