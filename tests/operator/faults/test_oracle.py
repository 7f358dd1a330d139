"""The judges of the fault suite notice what they are there for."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from finetune_api.status import MAX_STATUS_BYTES
from finetune_test_operator.faults.fault_proxy import Course, read_place
from finetune_test_operator.faults.oracle import CANARY, EndState, Watcher, check_effort
from finetune_test_operator.faults.plans import Plan

STATE = EndState({"phase": "Succeeded"}, Counter(["Queued"]), {"trainer": 1}, Counter(["POST jobs"]), 0)

DIFFERENCES = {
    "another status": ({"status": {"phase": "Failed"}}, "status.phase: Succeeded is Failed"),
    "an Event twice": ({"events": Counter({"Queued": 2})}, "events more"),
    "an Event less": ({"events": Counter()}, "events are missing"),
    "a second pod": ({"children": {"trainer": 2}}, "children"),
    "a second Job": ({"creates": Counter({"POST jobs": 2})}, "created more than once"),
    "a deletion": ({"deletes": 1}, "1 deletions, not 0"),
}


@pytest.mark.parametrize(("change", "said"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_difference_from_the_reference_is_told(change: Any, said: str) -> None:
    assert STATE.differences(STATE) == []
    (found,) = replace(STATE, **change).differences(STATE)
    assert said in found


def test_an_event_may_be_missing_where_one_is_let_go() -> None:
    silent = replace(STATE, events=Counter())
    assert silent.differences(STATE, let_go=1) == []
    twice = replace(STATE, events=Counter(["Queued", "Started"]))
    assert silent.differences(twice, let_go=1) != []


def test_a_deleted_job_may_have_its_config_map_once_more_and_nothing_else() -> None:
    gone = replace(STATE, status=None)
    for more, is_lost in (({"POST configmaps": 1}, False), ({"POST configmaps": 2}, True), ({"POST jobs": 1}, True)):
        found = replace(gone, creates=gone.creates + Counter(more)).differences(gone)
        assert bool(found) == is_lost, more
    assert replace(STATE, creates=STATE.creates + Counter(["POST configmaps"])).differences(STATE)


def test_a_job_that_is_deleted_may_say_once_more_that_it_waits() -> None:
    gone = replace(STATE, status=None)
    for more, count in ((["Queued"], 0), (["Queued", "Queued"], 1), (["Succeeded"], 1)):
        found = replace(gone, events=gone.events + Counter(more)).differences(gone)
        assert len(found) == count
    assert replace(STATE, events=STATE.events + Counter(["Queued"])).differences(STATE)


def _job(phase: str, **status: Any) -> Any:
    return {"metadata": {"name": "bot", "uid": "1", "generation": 1}, "status": {"phase": phase} | status}


VERSIONS = {
    "an end that is taken back": ([_job("Succeeded"), _job("Running")], "it was Succeeded and is Running"),
    "a generation that never was": ([_job("Running", observedGeneration=2)], "observedGeneration 2 of generation 1"),
    "too large a status": ([_job("Running", message="x" * MAX_STATUS_BYTES)], "bytes"),
    "a secret": ([_job("Running", message=CANARY)], "a secret"),
}


@pytest.mark.parametrize(("versions", "said"), VERSIONS.values(), ids=VERSIONS)
def test_what_must_never_be_is_seen(versions: list[Any], said: str) -> None:
    watcher = Watcher()
    watcher.see_job("ADDED", _job("Queued", observedGeneration=1))
    assert not watcher.violations["bot"]
    for version in versions:
        watcher.see_job("MODIFIED", version)
    (found,) = watcher.violations["bot"]
    assert said in found


def _pod(uid: str, phase: str, job_uid: str = "1") -> Any:
    labels = {"app.kubernetes.io/component": "trainer", "finetune.dev/job-name": "bot", "finetune.dev/job-uid": job_uid}
    return {"metadata": {"uid": uid, "labels": labels}, "status": {"phase": phase}}


def test_two_trainers_at_once_are_seen() -> None:
    watcher = Watcher()
    for uid, phase in (("a", "Running"), ("a", "Failed"), ("b", "Running")):
        watcher.see_pod("MODIFIED", _pod(uid, phase))
    assert not watcher.violations["bot"]
    watcher.see_pod("ADDED", _pod("c", "Pending", "of a job that was made again"))
    assert watcher.violations["bot"] == ["2 trainers at once"]


def test_writes_and_requests_without_bound_are_told() -> None:
    reference = Course(places=["PATCH finetunejobs/status"])
    assert check_effort(reference, reference) == []
    (writes,) = check_effort(Course(places=["PATCH finetunejobs/status"] * 5), reference)
    assert "5 writes" in writes
    (requests,) = check_effort(Course(times=[0.01 * number for number in range(70)]), reference)
    assert "within a second" in requests


def test_a_fault_is_due_once_at_its_place() -> None:
    course = Course(Plan("passes", "500", "POST jobs", 2))
    assert [course.note(place) for place in ("POST jobs", "PATCH jobs", "POST jobs", "POST jobs")] == [
        False,
        False,
        True,
        False,
    ]


PLACES = {
    ("POST", "/apis/batch/v1/namespaces/team/jobs"): "POST jobs",
    ("PATCH", "/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/bot/status"): "PATCH finetunejobs/status",
    ("GET", "/api/v1/namespaces/team/pods"): "LIST pods",
    ("GET", "/api/v1/pods"): "LIST pods",
    ("GET", "/api/v1/namespaces/team/pods/bot"): "GET pods",
}


@pytest.mark.parametrize(("request_line", "place"), PLACES.items())
def test_a_request_belongs_to_a_place(request_line: tuple[str, str], place: str) -> None:
    assert read_place(*request_line) == place
