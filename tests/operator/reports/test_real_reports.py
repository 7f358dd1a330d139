"""Progress reports against the real TokenReview: what a trainer may say, and what an intruder may not."""

from typing import Any

import pytest

from finetune_api.progress import token_audience
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for
from finetune_test_operator.reporter import Reporter

pytestmark = pytest.mark.cluster


def test_reports_become_progress(jobs: Any, kubelet: PlayedKubelet, reporter: Reporter, outcomes: Any) -> None:
    jobs.create("told")
    pod = kubelet.wait_for_pod("told")
    kubelet.run(pod)
    token = reporter.own_token(pod, "told")

    assert reporter.post("told", token, 1, step=3, totalSteps=20, loss=1.5, resolved={"rows": 40}) == 202
    status = jobs.wait("told", lambda s: s.get("progress", {}).get("step") == 3, "step 3", 3)["status"]
    assert status["phase"] == "Running"
    assert status["progress"]["eta"] == "1m15s"
    assert status["progress"]["completion"] == "40%"
    assert status["resolved"]["rows"] == 40

    assert reporter.post("told", token, 2, stage="Uploading") == 202
    jobs.wait_for_phase("told", "Uploading", 3)

    kubelet.end(pod, 0, outcomes.success.encode())
    done = jobs.wait_for_phase("told", "Succeeded")["status"]
    assert done["progress"]["sequence"] == 2
    assert done["stages"][0]["endTime"] >= done["stages"][0]["startTime"]
    assert "eta" not in done["progress"]
    assert {"Started", "Training", "Uploading", "Succeeded"} <= set(jobs.event_reasons("told"))


def test_reports_of_one_stage_share_a_status_write(jobs: Any, kubelet: PlayedKubelet, reporter: Reporter) -> None:
    jobs.create("busy")
    pod = kubelet.wait_for_pod("busy")
    kubelet.run(pod)
    token = reporter.own_token(pod, "busy")
    assert reporter.post("busy", token, 1, step=1) == 202
    jobs.wait("busy", lambda s: s.get("progress", {}).get("step") == 1, "step 1", 3)
    before = jobs.get("busy")["metadata"]["resourceVersion"]
    for number in range(2, 12):
        assert reporter.post("busy", token, number, step=number) == 202
    jobs.wait("busy", lambda s: s["progress"]["step"] == 11, "step 11", 15)
    assert [event["object"]["status"]["progress"]["step"] for event in jobs.events_since(before, "busy")] == [11]


def test_forged_replayed_oversized_and_late_reports_are_refused(
    jobs: Any, kubelet: PlayedKubelet, reporter: Reporter, outcomes: Any
) -> None:
    jobs.create("victim")
    jobs.create("other")
    pod, foreign = kubelet.wait_for_pod("victim"), kubelet.wait_for_pod("other")
    kubelet.run(pod)
    kubelet.run(foreign)
    good = reporter.own_token(pod, "victim")
    audience = token_audience(jobs.get("victim")["metadata"]["uid"])

    assert reporter.post("victim", "forged", 1) == 401
    assert reporter.post("victim", reporter.token(pod, "https://kubernetes.default.svc"), 1) == 401
    assert reporter.post("victim", reporter.own_token(foreign, "other"), 1) == 401
    assert reporter.post("victim", reporter.token(foreign, audience), 1) == 403
    assert reporter.post("other", good, 1) == 401
    assert reporter.post_bytes("victim", good, b" " * 65_537) == 413
    assert reporter.post_bytes("victim", good, b"{}") == 422
    assert "progress" not in jobs.get("victim")["status"]

    assert reporter.post("victim", good, 5, step=5) == 202
    assert reporter.post("victim", good, 5, step=6) == 409

    kubelet.end(pod, 0, outcomes.success.encode())
    status = jobs.wait_for_phase("victim", "Succeeded")["status"]
    assert reporter.post("victim", good, 6, step=1) == 410
    assert jobs.get("victim")["status"] == status


def test_the_token_of_a_pod_that_is_gone_is_worth_nothing(
    jobs: Any, kubelet: PlayedKubelet, reporter: Reporter
) -> None:
    jobs.create("dead")
    pod = kubelet.wait_for_pod("dead")
    kubelet.run(pod)
    token = reporter.own_token(pod, "dead")
    assert reporter.post("dead", token, 1) == 202
    kubelet.end(pod, 1)
    kubelet.remove(pod)
    wait_for(lambda: reporter.post("dead", token, 2) in (401, 403), "the pod is gone")
    assert reporter.post("dead", token, 3) in (401, 403)


def test_the_operator_restarts_between_reports(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, reporter: Reporter
) -> None:
    jobs.create("steady")
    pod = kubelet.wait_for_pod("steady")
    kubelet.run(pod)
    token = reporter.own_token(pod, "steady")
    assert reporter.post("steady", token, 7, step=7) == 202
    before = jobs.wait("steady", lambda s: s.get("progress", {}).get("step") == 7, "step 7", 3)["status"]

    operator.kill()
    operator.start()
    assert reporter.post("steady", token, 7, step=7) == 409
    after = jobs.get("steady")["status"]
    assert after["progress"] == before["progress"]
    assert after["phase"] == "Running"
    assert reporter.post("steady", token, 8, step=8) == 202
