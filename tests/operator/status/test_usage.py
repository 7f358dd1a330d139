"""GPU time, waiting, energy and cost: over every pod, by scheduler's and kubelet's clocks, and never counted twice."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.cost.energy import MAX_WATTS_PER_GPU
from finetune_api.cost.prices import Price
from finetune_api.status import MAX_ATTEMPTS, Attempt, FineTuneJobStatus
from finetune_operator.observe.children import TrainerPod, TrueCondition
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.status import build_status, has_changed
from finetune_test_operator.outcomes import BAD_ROW, SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_pod,
    a_report,
    a_snapshot,
    a_spec,
    a_trainer_job,
    at,
    decision_about,
)

H100 = Price("USD", 3.6)
ONE_GPU = a_spec(resources={"gpus": 1})


def pod(
    uid: str, scheduled: float | None, started: float = 0, ended: float | None = None, message: str = ""
) -> TrainerPod:
    """A pod that got its node, started and ended so many seconds after NOW; one with a message has succeeded."""
    if scheduled is None:
        return a_pod(uid, phase="Pending")

    state: dict[str, Any] = {"running": {"startedAt": at(started)}}
    if ended is not None:
        times = {"startedAt": at(started), "finishedAt": at(ended)}
        state = {"terminated": times | {"exitCode": 0 if message else 20, "message": message}}
    bound = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": at(scheduled)}]
    phase = "Running" if ended is None else "Succeeded" if message else "Failed"
    return a_pod(uid, created=scheduled, state=state, phase=phase, conditions=bound)


def snapshot(
    *pods: TrainerPod, now: float, status: FineTuneJobStatus | None = None, price: Price | None = H100
) -> Snapshot:
    found = a_snapshot(spec=ONE_GPU, pods=pods, status=status or FineTuneJobStatus())
    return replace(found, now=NOW + timedelta(seconds=now), price=price)


def status_of(seen: Snapshot) -> FineTuneJobStatus:
    return build_status(seen, decision_about(seen))


def test_time_counts_from_the_node_on_and_not_from_the_container() -> None:
    usage = status_of(snapshot(pod("1", 10, started=100), now=1010)).usage
    assert usage is not None
    assert (usage.gpu_seconds, usage.gpu_hours, usage.cost) == (1000, 0.28, 1.0)


def test_a_pod_without_a_node_costs_nothing() -> None:
    usage = status_of(snapshot(pod("1", None), now=1000)).usage
    assert usage is None or usage.gpu_seconds == 0


def test_every_pod_counts_once_whoever_looks_how_often() -> None:
    failed = pod("1", 0, started=10, ended=500)
    status = status_of(snapshot(failed, now=600))
    for now in (700, 800):
        status = status_of(snapshot(failed, pod("2", 600, started=610), now=now, status=status))
    assert status.usage is not None
    assert status.usage.gpu_seconds == 500 + 200


def gone(seen: Snapshot, **job: Any) -> Snapshot:
    """The same without its pods, and with another Job: started at NOW, or as the keyword arguments say."""
    return replace(seen, training=replace(seen.training, pods=(), job=a_trainer_job(ONE_GPU, **job)))


def seconds_of(seen: Snapshot) -> int:
    usage = status_of(seen).usage
    assert usage is not None
    return usage.gpu_seconds


def test_a_pod_that_vanished_unseen_counts_until_the_next_one_was_made() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=400))
    assert seconds_of(snapshot(pod("2", 1000, started=1010), now=1100, status=status)) == (1000 - 10) + 100
    assert seconds_of(gone(snapshot(now=1100, status=status))) == 400, "what was seen, as long as nothing else is known"


ENDS = {"the Job failed": "failed", "the Job is complete": "complete", "the Job was suspended": "suspension"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_last_pod_that_vanished_unseen_counts_until_its_job_says_that_it_had_ended(end: str) -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=400))
    told = TrueCondition("X", "", NOW + timedelta(seconds=700))
    stopped = {"suspended": True, "started": None} if end == "suspension" else {}
    assert seconds_of(gone(snapshot(now=5000, status=status), **stopped, **{end: told})) == 700 - 10


def test_the_time_of_a_suspension_that_nobody_saw_is_not_counted() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=400))
    seen = snapshot(pod("2", 90_000, started=90_010), now=90_100, status=status)
    resumed = a_trainer_job(ONE_GPU, started=NOW + timedelta(seconds=89_990))
    assert seconds_of(replace(seen, training=replace(seen.training, job=resumed))) == 400 + 100


def test_a_price_holds_for_the_pods_that_were_made_under_it() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=1000))
    dearer = Price("USD", 36.0)
    pods = (pod("1", 0, started=10, ended=1000), pod("2", 1000, started=1010))
    status = status_of(snapshot(*pods, now=2000, status=status, price=dearer))
    assert status.usage is not None
    assert status.usage.cost == pytest.approx(1.0 + 10.0)


def test_without_a_price_there_is_no_cost() -> None:
    usage = status_of(snapshot(pod("1", 0, started=10), now=1000, price=None)).usage
    assert usage is not None
    assert usage.cost is None
    assert usage.currency is None


OTHER_TERMS = {"no price any more": None, "another currency": Price("JPY", 540.0)}


@pytest.mark.parametrize("later", OTHER_TERMS.values(), ids=OTHER_TERMS)
def test_a_sum_that_nobody_knows_is_absent(later: Price | None) -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=1000))
    pods = (pod("1", 0, started=10, ended=1000), pod("2", 1000, started=1010))
    usage = status_of(snapshot(*pods, now=2000, status=status, price=later)).usage
    assert usage is not None
    assert usage.gpu_seconds == 2000
    assert usage.cost is None, "the total would look whole, and is not"


def test_a_price_that_comes_later_does_not_make_earlier_pods_free() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=1000, price=None))
    pods = (pod("1", 0, started=10, ended=1000), pod("2", 1000, started=1010))
    usage = status_of(snapshot(*pods, now=2000, status=status)).usage
    assert usage is not None
    assert usage.cost is None


def test_dropped_pods_without_a_price_leave_the_sum_unknown() -> None:
    known = tuple(
        Attempt(pod=f"p-{number}", uid=str(number), exit_code=20, held_seconds=100) for number in range(MAX_ATTEMPTS)
    )
    status = FineTuneJobStatus(attempts=known)
    for number in range(MAX_ATTEMPTS + 1):
        begun = 5000 + 200 * number
        newest = pod(f"new-{number}", begun, started=begun, ended=begun + 100)
        status = status_of(snapshot(newest, now=begun + 150, status=status))
    assert status.usage is not None
    assert all(attempt.price_per_gpu_hour for attempt in status.attempts)
    assert status.usage.cost is None


def test_the_end_that_the_kubelet_names_counts() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=1600))
    ended = status_of(snapshot(pod("1", 0, started=10, ended=1000), now=1700, status=status))
    assert ended.usage is not None
    assert ended.usage.gpu_seconds == 1000


def test_attempts_that_the_list_drops_keep_their_time_and_cost() -> None:
    known = tuple(
        Attempt(
            pod=f"p-{number}", uid=str(number), exit_code=20, held_seconds=100, price_per_gpu_hour=3.6, currency="USD"
        )
        for number in range(MAX_ATTEMPTS)
    )
    status = status_of(snapshot(pod("new", 5000, started=5010), now=5100, status=FineTuneJobStatus(attempts=known)))
    assert len(status.attempts) == MAX_ATTEMPTS
    assert status.usage is not None
    assert status.usage.gpu_seconds == 100 * MAX_ATTEMPTS + 100
    assert status.usage.cost == pytest.approx(2.1)

    again = status_of(snapshot(pod("new", 5000, started=5010), now=5100, status=status))
    assert again.usage == status.usage


def test_a_clock_that_went_back_takes_nothing_away() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=1000))
    earlier = status_of(snapshot(pod("1", 0, started=10), now=400, status=status))
    assert earlier.usage is not None
    assert earlier.usage.gpu_seconds == 1000


def test_time_that_passes_is_no_reason_to_write() -> None:
    status = status_of(snapshot(pod("1", 0, started=10), now=1000))
    assert not has_changed(status, status_of(snapshot(pod("1", 0, started=10), now=1060, status=status)))
    ended = snapshot(pod("1", 0, started=10, ended=1050), now=1060, status=status)
    assert has_changed(status, status_of(ended))


def test_a_job_that_is_over_says_how_far_the_estimate_was_off() -> None:
    preflight = {"result": "Passed", "gpuHours": 0.5}
    status = FineTuneJobStatus.model_validate({"preflight": preflight})
    done = pod("1", 0, started=10, ended=2250, message=SUCCEEDED.encode())
    usage = status_of(snapshot(done, now=2300, status=status)).usage
    assert usage is not None
    assert (usage.estimated_gpu_seconds, usage.estimated_cost) == (1800, 1.8)
    assert (usage.gpu_seconds, usage.estimate_error_percent) == (2250, 25.0)


def test_a_job_that_waited_says_for_how_long() -> None:
    usage = status_of(snapshot(pod("1", 300, started=310), now=1000)).usage
    assert usage is not None
    assert usage.waiting_seconds == 300


def reporting(joules: int | None, *, now: float, uid: str = "1", status: FineTuneJobStatus | None = None) -> Snapshot:
    """A job whose only pod holds a node since NOW and has reported so many joules."""
    fields: dict[str, Any] = {} if joules is None else {"energyJoules": joules}
    seen = snapshot(pod(uid, 0, started=10), now=now, status=status)
    return replace(seen, training=replace(seen.training, report=a_report(pod=uid, **fields)))


def test_energy_comes_from_reports_and_its_end_from_the_last_words() -> None:
    status = status_of(reporting(360_000, now=600))
    assert status.usage is not None
    assert (status.usage.energy_watt_hours, status.usage.energy_measured_gpu_seconds) == (100.0, 600)

    ended = pod("1", 0, started=10, ended=700, message=BAD_ROW.model_copy(update={"energy_joules": 432_000}).encode())
    status = status_of(snapshot(ended, pod("2", 800, started=810), now=1000, status=status))
    assert status.usage is not None
    assert status.usage.energy_watt_hours == 120.0
    assert status.usage.energy_measured_gpu_seconds == 700, "of 900 GPU-seconds: the second pod has said nothing yet"
    assert status.usage.gpu_seconds == 900


def test_energy_that_nothing_measures_is_absent_and_not_zero() -> None:
    usage = status_of(reporting(None, now=600)).usage
    assert usage is not None
    assert (usage.energy_watt_hours, usage.energy_measured_gpu_seconds) == (None, None)


FORGED = {"more than a GPU can take": MAX_WATTS_PER_GPU * (600 + 60) + 1, "a number of another kind": 2**50}


@pytest.mark.parametrize("joules", FORGED.values(), ids=FORGED)
def test_energy_that_no_gpu_can_take_is_not_believed(joules: int) -> None:
    status = status_of(reporting(joules, now=600))
    assert status.usage is not None
    assert status.usage.energy_watt_hours is None

    # What was believed before stays.
    status = status_of(reporting(joules, now=600, status=status_of(reporting(3600, now=500))))
    assert status.usage is not None
    assert status.usage.energy_watt_hours == 1.0
    assert status_of(reporting(MAX_WATTS_PER_GPU * 660, now=600)).usage.energy_watt_hours == 275.0  # type: ignore[union-attr]


def test_a_report_of_another_pod_and_a_job_without_gpus_have_no_energy() -> None:
    other = reporting(3600, now=600)
    other = replace(other, training=replace(other.training, report=a_report(pod="2", energyJoules=3600)))
    on_cpu = replace(reporting(3600, now=600), spec=a_spec(resources={"gpus": 0}))
    for seen in (other, on_cpu):
        usage = status_of(seen).usage
        assert usage is None or usage.energy_watt_hours is None


def test_attempts_that_the_list_drops_keep_their_energy() -> None:
    known = tuple(
        Attempt(pod=f"p-{number}", uid=str(number), exit_code=20, held_seconds=100, energy_joules=7200)
        for number in range(MAX_ATTEMPTS)
    )
    status = FineTuneJobStatus(attempts=known)
    for _ in range(2):
        status = status_of(snapshot(pod("new", 5000, started=5010), now=5100, status=status))
        assert status.usage is not None
        assert status.usage.energy_watt_hours == 2.0 * MAX_ATTEMPTS
        assert status.usage.energy_measured_gpu_seconds == 100 * MAX_ATTEMPTS


def test_energy_alone_is_no_reason_to_write() -> None:
    status = status_of(reporting(3600, now=500))
    assert not has_changed(status, status_of(reporting(7200, now=500, status=status)))
