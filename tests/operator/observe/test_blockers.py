"""What only Events show: which are read, when, and what they say."""

import pytest

from finetune_api.base import Json
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_test_operator.observed_job import FakeCluster, a_child_pod
from finetune_test_operator.snapshot_builder import METADATA, NOW, a_spec, at

TRAINER_JOB = build_trainer_job(METADATA, a_spec(), "image", "config")


WAITS_FOR_VOLUMES = {
    "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ContainerCreating"}}}],
}
BLOCKERS: dict[str, tuple[list[Json], str, str]] = {
    "a pod that is refused": ([], "FailedCreate", "PodRejected"),
    "a volume that cannot be mounted": ([WAITS_FOR_VOLUMES], "FailedMount", "ContainerConfigError"),
}


def _started(seconds: float) -> Json:
    """The trainer's Job, which the Job controller started at that time."""
    return TRAINER_JOB | {"status": {"startTime": at(seconds)}}


@pytest.mark.parametrize(("seconds", "is_asked"), [(-2, False), (-3, True), (None, False)])
async def test_events_are_read_only_once_a_pod_is_late(seconds: float | None, is_asked: bool) -> None:
    cluster = FakeCluster(TRAINER_JOB if seconds is None else _started(seconds))
    cluster.events["FailedCreate"] = [{"metadata": {"creationTimestamp": at(-1)}, "message": "forbidden"}]
    snapshot = await cluster.observe()
    assert (snapshot.blocker is not None) is is_asked
    assert snapshot.training.seconds_until_events(NOW) == {-2: 1, -3: 0, None: None}[seconds]


@pytest.mark.parametrize("code", [0, 30])
async def test_events_are_read_for_a_pod_that_ended_unless_it_ended_well(code: int) -> None:
    ended = {"state": {"terminated": {"exitCode": code, "startedAt": at(-9), "finishedAt": at(-5)}}}
    cluster = FakeCluster(_started(-10))
    cluster.pods = [a_child_pod("1", TRAINER_JOB, phase="Failed", containerStatuses=[{"name": "trainer"} | ended])]
    snapshot = await cluster.observe()
    assert snapshot.training.seconds_until_events(NOW) == (0 if code else None)


@pytest.mark.parametrize(("statuses", "event", "reason"), BLOCKERS.values(), ids=BLOCKERS)
async def test_what_only_events_show(statuses: list[Json], event: str, reason: str) -> None:
    cluster = FakeCluster(_started(-10))
    cluster.pods = [a_child_pod("1", TRAINER_JOB, **status) for status in statuses]
    assert (await cluster.observe()).blocker is None
    name = TRAINER_JOB["metadata"]["name"]
    cluster.events[event] = [
        {"metadata": {"creationTimestamp": at(1)}, "message": "older"},
        {"metadata": {"creationTimestamp": at(0)}, "lastTimestamp": at(2), "message": f'"{name}-x7k2p" is forbidden'},
    ]
    blocker = (await cluster.observe()).blocker
    assert (blocker.reason, blocker.is_stalled) == (reason, True)
    assert "forbidden" in blocker.message
    assert ("x7k2p" in blocker.message) == (event == "FailedMount")


async def test_a_volume_that_was_mounted_in_the_end_is_no_cause() -> None:
    """The kubelet often fails once, before its caches know the ConfigMap."""
    cluster = FakeCluster(_started(-10))
    cluster.pods = [a_child_pod("1", TRAINER_JOB, **WAITS_FOR_VOLUMES)]
    failure = {"metadata": {"creationTimestamp": at(0)}, "lastTimestamp": at(5), "message": "no Secret"}
    cluster.events = {"FailedMount": [failure], "Pulling": [failure | {"lastTimestamp": at(7)}]}
    assert (await cluster.observe()).blocker is None

    cluster.events["Pulling"][0]["lastTimestamp"] = at(4)
    assert (await cluster.observe()).blocker.reason == "ContainerConfigError"


async def test_a_refusal_that_is_over_is_not_told_again() -> None:
    """A quota refused an earlier pod: its Event outlives the refusal by an hour."""
    cluster = FakeCluster(_started(-10))
    cluster.pods = [a_child_pod("1", TRAINER_JOB, created=60, phase="Failed")]
    refusal = {"metadata": {"creationTimestamp": at(0)}, "lastTimestamp": at(30), "message": "forbidden"}
    cluster.events["FailedCreate"] = [refusal]
    assert (await cluster.observe()).blocker is None

    cluster.events["FailedCreate"] = [refusal | {"lastTimestamp": at(90)}]
    assert (await cluster.observe()).blocker.reason == "PodRejected"
