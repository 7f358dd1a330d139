"""A sample of the fault plans, on a real API server; `make faults` runs all of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.plans import Plan, count_places, generate, sample
from finetune_test_operator.faults.suite import Bench, quick, table
from finetune_test_operator.operator_process import OperatorProcess

SAMPLE, SEED = 60, 16


@pytest.fixture
def bench(dev_cluster: DevCluster, operator_process: OperatorProcess, tmp_path: Path) -> Iterator[Bench]:
    """An operator behind the proxy, in place of the operator of all tests."""
    operator_process.kill()
    with Bench.start(dev_cluster, tmp_path / "bench", "faults-sample") as bench:
        yield bench


@pytest.mark.cluster
@pytest.mark.faults
def test_no_plan_of_the_sample_is_lost(bench: Bench) -> None:
    plans = bench.live_references()
    assert len(plans) >= 300

    results = bench.run(sample(quick(plans), SAMPLE, int(os.environ.get("FAULTS_SEED", SEED))))
    print(table(results))
    assert len(results) == SAMPLE
    assert {each.plan.name: each.failures for each in results if each.failures} == {}
    assert sum(each.fired for each in results) >= 0.9 * SAMPLE, "the faults happen"
    assert bench.restarts >= 5, "kills happen"
    assert bench.secrets() == []


def test_plans_are_made_of_the_places_that_all_references_passed() -> None:
    traces = [count_places(["POST jobs", "POST jobs", "LIST pods"]), count_places(["POST jobs", "LIST pods"])]
    plans = generate("passes", traces)
    assert {plan.number for plan in plans if plan.place == "POST jobs"} == {1}
    assert {plan.fault for plan in plans if plan.place == "LIST pods"} >= {"500", "reset", "timeout"}
    assert all(Plan.parse(plan.name) == plan for plan in plans)


def test_the_same_seed_gives_the_same_sample_of_every_class() -> None:
    plans = generate("passes", [count_places(["POST jobs", "PATCH jobs", "EVENT pods"] * 3)])
    chosen = sample(plans, 25, 7)
    assert chosen == sample(reversed(plans), 25, 7) != sample(plans, 25, 8)
    assert {plan.group for plan in chosen} == {plan.group for plan in plans}


def test_a_name_of_no_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="LIFE/FAULT/PLACE/NUMBER"):
        Plan.parse("passes/kill")
