"""Whether kstatus, Flux and Argo CD read each situation of a job as it is. The judges are the tools' own libraries."""

from typing import Any, NamedTuple

import pytest

from finetune_api.base import Json
from finetune_api.definition import custom_resource_definition
from finetune_api.failures import FAILURES, Consequence, FailureReason
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import ConditionType, Phase, Stage
from finetune_operator.status_reasons import STATUS_REASONS, StatusReason
from finetune_test_operator.situations import all_statuses, as_object
from finetune_test_programs.gitops_judges import flux_expressions, health_script, judge


class Verdict(NamedTuple):
    """What kstatus, the two modes of Flux and Argo CD say."""

    kstatus: str
    done: str
    accepted: str
    argo: str


GOES_ON = Verdict("InProgress", "InProgress", "InProgress", "Progressing")
GOES_ON_CHECKED = Verdict("InProgress", "InProgress", "Current", "Progressing")
NEEDS_PERSON = Verdict("Failed", "Failed", "Failed", "Degraded")
NEEDS_PERSON_CHECKED = Verdict("Failed", "Failed", "Current", "Degraded")
SUSPENDED = Verdict("InProgress", "InProgress", "InProgress", "Suspended")
SUSPENDED_CHECKED = Verdict("InProgress", "InProgress", "Current", "Suspended")
DONE = Verdict("Current", "Current", "Current", "Healthy")
EXPECTED: dict[Verdict, tuple[str, ...]] = {
    GOES_ON: (
        "it passes: nothing exists yet",
        "it passes: the pod of the checks waits",
        "it passes: the checks run",
        "it crashes, and its data are bad: it runs",
        "it crashes, and its data are bad: another pod follows",
        "it crashes, and its data are bad: the last pod has ended",
        "its pod does not start in time: no node fits",
        "its pod does not start in time: no node fits still",
        "the trainer's Job is made, without checks",
        "the Job has no pod yet",
        "a pod starts",
        "a deleted job of the same name still runs",
        "the Job is being deleted",
        "Kueue has no room",
        "the namespace has no GPU left",
        "Kueue has evicted it",
    ),
    GOES_ON_CHECKED: (
        "it passes: the checks passed",
        "it passes: the trainer's Job is made",
        "it passes: no node fits",
        "it passes: the trainer runs, silently",
        "it passes: the trainer trains",
        "it passes: it uploads",
        "somebody mends it: it trains",
        "it is paused: it trains",
        "it is paused: the checkpoint is written",
        "it is paused: it is resumed",
        "it is paused: it is deleted",
        "the trainer has read model and data, without checks",
        "no node fits, after the checks",
        *(f"stage {stage}" for stage in Stage if stage is not Stage.PREFLIGHT),
        "the trainer is silent",
        "the GPU time is spent",
    ),
    NEEDS_PERSON: (
        "somebody mends it: an image is missing",
        "somebody mends it: a quota refuses the pod",
        "it crashes, and its data are bad: it has failed",
        "its pod does not start in time: it has failed",
        "the checks refuse it: bad data",
        "its name is taken: a foreign Job is in its place",
        "its queue is missing",
        "its Workload was deactivated",
        "Kueue wants a queue",
        "only Kueue may suspend it",
        "a Secret is missing",
        "the namespace is denied",
        "no JobSet can be made",
        "a right to read is lost",
        "the API server refuses the Job",
    ),
    NEEDS_PERSON_CHECKED: (
        "somebody mends it: a newer operator's spec cannot be read",
        "an image is missing, after the checks",
        "out of GPU memory, after the checks",
    ),
    SUSPENDED: ("suspended, before the checks",),
    SUSPENDED_CHECKED: ("it is paused: it is suspended", "suspended, after the checks"),
    DONE: (
        "it passes: it has succeeded",
        "its result was there: it is reused",
        "succeeded, after the checks",
        "its outcome is lost",
    ),
}
STATUSES = all_statuses()
VERDICTS = {name: verdict for verdict, names in EXPECTED.items() for name in names} | {
    name: NEEDS_PERSON for name in STATUSES if name.startswith("failed: ")
}
NOT_LOOKED_AT: Json = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][
    "status"
]["default"]


