"""The trainer's Job: the golden manifest, and its deadline."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.vocabulary import JOB_UID_LABEL
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION
from finetune_operator.desired.trainer_job import build_trainer_job, remaining_deadline
from finetune_test_operator.snapshot_builder import (
    FULL_SECTIONS,
    INSTALLATION,
    METADATA,
    a_spec,
)

GOLDEN = Path(__file__).parent / "golden"


def _job(**sections: Any) -> dict[str, Any]:
    return build_trainer_job(METADATA, a_spec(**sections), INSTALLATION.trainer_image, "config")


TWO_NODES = {"resources": {"nodes": 2, "gpus": 4}}


@pytest.mark.parametrize(("name", "sections"), [("smallest", {}), ("full", FULL_SECTIONS), ("two_nodes", TWO_NODES)])
def test_the_job_is_the_golden_one(name: str, sections: dict[str, Any]) -> None:
    assert _job(**sections) == yaml.safe_load((GOLDEN / f"trainer_job_{name}.yaml").read_text())


REMAINING = {"no limit": (None, 50, None), "fresh": (100, 0, 100), "resumed": (100, 40, 60), "used up": (100, 140, 1)}


@pytest.mark.parametrize(("total", "active", "left"), REMAINING.values(), ids=REMAINING)
def test_what_is_left_of_a_deadline(total: int | None, active: int, left: int | None) -> None:
    assert remaining_deadline(total, active) == left


SCHEDULING: dict[str, Any] = {
    "queueName": "gpus",
    "workloadPriorityClassName": "research",
    "schedulerName": "kai-scheduler",
    "labels": {"kai.scheduler/queue": "team-a"},
    "annotations": {"scheduling.volcano.sh/queue-name": "team-a"},
}


def test_a_job_in_a_queue_is_made_suspended_with_what_its_schedulers_read() -> None:
    job, plain = _job(scheduling=SCHEDULING), _job()
    assert job["spec"]["suspend"] is True
    queue = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "research"}
    assert job["metadata"]["labels"] == plain["metadata"]["labels"] | queue | SCHEDULING["labels"]
    assert job["metadata"]["annotations"] == plain["metadata"]["annotations"] | SCHEDULING["annotations"]

    pod, plain_pod = job["spec"]["template"], plain["spec"]["template"]
    assert pod["metadata"]["labels"] == plain_pod["metadata"]["labels"] | SCHEDULING["labels"], "Kueue needs none here"
    assert pod["metadata"]["annotations"] == SCHEDULING["annotations"]
    assert pod["spec"] == plain_pod["spec"] | {"schedulerName": "kai-scheduler"}
    assert "annotations" not in plain_pod["metadata"]


def test_nothing_of_ours_is_replaced_by_what_a_user_passes_on() -> None:
    spec = a_spec()
    forged = spec.scheduling.model_copy(
        update={"labels": {JOB_UID_LABEL: "x"}, "annotations": {ACTIVE_SECONDS_ANNOTATION: "9"}}
    )  # the schema refuses them before
    job = build_trainer_job(METADATA, spec.model_copy(update={"scheduling": forged}), "image", "config")
    assert job["metadata"]["labels"][JOB_UID_LABEL] == METADATA.uid
    assert job["spec"]["template"]["metadata"]["labels"][JOB_UID_LABEL] == METADATA.uid
    assert job["metadata"]["annotations"][ACTIVE_SECONDS_ANNOTATION] == "0"
