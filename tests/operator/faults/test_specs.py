"""Every property of the CRD's schema left out, changed, at its bounds, wrong, and back, on a real API server."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client.exceptions import ApiException

from finetune_api.base import Json
from finetune_api.job import load_manifest
from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.bench import Bench
from finetune_test_operator.faults.plans import Lane
from finetune_test_operator.faults.spec_lives import SpecTrial, judge_refusal, left_children
from finetune_test_operator.faults.spec_plans import SpecPlan, generate_spec_plans
from finetune_test_operator.operator_process import CHECKOUT

AT_ONCE = 8
ONE_IN = 17
"""Of the plans, in `make test`: prime to the numbers of edits, so that all of them come."""

CRD = yaml.safe_load((CHECKOUT / "crds/finetune.dev_finetunejobs.yaml").read_text())
SCHEMA: Json = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
FULL = load_manifest((CHECKOUT / "crds/samples/full.yaml").read_text()).spec.to_wire()
PLANS = list(enumerate(generate_spec_plans(SCHEMA, FULL)))


_numbers = itertools.count()


@pytest.fixture
def bench(dev_cluster: DevCluster, no_other_operator: None, tmp_path: Path) -> Iterator[Bench]:
    """An operator in place of the operator of all tests."""
    namespace = f"faults-specs-{next(_numbers)}"
    with Bench.start(dev_cluster, tmp_path / "bench", namespace, Lane.REQUESTS) as bench:
        bench.wait_until_up()
        yield bench


def _try(bench: Bench, plans: list[tuple[int, SpecPlan]]) -> None:
    trial = SpecTrial(bench, FULL)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = [each for lost in threads.map(lambda plan: trial.run(*plan), plans) for each in lost]
    assert found == []
    assert {job: wrong for job, wrong in bench.watcher.violations.items() if wrong} == {}
    assert bench.restarts == 0, "the operator has not crashed"
    assert "defect in the operator" not in bench.operator.log
    bench.stage.wait_for(lambda: not left_children(bench), "children of deleted jobs are gone")


@pytest.mark.cluster
def test_what_users_write_is_refused_in_words_or_taken_up(bench: Bench) -> None:
    _try(bench, PLANS[::ONE_IN])


@pytest.mark.cluster
@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_every_edit_of_every_field_is_refused_in_words_or_taken_up(bench: Bench) -> None:
    _try(bench, PLANS)


def test_every_field_meets_every_edit_that_its_type_has() -> None:
    edits = Counter(plan.edit for _, plan in PLANS)
    fields = edits["deleted"]
    assert fields >= 110
    assert edits["null"] == fields
    assert min(edits[edit] for edit in ("least", "below", "most", "above", "changed", "wrong type", "unknown")) >= 19
    assert {plan.edit for _, plan in PLANS[::ONE_IN]} >= {"deleted", "null", "wrong type", "above", "most", "empty"}
    assert len({plan.name for _, plan in PLANS}) == len(PLANS)


def test_an_edit_changes_its_place_alone() -> None:
    assert SpecPlan(("a", "b"), "deleted").apply({"a": {"b": 1, "c": 2}}) == {"a": {"c": 2}}
    assert SpecPlan(("a", "0", "b"), "changed", 3).apply({"a": [{"b": 1}]}) == {"a": [{"b": 3}]}
    assert SpecPlan(("a", "b"), "changed", 3).apply({}) == {"a": {"b": 3}}


REFUSALS = {
    "readable": (422, "spec.training.epochs: Invalid value: 0: should be greater than 0", []),
    "the code of a rule": (422, "spec.training: failed rule: has(self.epochs)", ["the code of a rule"]),
    "another place": (422, "spec.model is wrong", ["does not name the place"]),
    "too long": (422, "spec.training.epochs" + "x" * 3000, ["characters"]),
    "an error of the server": (500, "panic", ["answered with 500"]),
}


@pytest.mark.parametrize(("status", "message", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_must_help(status: int, message: str, said: list[str]) -> None:
    error: Any = ApiException(status=status)
    error.body = json.dumps({"message": message})
    found = judge_refusal(error, SpecPlan(("training", "epochs"), "below", 0))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))
