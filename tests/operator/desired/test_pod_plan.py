"""What a plan says about its pod, for training and for preflight."""

from typing import Any

import pytest

from finetune_operator.desired.names import PREFLIGHT, TRAINER, child_name, preflight_name
from finetune_operator.desired.pod_plan import PodPlan
from finetune_test_operator.snapshot_builder import FULL_SECTIONS, METADATA, a_spec


def test_training_and_preflight_differ_in_command_token_and_name() -> None:
    training = PodPlan.for_component(TRAINER, METADATA, a_spec(), "image", "config")
    preflight = PodPlan.for_component(PREFLIGHT, METADATA, a_spec(), "image", "config")
    assert (training.command, training.reports_progress) == ("run", True)
    assert (preflight.command, preflight.reports_progress) == ("preflight", False)
    assert (training.job_name, preflight.job_name) == (child_name(METADATA), preflight_name(METADATA))
    assert (training.claims, training.credentials) == (preflight.claims, preflight.credentials) == ({}, [])


CLAIMS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "none": ({}, {}),
    "the dataset's": ({"dataset": {"source": "pvc://data/chat.jsonl"}}, {"dataset": "data"}),
    "one for both": (
        {"model": {"source": "pvc://all/base"}, "dataset": {"source": "pvc://all/chat.jsonl"}},
        {"model": "all", "dataset": "all"},
    ),
}


@pytest.mark.parametrize(("sections", "claims"), CLAIMS.values(), ids=CLAIMS)
def test_claims_by_purpose(sections: dict[str, Any], claims: dict[str, str]) -> None:
    assert PodPlan.for_component(TRAINER, METADATA, a_spec(**sections), "image", "config").claims == claims


def test_a_secret_of_a_claim_is_not_mounted() -> None:
    plan = PodPlan.for_component(TRAINER, METADATA, a_spec(**FULL_SECTIONS), "image", "config")
    assert "unused" not in {source["secret"]["name"] for source in plan.credentials}
