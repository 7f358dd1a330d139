"""The ConfigMap of a Job: when it is made again, and what is said if it cannot be."""

from dataclasses import replace

from finetune_api.base import Json
from finetune_operator.decide.decide import decide
from finetune_operator.decide.decision import Actions
from finetune_operator.observe.snapshot import Waiting
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    a_config_map,
    a_pod,
    a_running_pod,
    a_snapshot,
    a_spec,
    decision_about,
)

RENEWED = replace(INSTALLATION, ca_certificate="ANOTHER PEM")
UNCHECKED = a_spec(runPolicy={"preflight": "Skip"})
MISSING = Waiting("ContainerConfigError", 'configmap "bot" not found', is_stalled=True)


def _mounted(job: Json | None) -> str:
    assert job is not None
    volumes = job["spec"]["template"]["spec"]["volumes"]
    return next(str(volume["configMap"]["name"]) for volume in volumes if volume["name"] == "config")


def test_a_config_map_that_was_deleted_is_made_again() -> None:
    assert decision_about(a_snapshot(config_map=None)).actions == Actions(create_config_map=a_config_map())


def test_one_that_would_hold_other_data_is_not_made_again() -> None:
    running = decide(a_snapshot(pods=(a_running_pod(),), config_map=None), RENEWED)
    assert running.actions == Actions()
    assert "ConfigMap" not in running.message, "the trainer has read it"

    waiting = a_snapshot(pods=(a_pod(state={"waiting": {"reason": "ContainerCreating"}}),), blocker=MISSING)
    stuck = decide(replace(waiting, config_map=None), RENEWED)
    assert (stuck.reason, stuck.is_stalled, stuck.actions) == ("ContainerConfigError", True, Actions())
    assert "kubectl delete job bot-" in stuck.message
    assert "not found" in decide(waiting, RENEWED).message, "another one is missing"


def test_a_job_that_still_follows_its_spec_needs_no_config_map() -> None:
    suspended = a_spec(runPolicy={"suspend": True})
    snapshot = replace(a_snapshot(config_map=None), spec=suspended)
    patch = decide(snapshot, RENEWED).actions.patch_trainer_job
    assert patch is not None
    assert patch["spec"] == {"suspend": True}


def test_a_new_job_mounts_what_is_true_now_and_a_running_one_what_it_was_made_for() -> None:
    fresh = decide(a_snapshot(UNCHECKED, job=None, config_map=None), RENEWED).actions
    assert fresh.create_config_map == a_config_map(UNCHECKED, RENEWED)
    assert _mounted(fresh.create_trainer_job) == a_config_map(UNCHECKED, RENEWED)["metadata"]["name"]
    assert decide(a_snapshot(pods=(a_running_pod(),)), RENEWED).actions == Actions()


def test_a_trainer_that_cannot_report_any_more_is_explained() -> None:
    snapshot = a_snapshot(pods=(a_running_pod(),))
    assert "before the operator's progress address or certificate changed" in decide(snapshot, RENEWED).message
    assert "certificate" not in decision_about(snapshot).message
