"""A sample of the fault plans, on a real API server; `make faults` runs more of them."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from finetune_api.vocabulary import JOB_UID_LABEL
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.bench import Bench, Result
from finetune_test_operator.faults.fleet import TRIES, Fleet
from finetune_test_operator.faults.lives import LIVES
from finetune_test_operator.faults.oracle import CANARY
from finetune_test_operator.faults.plans import Lane, Plan, count_places, count_writes, crash_points, generate, sample
from finetune_test_operator.faults.suite import table

SAMPLE, SEED = 30, 16
CRASHING = [("passes", SAMPLE, 20), pytest.param("refused", 0, 16, marks=pytest.mark.faults)]
"""A life of which every write is killed around, the plans of the sample tried with it, and its kills at least. Looks at
a job that come together write once, so not every undisturbed life has as many writes."""

REFERENCES = {"passes": ("Succeeded", 19), "refused": ("InvalidRow", 10), "fails": ("TrainerCrashed", 22)}
"""An Event of an undisturbed life, and its writes at most: a look writes once, however many events there are."""


@pytest.fixture
def fleet(dev_cluster: DevCluster, no_other_operator: None, tmp_path: Path) -> Iterator[Fleet]:
    """Operators behind proxies, in place of the operator of all tests."""
    with Fleet.start(dev_cluster, tmp_path, "faults-sample") as fleet:
        yield fleet


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("life", "count", "kills"), CRASHING)
def test_no_plan_of_the_sample_is_lost(life: str, count: int, kills: int, fleet: Fleet) -> None:
    plans = fleet.live_references()
    assert len(plans) >= 300
    for reference, (reason, most) in REFERENCES.items():
        for state, course in fleet.references[reference]:
            assert state.events[reason] == 1, reference
            assert count_writes(course.places) <= most, f"{reference}: {course.places}"

    crashes = crash_points(plans, life)
    chosen = sample(plans, count, int(os.environ.get("FAULTS_SEED", SEED)))
    chosen += [plan for plan in crashes if plan not in chosen]
    results = fleet.run(chosen)
    print(table(results))
    assert {each.plan.name: each.failures for each in results if each.failures} == {}
    assert sum(each.fired for each in results) >= 0.9 * len(chosen), "the faults happen"
    assert len(crashes) >= kills
    let_go = [each.plan.name for each in results if each.plan in crashes and not each.fired]
    assert let_go == [], "every write was killed, before and after"
    assert fleet.leaks() == []

    # The same judge, once there is something to find.
    jobs = fleet.benches[Lane.REQUESTS][0].stage.jobs
    labels = {JOB_UID_LABEL: "of-no-job"}
    spilt = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "spilt", "labels": labels}}
    jobs.cluster.kubectl("create", "-n", jobs.namespace, "-f", "-", stdin=json.dumps(spilt | {"data": {"a": CANARY}}))
    assert [each.split(": ")[1] for each in fleet.leaks()] == ["an object of the API server", "ConfigMap spilt"]


def test_a_plan_whose_moment_did_not_come_is_tried_in_another_life() -> None:
    late, never, lost = (Plan.parse(f"passes/kill-before/POST jobs/{number}") for number in (1, 2, 3))

    tried: Counter[str] = Counter()

    class Lives:
        def wait_until_up(self) -> None:
            pass

        def run(self, plan: Plan, references: object) -> Result:
            tried[plan.name] += 1
            fired = plan is late and tried[plan.name] == 2
            return Result(plan, fired, 1.0, ["an orphan"] if plan is lost else [])

    fleet = Fleet({Lane.KILLS: [cast(Bench, Lives())]}, {Lane.KILLS: (1, 1)})
    results = fleet.run([late, never, lost])
    assert [(each.plan, each.fired, each.failures) for each in results] == [
        (late, True, []),
        (never, False, []),
        (lost, False, ["an orphan"]),  # what a life without its fault lost is lost
    ]
    assert tried == {late.name: 2, never.name: TRIES, lost.name: 1}


def test_plans_are_made_of_the_places_that_all_references_passed() -> None:
    traces = [count_places(["POST jobs", "POST jobs", "LIST pods"]), count_places(["POST jobs", "LIST pods"])]
    plans = generate("passes", traces)
    assert {plan.number for plan in plans if plan.place == "POST jobs"} == {1}
    assert {plan.fault for plan in plans if plan.place == "LIST pods"} >= {"500", "reset", "timeout"}
    assert all(Plan.parse(plan.name) == plan for plan in plans)


def test_the_same_seed_gives_the_same_sample_of_every_class() -> None:
    plans = generate("passes", [count_places(["POST jobs", "PATCH jobs", "EVENT pods"] * 3)])
    chosen = sample(plans, 40, 7)
    assert chosen == sample(reversed(plans), 40, 7) != sample(plans, 40, 8)
    assert {plan.group for plan in chosen} == {plan.group for plan in plans}


def test_every_life_and_every_class_has_its_part_of_a_sample() -> None:
    places = [count_places(["POST jobs", "LIST pods", "EVENT pods"])]
    chosen = sample([plan for life in LIVES for plan in generate(life, places)], SAMPLE, SEED)
    assert max(Counter(plan.group for plan in chosen).values()) <= 3
    lives = Counter(plan.life for plan in chosen)
    assert set(lives) == set(LIVES)
    assert max(lives.values()) - min(lives.values()) <= 2


def test_a_name_of_no_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="LIFE/FAULT/PLACE/NUMBER"):
        Plan.parse("passes/kill")
