"""The blocks of docs/notebook.md, in their order, as cells of one notebook, with a played kubelet."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_client.errors import ClientError, Exit
from finetune_client.jobs import Job, Jobs
from finetune_devcluster.cluster import DevCluster
from finetune_operator.desired.names import PREFLIGHT, TRAINER
from finetune_test_operator.jobs import Outcomes
from finetune_test_operator.operator_process import CHECKOUT, OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.reporter import Reporter

CELLS = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/notebook.md").read_text(), re.DOTALL)


@pytest.mark.cluster
def test_the_cells_work(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Outcomes, users: Any,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    submit, refused, follow, again, results, steer = (
        cell.replace('namespace="team"', f'namespace="{jobs.namespace}"') for cell in CELLS
    )
    monkeypatch.setenv("KUBECONFIG", str(users.owner()))
    names: dict[str, Any] = {}

    def run(cell: str) -> str:
        exec(cell, names)
        return capsys.readouterr().out

    run(submit)
    assert repr(names["job"]) == f"Job({jobs.namespace}/support-bot)"
    assert "sauce" in run(refused)

    def play() -> None:
        checked = kubelet.wait_for_pod("support-bot", component=PREFLIGHT)
        kubelet.run(checked)
        kubelet.end(checked, 0, _placed(outcomes.checked))
        trainer = kubelet.wait_for_pod("support-bot", component=TRAINER)
        kubelet.run(trainer)
        jobs.wait_for_phase("support-bot", "Running")

        reporter = Reporter(operator, jobs)
        token = reporter.own_token(trainer, "support-bot")
        assert reporter.post("support-bot", token, 1, step=8, totalSteps=20, loss=1.5) == 202
        wait_for(lambda: jobs.get("support-bot")["status"].get("progress", {}).get("step") == 8, "progress", 30)
        time.sleep(3)  # follow looks every 2 s
        kubelet.end(trainer, 0, _placed(outcomes.success))

    node = threading.Thread(target=play, daemon=True)
    node.start()
    shown = run(follow)
    node.join(60)

    assert (8, 1.5) in names["curve"], shown
    assert re.search(r"^Running .* 40 %  step 8/20  loss 1\.5000  1m15s$", shown, re.MULTILINE), shown
    assert shown.splitlines()[-1].startswith("Succeeded")
    assert run(again) == "Succeeded Completed\n"
    assert run(results).split()[0] == "Adapter"

    assert "('patient-bot', " in run(steer)
    wait_for(lambda: not jobs.exists("patient-bot"), "the end of patient-bot", 30)


def _placed(outcome: Any) -> str:
    """What a pod says of results in the bucket of the page."""
    return str(outcome.encode()).replace("s3://results/<namespace>/", "s3://acme-models/support-bot/<namespace>/")


class Answers:
    """Stands in for a cluster that gives these answers, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)

    def get_job(self, name: str) -> Any:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def a_job(phase: str, uid: str = "1", **status: Any) -> Any:
    return {"metadata": {"name": "bot", "namespace": "team", "uid": uid}, "status": {"phase": phase, **status}}


def followed(*answers: Any) -> Job:
    return Job(Answers(*answers), a_job(""))  # type: ignore[arg-type]


def test_an_outage_is_logged_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    away = ClientError("the cluster does not answer", Exit.NO_CLUSTER)
    job = followed(away, away, a_job("Running"), a_job("Running"), away, a_job("Succeeded"))
    assert [row.phase for row in job.follow(interval=0)] == ["Running", "Succeeded"]
    assert caplog.messages == ["the cluster does not answer; asking again"] * 2


def test_a_failure_says_why_and_what_to_do() -> None:
    failure = {"reason": "InvalidRow", "message": "line 2: no messages", "hint": "correct the line"}
    end = a_job("Failed", reason="InvalidRow", failure=failure)
    with pytest.raises(ClientError, match="bot failed with InvalidRow: line 2: no messages; correct the line") as error:
        followed(end, end).wait(interval=0)
    assert error.value.code is Exit.JOB_FAILED


def test_a_job_that_took_the_name_is_not_taken_for_the_one_that_had_it() -> None:
    with pytest.raises(ClientError, match="was deleted, and another one has its name"):
        list(followed(a_job("Running"), a_job("Succeeded", uid="2")).follow(interval=0))
    with pytest.raises(ClientError, match="may not"):  # what is no outage ends it
        list(followed(ClientError("you may not get it", Exit.FORBIDDEN)).follow(interval=0))


@pytest.mark.cluster
def test_a_cluster_that_cannot_be_opened_is_a_sentence(dev_cluster: DevCluster, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="no context nowhere"):
        Jobs.open(kubeconfig=str(dev_cluster.kubeconfig), context="nowhere")