def ask(objects: list[Json]) -> list[Verdict]:
    """The judges' answers."""
    expressions = {mode: flux_expressions(mode) for mode in ("done", "accepted")}
    answers = judge(objects, expressions=expressions, health=health_script())
    for answer in answers:
        said = (answer["kstatus"], answer["fluxKstatus"], answer["argo"], *answer["flux"].values())
        assert not [each["error"] for each in said if "error" in each]
        assert answer["fluxKstatus"]["status"] == answer["kstatus"]["status"], "Flux's own kstatus"
    return [
        Verdict(
            answer["kstatus"]["status"],
            answer["flux"]["done"]["status"],
            answer["flux"]["accepted"]["status"],
            answer["argo"]["status"],
        )
        for answer in answers
    ]


@pytest.fixture(scope="module")
def found() -> dict[str, Verdict]:
    return dict(zip(STATUSES, ask([as_object(status.to_wire()) for status in STATUSES.values()]), strict=True))


@pytest.mark.parametrize("name", STATUSES)
def test_every_judge_reads_a_situation_as_it_is(found: dict[str, Verdict], name: str) -> None:
    assert found[name] == VERDICTS[name]


def test_every_phase_stage_and_reason_is_judged() -> None:
    """A new reason fails here until a situation shows it."""
    assert set(VERDICTS) == set(STATUSES)
    # Pending is the phase of a job that waits for a person before anything was made.
    assert {status.phase for status in STATUSES.values()} == set(Phase)
    said = {each.reason for status in STATUSES.values() for each in status.conditions}
    wanted = {reason for reason, row in STATUS_REASONS.items() if row.in_conditions} | set(FailureReason)
    assert said == {str(reason) for reason in wanted | set(Stage) - {Stage.PREFLIGHT}}


@pytest.mark.parametrize("status", STATUSES.values(), ids=STATUSES)
def test_the_table_of_reasons_says_who_waits_for_a_person(status: FineTuneJobStatus) -> None:
    """A job that is not over has exactly one of Reconciling and Stalled, unless it is suspended."""
    assert status.phase is not None
    assert status.reason is not None
    true = {each.type for each in status.conditions if each.status == "True"}
    if status.phase.is_terminal:
        return

    waits = status.reason in tuple(FailureReason) and (
        FAILURES[FailureReason(status.reason)].seen_by_operator is Consequence.WAITS
    )
    if status.reason in tuple(StatusReason):
        waits = STATUS_REASONS[StatusReason(status.reason)].is_stalled
    expected = ConditionType.STALLED if waits else ConditionType.RECONCILING
    rests = status.phase is Phase.SUSPENDED and not waits
    assert true & {ConditionType.STALLED, ConditionType.RECONCILING} == (set() if rests else {expected})


UNSEEN = [status.to_wire() for status in STATUSES.values()]


def test_a_job_that_no_operator_has_looked_at_goes_on() -> None:
    """Nor is anything said about a generation that was not looked at yet."""
    assert ask([as_object(NOT_LOOKED_AT)]) == [GOES_ON]
    assert set(ask([as_object(status, generation=2) for status in UNSEEN])) == {GOES_ON}


def test_a_job_that_is_being_deleted_is_terminating() -> None:
    status = STATUSES["it is paused: it is deleted"].to_wire()
    (answer,) = judge([as_object(status, deleted=True)])
    assert (answer["kstatus"]["status"], answer["fluxKstatus"]["status"]) == ("Terminating", "Terminating")


def _with(status: Json, kind: str, value: str) -> Json:
    changed = [each | ({"status": value} if each["type"] == kind else {}) for each in status["conditions"]]
    return status | {"conditions": changed}


def test_what_older_versions_wrote_was_read_wrongly() -> None:
    """The negative control: without the default, nothing at all counted as done; and while Reconciling was true beside
    Stalled, a missing image looked like work for ever."""
    missing = STATUSES["somebody mends it: an image is missing"].to_wire()
    nothing, busy = judge([as_object(None), as_object(_with(missing, "Reconciling", "True"))])
    assert nothing["kstatus"]["status"] == "Current"
    assert busy["kstatus"]["status"] == "InProgress"


@pytest.mark.parametrize("script", ["return 1", "return {status = string.upper('healthy')}", "while true do end"])
def test_a_script_that_argo_cd_would_refuse_is_refused(script: str) -> None:
    answer: Any = judge([as_object(None)], health=script)[0]
    assert answer["argo"]["error"]
