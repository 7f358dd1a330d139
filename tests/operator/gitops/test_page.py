"""The page docs/gitops.md: its commands work, and its table is what the judges say."""

import re
import shlex
from pathlib import Path

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.jobs import Outcomes
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet
from finetune_test_operator.situations import all_statuses, as_object
from finetune_test_programs.gitops_judges import GITOPS, health_script, judge

CHECKOUT = GITOPS.parents[1]
PAGE = (CHECKOUT / "docs/gitops.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
ROWS = {
    "was not looked at yet": None,
    "goes on by itself": "it passes: the trainer trains",
    "needs a person": "somebody mends it: an image is missing",
    "is suspended": "suspended, after the checks",
    "has failed": "the checks refuse it: bad data",
    "has succeeded": "it passes: it has succeeded",
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_says_what_the_judges_say(row: str) -> None:
    situation = ROWS[row]
    status = {"observedGeneration": -1} if situation is None else all_statuses()[situation].to_wire()
    (answer,) = judge([as_object(status)], health=health_script())
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
    conditions = {each["type"]: each["status"] for each in status.get("conditions", [])}
    cells = [conditions.get(kind, "absent") for kind in ("Ready", "Reconciling", "Stalled")]
    cells += [answer["kstatus"]["status"], answer["argo"]["status"]]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == cells


def _run(cluster: DevCluster, command: str) -> str:
    """Run a command of the page as a user in the checkout would."""
    program, *words = shlex.split(command)
    assert program == "kubectl"
    words = [str(CHECKOUT / word) if word.startswith("crds/") else word for word in words]
    return cluster.kubectl(*words).stdout


@pytest.mark.cluster
def test_the_commands_work(operator: OperatorProcess, dev_cluster: DevCluster, tmp_path: Path) -> None:
    patch, apply, wait, get, delete = COMMANDS
    for name in ("argocd", "ml"):
        dev_cluster.kubectl("create", "namespace", name)
    dev_cluster.kubectl("-n", "argocd", "create", "configmap", "argocd-cm")
    try:
        assert "patched" in _run(dev_cluster, patch)
        assert "created" in _run(dev_cluster, apply)
        kubelet = PlayedKubelet(dev_cluster, "ml")
        pod = kubelet.wait_for_pod("support-bot-pull-request", component="preflight")
        kubelet.run(pod)
        said = Outcomes.checked.encode().replace(
            "s3://results/<namespace>/", "s3://acme-models/support-bot/<namespace>/"
        )
        kubelet.end(pod, 0, said)
        assert "condition met" in _run(dev_cluster, wait)
        assert '"result":"Passed"' in _run(dev_cluster, get)
        assert "deleted" in _run(dev_cluster, delete)
    finally:
        for name in ("argocd", "ml"):
            dev_cluster.kubectl("delete", "namespace", name, "--wait=false")
