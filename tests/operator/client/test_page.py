"""The examples of docs/client.md: each command is run on a real API server, and must print what stands there.

Numbers, names of pods and the namespace differ from run to run; words, order and columns must not.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from house import CHECKOUT

from finetune_api.status import FineTuneJobStatus
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster

PAGE = (CHECKOUT / "docs/client.md").read_text()
MANIFEST = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: NAME}
spec:
  model: {source: s3://models/llama-8b/}
  dataset: {source: s3://data/support.jsonl}
  output: {s3: {bucket: results}}
  runPolicy: {preflight: Skip}
"""
RUNNING = {
    "preflight": {
        "result": "Passed", "errors": 0, "warningCount": 1, "rows": 5120, "badRows": 0, "steps": 200,
        "gpu": "NVIDIA-H100-80GB-HBM3", "gpuMemoryBytes": 33_285_996_544, "smallestGpuMemoryBytes": 13_314_398_617,
        "gpuHours": 0.31, "warnings": ["spec.model.maxSequenceLength: 3.1% of the rows are truncated"],
        "reportUri": "s3://results/team-a/support-bot/preflight/report.html",
    },
    "progress": {
        "step": 80, "totalSteps": 200, "percent": 40, "completion": "40%", "loss": 1.2034, "etaSeconds": 750,
        "eta": "12m30s",
    },
    "checkpointStep": 50,
    "usage": {
        "gpuSeconds": 720, "gpuHours": 0.2, "waitingSeconds": 65, "cost": 0.5, "currency": "EUR",
        "energyWattHours": 104.2, "energyMeasuredGpuSeconds": 720, "estimatedGpuSeconds": 1116, "estimatedCost": 0.78,
    },
}  # fmt: skip


def examples() -> list[tuple[str, str]]:
    """Every command of the page's examples, with what stands below it."""
    shown = "\n".join(re.findall(r"```\n(\$ .*?)```", PAGE, re.DOTALL))
    return [(command, text) for command, text in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", shown, re.MULTILINE)]


def shape(text: str, namespace: str) -> list[list[str]]:
    """A text without what differs from run to run."""
    text = re.sub(r"(support-bot|later)-[0-9a-f]{5}-[a-z0-9]{5}", "POD", text.replace(namespace, "team-a"))
    text = re.sub(r"\b0[smhd]\b", "AGE", re.sub(r"[0-9][0-9:,.]*", "0", text))
    return [re.sub("━+", "━", line).split() for line in text.splitlines() if line.strip()]


@pytest.fixture
def scene(
    operator: OperatorProcess, kubelet: PlayedKubelet, jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """What has happened before a command is typed."""
    FineTuneJobStatus.model_validate(RUNNING)
    monkeypatch.chdir(tmp_path)
    for file, name in (("job.yaml", "support-bot"), ("later.yaml", "later")):
        Path(file).write_text(MANIFEST.replace("NAME", name))

    def happen(after: str) -> None:
        if after == "finetune submit job.yaml":
            kubelet.run(kubelet.wait_for_pod("support-bot"))
            jobs.wait_for_phase("support-bot", "Running")
            jobs.set_status("support-bot", RUNNING)
        if after == "finetune submit later.yaml --dry-run":
            jobs.create("later")
            jobs.wait("later", lambda status: status.get("reason") == "Unschedulable", "it waits for a node")

    return happen


def test_every_example_prints_what_stands_on_the_page(
    scene: Callable[[str], None], users: Any, finetune: Any, namespace: str
) -> None:
    me = ("--kubeconfig", users.owner())
    found = examples()
    assert len(found) >= 9
    for command, text in found:
        if command.startswith("finetune watch"):
            continue  # it does not end; test_views.py draws the same board
        said = finetune(*shlex.split(command.removeprefix("kubectl "))[1:], *me)
        assert shape(said.out + said.err, namespace) == shape(text, namespace), f"{command}\n{said.out}{said.err}"
        scene(command)
