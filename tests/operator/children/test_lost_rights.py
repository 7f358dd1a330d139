"""Rights that the operator loses while jobs run: it names them, keeps quiet, and goes on once it has them again."""

import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster


def _stalled(status: Json) -> str:
    return " ".join(
        f"{each['reason']}: {each['message']}"
        for each in status.get("conditions", [])
        if each["type"] == "Stalled" and each["status"] == "True"
    )


def _touch_until(jobs: Any, name: str, holds: Any, what: str) -> Json:
    """Change the job now and then, since the authorizer takes a moment to see a role, and the operator waits longer."""

    def look() -> Json | None:
        jobs.label(name, "touched", str(time.monotonic_ns()))
        time.sleep(0.3)
        status: Json = jobs.get(name).get("status", {})
        return status if holds(status) else None

    return wait_for(look, what, 30)


@pytest.mark.parametrize("resource", ["jobs", "configmaps", "pods"])
def test_a_right_to_read_that_is_lost_is_named_in_the_status(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, without_rights: Any, resource: str
) -> None:
    jobs.create("seen")
    pod = kubelet.wait_for_pod("seen")
    kubelet.run(pod)
    before = jobs.wait_for_phase("seen", "Running")["status"]

    with without_rights(resource):
        status = _touch_until(jobs, "seen", lambda s: "PermissionDenied" in _stalled(s), "told")
        assert f'resource "{resource}"' in _stalled(status)
        assert "cannot get" in _stalled(status) or "cannot list" in _stalled(status)
        assert status["phase"] == "Running"
        known = [attempt | {"heldSeconds": 0} for attempt in before["attempts"]]  # whose seconds go on
        assert [attempt | {"heldSeconds": 0} for attempt in status["attempts"]] == known, "what was known is kept"

    _touch_until(jobs, "seen", lambda s: not _stalled(s), "the job goes on")
    assert "PermissionDenied" in jobs.event_reasons("seen")


def _probe(operator: OperatorProcess, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_an_operator_that_may_not_read_its_jobs_is_alive_and_not_ready(
    operator: OperatorProcess, jobs: Any, without_rights: Any
) -> None:
    jobs.create("hidden", suspend=True)
    jobs.wait_for_phase("hidden", "Suspended")
    pid = operator.pid

    with without_rights("finetunejobs"):

        def refused() -> str | None:
            jobs.label("hidden", "touched", str(time.monotonic_ns()))
            status, text = _probe(operator, "/readyz")
            return text if status == 503 else None

        text = wait_for(refused, "not ready", 30)
        assert 'cannot get resource "finetunejobs"' in text
        assert 'cannot get resource "finetunejobs"' in operator.log
        assert _probe(operator, "/healthz")[0] == 200

    wait_for(lambda: _probe(operator, "/readyz")[0] == 200, "ready again", 60)
    assert operator.pid == pid
    assert operator.is_running


def test_a_watch_that_is_forbidden_is_asked_for_slowly_and_does_not_end_the_process(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, without_rights: Any
) -> None:
    with without_rights("pods"):
        time.sleep(1)  # the authorizer's view of roles
        operator.kill()
        operator.start()
        jobs.create("unwatched")
        jobs.wait("unwatched", lambda s: "PermissionDenied" in _stalled(s), "told")
        time.sleep(4)
        assert operator.is_running
        refused = [line for line in operator.log.splitlines() if "Request attempt" in line and "/pods" in line]
        assert 1 <= len(refused) < 15

    _touch_until(jobs, "unwatched", lambda s: not _stalled(s), "the job goes on")
    pod = kubelet.wait_for_pod("unwatched")
    kubelet.run(pod)
    jobs.wait_for_phase("unwatched", "Running", seconds=100)  # by the watch, which comes back by itself
