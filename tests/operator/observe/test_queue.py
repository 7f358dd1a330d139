"""What is read of a run's queue, and when nothing is asked at all."""

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Phase
from finetune_operator.cluster.queues import Queues
from finetune_operator.errors import ApiError, ApiUnavailableError, ConflictError, ForbiddenError, NotFoundError
from finetune_operator.observe.queue import read_queue
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.observe.workload import QueueView
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
)

SPEC = a_spec(scheduling={"queueName": "research"})
WITH_RIGHTS = replace(INSTALLATION, kueue=True)
GROUP = "/apis/kueue.x-k8s.io"
VISIBILITY = "/apis/visibility.kueue.x-k8s.io"


class FakeKueue:
    """Answers by path; what is not there is NotFound. Requests are kept."""

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            GROUP: {"versions": [{"version": "v1beta1"}, {"version": "v1beta2"}]},
            f"{GROUP}/v1beta2/namespaces/team/localqueues/research": {"kind": "LocalQueue"},
            f"{GROUP}/v1beta2/namespaces/team/workloads": {
                "items": [_workload("job-bot"), _workload("forged", "x", "2026-11-24T13:00:00Z")]
            },
            VISIBILITY: {"versions": [{"version": "v1beta1"}]},
            f"{VISIBILITY}/v1beta1/namespaces/team/localqueues/research/pendingworkloads": {
                "items": [{"metadata": {"name": "other"}}, {"metadata": {"name": "job-bot"}, "positionInLocalQueue": 1}]
            },
        } | answers
        self.asked: list[str] = []
        self.bodies: list[Json | None] = []

    async def request(self, verb: str, path: str, body: Json | None = None, **_: Any) -> Json:
        self.asked.append(path)
        self.bodies.append(body)
        answer = self.answers.get(path) or NotFoundError(404, path, "not found")
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


def _workload(name: str, owner: str = "child-uid", created: str = "2026-11-24T12:00:00Z") -> Json:
    reference = {"kind": "Job", "name": "x", "uid": owner, "controller": True}
    metadata = {"name": name, "namespace": "team", "uid": name, "resourceVersion": "7"}
    return {"metadata": metadata | {"creationTimestamp": created, "ownerReferences": [reference]}}


async def read(kueue: FakeKueue, snapshot: Snapshot, installation: Any = WITH_RIGHTS) -> QueueView | None:
    return await read_queue(Queues(kueue), snapshot, snapshot.spec, installation)


HELD = a_snapshot(SPEC, job=a_trainer_job(SPEC))


async def test_the_workload_of_a_held_job_is_read_with_its_place_and_no_forged_one() -> None:
    view = await read(FakeKueue(), HELD)
    assert view is not None
    assert view.workload is not None
    assert (view.name, view.workload.name, view.position, view.problem) == ("research", "job-bot", 2, None)


STARTED = a_trainer_job(SPEC, suspended=False)
NOTHING_TO_ASK: dict[str, Snapshot] = {
    "there is no queue": a_snapshot(),
    "the trainer runs": a_snapshot(SPEC, job=STARTED, pods=(a_running_pod(),)),
    "the job is over and its Job is gone": a_snapshot(SPEC, job=None, status=FineTuneJobStatus(phase=Phase.FAILED)),
}


@pytest.mark.parametrize("snapshot", NOTHING_TO_ASK.values(), ids=NOTHING_TO_ASK)
async def test_a_job_that_its_queue_does_not_hold_costs_no_request(snapshot: Snapshot) -> None:
    kueue = FakeKueue()
    assert await read(kueue, snapshot) is None
    assert kueue.asked == []


async def test_a_job_between_two_trainers_is_asked_about_again() -> None:
    assert await read(FakeKueue(), a_snapshot(SPEC, job=STARTED, pods=(an_ended_pod(30),))) is not None


async def test_a_missing_kueue_and_a_missing_queue_are_problems() -> None:
    no_kueue = await read(FakeKueue(**{GROUP: None}), a_snapshot(SPEC, job=None))
    assert no_kueue is not None
    assert no_kueue.problem is not None
    assert "Kueue is not installed" in no_kueue.problem

    missing = {f"{GROUP}/v1beta2/namespaces/team/localqueues/research": None}
    no_queue = await read(FakeKueue(**missing), a_snapshot(SPEC, job=None))
    assert no_queue is not None
    assert no_queue.problem == (
        "namespace team has no LocalQueue research: create it, or create the job with the name of another"
    )


async def test_without_rights_only_the_api_server_is_asked_whether_kueue_is_there() -> None:
    kueue = FakeKueue()
    assert await read(kueue, HELD, INSTALLATION) == QueueView("research", is_visible=False)
    assert kueue.asked == [GROUP]


async def test_a_refused_read_is_not_taken_for_an_empty_queue() -> None:
    path = f"{GROUP}/v1beta2/namespaces/team/workloads"
    with pytest.raises(ForbiddenError):
        await read(FakeKueue(**{path: ForbiddenError(403, path, "no right")}), HELD)


LINE = f"{VISIBILITY}/v1beta1/namespaces/team/localqueues/research/pendingworkloads"


@pytest.mark.parametrize(
    "answers",
    [
        {VISIBILITY: None},
        {LINE: ForbiddenError(403, LINE, "no right")},
        {LINE: ApiUnavailableError("503")},
        {VISIBILITY: ApiError(400, VISIBILITY, "odd")},
    ],
    ids=["no visibility", "no right", "its server is down", "another fault"],
)
async def test_whatever_goes_wrong_with_the_line_only_the_place_is_missing(answers: dict[str, Any]) -> None:
    view = await read(FakeKueue(**answers), HELD)
    assert view is not None
    assert view.workload is not None
    assert view.position is None


async def test_a_line_is_read_once_for_all_that_wait_in_it() -> None:
    kueue = FakeKueue()
    queues = Queues(kueue)
    assert [await queues.find_position("team", "research", name) for name in ("other", "job-bot", "x")] == [1, 2, None]
    assert kueue.asked.count(LINE) == 1


async def test_a_workload_is_changed_as_it_was_read() -> None:
    path = f"{GROUP}/v1beta2/namespaces/team/workloads/job-bot"
    kueue = FakeKueue(**{path: ConflictError(409, path, "changed")})
    with pytest.raises(ConflictError):
        await Queues(kueue).patch_workload(_workload("job-bot"), {"spec": {"active": False}})
    assert kueue.bodies[-1] == {
        "spec": {"active": False},
        "metadata": {"uid": "job-bot", "resourceVersion": "7"},
    }


async def test_an_older_kueue_is_asked_in_its_own_version() -> None:
    kueue = FakeKueue(**{GROUP: {"versions": [{"version": "v1beta1"}]}})
    await Queues(kueue).list_workloads("team", "u")
    assert kueue.asked[-1] == f"{GROUP}/v1beta1/namespaces/team/workloads"
