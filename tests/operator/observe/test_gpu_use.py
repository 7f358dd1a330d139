"""Who counts as holding GPUs of a namespace, and who as waiting for them."""

import pytest

from finetune_api.base import Json
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.observe.gpu_use import find_gpu_use
from finetune_operator.observe.job_set import JobSet
from finetune_operator.observe.snapshot import GpuUse, GpuUser
from finetune_test_operator.snapshot_builder import METADATA, a_spec, at

ME = METADATA.model_copy(update={"creation_timestamp": at(100), "name": "me"})
LIMIT = 4


def a_job(name: str, created: float, gpus: int = 1, *, run_policy: Json | None = None, **status: object) -> Json:
    """A FineTuneJob, as the API server lists it."""
    metadata = {"name": name, "uid": f"uid-{name}", "namespace": "team", "creationTimestamp": at(created)}
    return {
        "metadata": metadata,
        "spec": {"resources": {"gpus": gpus}, "runPolicy": {"preflight": "Run"} | (run_policy or {})},
        "status": status,
    }


def a_trainer(name: str, gpus: int = 1, *, suspend: bool = False, **status: object) -> Json:
    """The batch/v1 Job that the operator makes for it."""
    owner = METADATA.model_copy(update={"name": name, "uid": f"uid-{name}"})
    body = build_trainer_job(owner, a_spec(resources={"gpus": gpus}, runPolicy={"suspend": suspend}), "image", "config")
    body["metadata"] |= {"uid": f"job-of-{name}", "resourceVersion": "1"}
    return body | {"status": status}


OVER = [{"type": "Complete", "status": "True", "lastTransitionTime": at(0)}]
HOLDERS: dict[str, tuple[list[Json], list[Json], tuple[GpuUser, ...]]] = {
    "nobody": ([], [], ()),
    "a trainer": ([a_job("a", 0, 2)], [a_trainer("a", 2)], (GpuUser("a", 2),)),
    "a trainer created later": ([a_job("z", 200, 2)], [a_trainer("z", 2)], (GpuUser("z", 2),)),
    "a Job without pods yet": ([a_job("a", 0)], [a_trainer("a")], (GpuUser("a", 1),)),
    "a Job that outlives its FineTuneJob": ([], [a_trainer("gone", 2)], (GpuUser("gone", 2),)),
    "a pod that is told to stop": ([a_job("a", 0)], [a_trainer("a", suspend=True, terminating=1)], (GpuUser("a", 1),)),
    "a suspended Job": ([a_job("a", 0)], [a_trainer("a", suspend=True)], ()),
    "a Job that is over": ([a_job("a", 0)], [a_trainer("a", conditions=OVER)], ()),
    "a success that the Job controller has not seen": ([a_job("a", 0, phase="Succeeded")], [a_trainer("a")], ()),
    "a job on the CPU": ([a_job("a", 0, 0)], [a_trainer("a", 0)], ()),
    "the job itself": ([], [a_trainer("me")], ()),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_whoever_has_gpus_holds_them(name: str) -> None:
    jobs, trainers, expected = HOLDERS[name]
    me = ME.model_copy(update={"uid": "uid-me"})
    assert find_gpu_use(me, LIMIT, jobs, trainers) == GpuUse(LIMIT, expected)


WAITS = {"phase": "Queued", "reason": "GpuLimitReached"}
LINE: dict[str, tuple[Json, bool]] = {
    "one that was created earlier": (a_job("a", 99, **WAITS), True),
    "one that was created later": (a_job("a", 101, **WAITS), False),
    "one of the same second, by its name": (a_job("a", 100, **WAITS), True),
    "one of the same second, by its later name": (a_job("z", 100, **WAITS), False),
    "one whose checks have passed": (a_job("a", 0, phase="Queued", reason="PreflightPassed"), True),
    "one whose checks still run": (a_job("a", 0, phase="Validating", reason="Checking"), False),
    "one that nobody has looked at, without checks": (a_job("a", 0, run_policy={"preflight": "Skip"}), True),
    "one that nobody has looked at": (a_job("a", 0), False),
    "one that waits for a person": (a_job("a", 0, phase="Queued", reason="NameConflict"), False),
    "one that is suspended": (a_job("a", 0, run_policy={"suspend": True}, **WAITS), False),
    "one that can never start": (a_job("a", 0, LIMIT + 1, **WAITS), False),
    "one that has failed": (a_job("a", 0, phase="Failed", reason="InvalidRow"), False),
}


@pytest.mark.parametrize("name", LINE)
def test_the_line_is_the_order_of_creation(name: str) -> None:
    job, is_ahead = LINE[name]
    assert bool(find_gpu_use(ME, LIMIT, [job], []).ahead) is is_ahead


def test_a_job_in_kueues_queue_is_not_in_this_line() -> None:
    queued = a_job("a", 0, **WAITS)
    queued["spec"]["scheduling"] = {"queueName": "research"}
    assert find_gpu_use(ME, LIMIT, [queued], []).ahead == ()


def test_a_job_is_counted_once() -> None:
    # Its status is as old as the wait, and its Job is there already.
    use = find_gpu_use(ME, LIMIT, [a_job("a", 0, 2, **WAITS)], [a_trainer("a", 2)])
    assert use == GpuUse(LIMIT, (GpuUser("a", 2),))


def _in_a_set(trainer: Json, uid: str = "set-uid") -> Json:
    trainer["metadata"]["ownerReferences"] = [{"kind": "JobSet", "name": "set", "uid": uid, "controller": True}]
    return trainer


def test_a_job_whose_trainer_a_job_set_made_is_counted_as_itself_and_once() -> None:
    waiting, trainer = a_job("a", 0, 2, **WAITS), _in_a_set(a_trainer("a", 2))
    its_set = JobSet("set", "set-uid", "uid-a", deleting=False)
    assert find_gpu_use(ME, LIMIT, [waiting], [trainer], [its_set]) == GpuUse(LIMIT, (GpuUser("a", 2),))

    # The job itself, and one that has succeeded, hold nothing that others would have to wait for.
    me, done = ME.model_copy(update={"uid": "uid-a"}), a_job("a", 0, phase="Succeeded")
    assert find_gpu_use(me, LIMIT, [], [trainer], [its_set]) == GpuUse(LIMIT)
    assert find_gpu_use(ME, LIMIT, [done], [trainer], [its_set]) == GpuUse(LIMIT)


@pytest.mark.parametrize(
    "job_set",
    [JobSet("set", "another-set", "uid-me", deleting=False), JobSet("set", "set-uid", None, deleting=False)],
    ids=["another set of the name", "a set that was kept"],
)
def test_gpus_of_a_set_that_is_not_the_jobs_stay_counted(job_set: JobSet) -> None:
    me, trainer = ME.model_copy(update={"uid": "uid-me"}), _in_a_set(a_trainer("a", 2))
    assert find_gpu_use(me, LIMIT, [], [trainer], [job_set]) == GpuUse(LIMIT, (GpuUser("a", 2),))
