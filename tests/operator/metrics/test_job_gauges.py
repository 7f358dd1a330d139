"""Series about the jobs that exist: right numbers, on the leader only, and as many for 5,000 jobs as for ten."""

import itertools
from collections.abc import Iterator

import pytest

from finetune_api.vocabulary import Phase
from finetune_operator.metrics.job_gauges import JobFacts, JobGauges

NOW = 1_000.0


def facts(phase: Phase, created: float = 900.0, gpus: int = 1, speed: float = 0.0, person: str = "") -> JobFacts:
    return JobFacts(phase, person, created, gpus, speed)


@pytest.fixture
def gauges() -> Iterator[JobGauges]:
    """Gauges of a replica that leads."""
    gauges = JobGauges(lambda: NOW)
    with gauges.exported():
        yield gauges


def values(gauges: JobGauges) -> dict[str, float]:
    """Every value, by name and label."""
    return {
        f"{sample.name}{list(sample.labels.values())}": sample.value
        for family in gauges.collect()
        for sample in family.samples
    }


def test_jobs_are_counted_by_phase_and_the_oldest_of_each_is_known(gauges: JobGauges) -> None:
    gauges.note("a", facts(Phase.QUEUED, created=400, gpus=4))
    gauges.note("b", facts(Phase.QUEUED, created=700, gpus=2, person="Unschedulable"))
    gauges.note("c", facts(Phase.RUNNING, created=100, gpus=8, speed=1000))
    gauges.note("d", facts(Phase.UPLOADING, gpus=1, speed=500))
    gauges.note("e", facts(Phase.SUCCEEDED, created=1, gpus=8, speed=9))
    gauges.note("f", facts(Phase.SUSPENDED, gpus=8))

    found = values(gauges)
    assert found["finetune_jobs['Queued']"] == 2
    assert found["finetune_jobs['Succeeded']"] == 1
    assert found["finetune_jobs['Failed']"] == 0
    assert found["finetune_oldest_job_age_seconds['Queued']"] == 600
    assert "finetune_oldest_job_age_seconds['Succeeded']" not in found
    assert found["finetune_gpus['running']"] == 9
    assert found["finetune_gpus['waiting']"] == 6
    assert found["finetune_tokens_per_second[]"] == 1500
    assert found["finetune_jobs_waiting_for_person['Unschedulable']"] == 1


def test_the_newest_look_counts_and_a_job_that_is_gone_does_not(gauges: JobGauges) -> None:
    gauges.note("a", facts(Phase.RUNNING))
    gauges.note("a", facts(Phase.FAILED))
    gauges.note("b", facts(Phase.RUNNING))
    gauges.forget("b")
    found = values(gauges)
    assert (found["finetune_jobs['Running']"], found["finetune_jobs['Failed']"]) == (0, 1)


def test_a_replica_that_does_not_lead_exports_nothing() -> None:
    gauges = JobGauges()
    with gauges.exported():
        gauges.note("a", facts(Phase.RUNNING))
    assert values(gauges) == {}
    with gauges.exported():
        assert values(gauges)["finetune_jobs['Running']"] == 0, "another replica has led: nothing is known"


def test_the_number_of_series_does_not_grow_with_the_jobs(gauges: JobGauges) -> None:
    gauges.note("0", facts(Phase.RUNNING))
    few = len(values(gauges))
    for number, phase in zip(range(5000), itertools.cycle(Phase)):
        gauges.note(str(number), facts(phase))
    assert len(values(gauges)) == few
