"""The commands of docs/quickstart.md, in their order, with a played kubelet.

Installing and downloading are tried by the end-to-end tests; here helm only renders what it would install.
"""

import re
import shlex
from pathlib import Path

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import PREFLIGHT, TRAINER
from finetune_test_operator.jobs import Jobs, Outcomes
from finetune_test_operator.operator_process import CHECKOUT, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster
PAGE = (CHECKOUT / "docs/quickstart.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]


def test_the_commands_work(
    operator: OperatorProcess,
    dev_cluster: DevCluster,
    jobs: Jobs,
    kubelet: PlayedKubelet,
    outcomes: Outcomes,
    namespace: str,
    tmp_path: Path,
) -> None:
    (install,), (secret,), (apply, get, wait), (download,) = (block.strip().splitlines() for block in BLOCKS)
    chart = str(CHECKOUT / "charts")
    words = shlex.split(install.replace("charts", chart, 1).replace("upgrade --install", "template"))[1:]
    assert "registry.example.com/finetune-operator:" in dev_cluster.helm(*words, "--kube-version=1.31.0").stdout

    def run(command: str) -> str:
        program, *words = shlex.split(command)
        assert program == "kubectl"
        return dev_cluster.kubectl(*words, "-n", namespace).stdout

    manifest = tmp_path / "job.yaml"
    manifest.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    assert "created" in run(secret)
    assert "created" in run(apply.replace("job.yaml", str(manifest)))
    for component, outcome in ((PREFLIGHT, outcomes.checked), (TRAINER, outcomes.success)):
        pod = kubelet.wait_for_pod("support-bot", component=component)
        kubelet.run(pod)
        place = "s3://acme-models/support-bot/<namespace>/"
        kubelet.end(pod, 0, outcome.encode().replace("s3://results/<namespace>/", place))
    assert "condition met" in run(wait)
    assert "Succeeded" in run(get.replace("--watch", ""))
    assert download.split()[:3] == ["finetune", "artifacts", "support-bot"]
