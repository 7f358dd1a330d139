"""Transitions between two statuses, and the Events that tell them."""

from dataclasses import replace

from finetune_api.failures import FAILURES, FailureReason
from finetune_api.judgement import Judgement
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import JudgedRows
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.events import build_event, find_transitions
from finetune_operator.status.status import build_status
from finetune_test_operator.outcomes import BAD_ROW, FAILED, STAGES, SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_report,
    a_running_pod,
    a_snapshot,
    a_trainer_job,
    an_ended_pod,
    decision_about,
)

REFUSED = a_snapshot(pods=(an_ended_pod(11, BAD_ROW),), job=a_trainer_job(failed=FAILED))

MEMORY = {"mode": "Fastest", "predictedPeakBytes": 30, "microBatch": 8}
FALLBACKS = [
    {"step": 0, "fromMode": "Fastest", "toMode": "Balanced"},
    {"step": 7, "fromMode": "Balanced", "toMode": "Smallest"},
]


def _status_of(snapshot: Snapshot) -> FineTuneJobStatus:
    return build_status(snapshot, decision_about(snapshot))


def test_transitions_tell_the_story_in_order() -> None:
    snapshots = [
        a_snapshot(),
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(pod="1", stages=STAGES)),
        a_snapshot(pods=(an_ended_pod(139, uid="1"),)),
        a_snapshot(pods=(an_ended_pod(139, uid="1"), a_running_pod("2", created=20))),
        a_snapshot(pods=(an_ended_pod(139, uid="1"), an_ended_pod(0, SUCCEEDED, uid="2", created=20))),
    ]
    status, reported = FineTuneJobStatus(), []
    for snapshot in snapshots:
        new = _status_of(replace(snapshot, status=status))
        reported += [transition.reason for transition in find_transitions(status, new)]
        status = new
    assert reported == ["Queued", "Started", "Training", "Queued", "Retrying", "Started", "Succeeded"]


def test_a_failure_is_a_warning_with_its_hint() -> None:
    transition = find_transitions(FineTuneJobStatus(), _status_of(REFUSED))[-1]
    event = build_event(METADATA, transition, NOW)
    assert (event["reason"], event["type"]) == ("InvalidRow", "Warning")
    assert "onBadRow" in event["message"]
    assert event["message"] == f"line 2. {FAILURES[FailureReason.INVALID_ROW].hint}"
    assert event["involvedObject"]["uid"] == METADATA.uid
    assert event == build_event(METADATA, transition, NOW)


def test_memory_that_ran_out_is_reported_once_for_each_time_and_pod() -> None:
    snapshots = [
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(1, pod="1", memory=MEMORY)),
        a_snapshot(
            pods=(a_running_pod("1"),), report=a_report(2, pod="1", memory=MEMORY | {"fallbacks": FALLBACKS[:1]})
        ),
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(3, pod="1", memory=MEMORY | {"fallbacks": FALLBACKS})),
        a_snapshot(pods=(an_ended_pod(139, uid="1"), a_running_pod("2", created=20))),
        a_snapshot(
            pods=(an_ended_pod(139, uid="1"), a_running_pod("2", created=20)),
            report=a_report(1, pod="2", memory=MEMORY | {"fallbacks": FALLBACKS[:1], "mode": "Balanced"}),
        ),
    ]
    status, reported = FineTuneJobStatus(), []
    for snapshot in snapshots:
        new = _status_of(replace(snapshot, status=status))
        transitions = [each for each in find_transitions(status, new) if each.reason == "MemoryFallback"]
        reported.append([each.message.split(": ")[0] for each in transitions])
        assert all(each.is_warning for each in transitions)
        assert not find_transitions(new, _status_of(replace(snapshot, status=new)))
        status = new
    zero, seven = "out of GPU memory after step 0", "out of GPU memory after step 7"
    assert reported == [[], [zero], [seven], [], [zero]]
    assert status.memory is not None
    assert status.memory.mode == "Balanced"
    names = {
        build_event(METADATA, each, NOW)["metadata"]["name"] for each in find_transitions(FineTuneJobStatus(), status)
    }
    assert len(names) == len(find_transitions(FineTuneJobStatus(), status))


def test_fp8_that_is_given_up_is_a_warning_once_for_each_pod() -> None:
    asked, kept = {"precision": "BF16"}, {"precision": "FP8", "precisionReason": "FP8 changes little"}
    given_up = {"precision": "BF16", "precisionReason": "FP8 until step 20: the cosine is 0.9"}
    second = {"pods": (an_ended_pod(139, uid="1"), a_running_pod("2", created=20))}
    snapshots = [
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(1, pod="1", resolved=asked)),
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(2, pod="1", resolved=kept)),
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(3, pod="1", resolved=given_up)),
        a_snapshot(pods=(a_running_pod("1"),), report=a_report(4, pod="1", resolved=given_up | {"rows": 7})),
        a_snapshot(**second),
        a_snapshot(**second, report=a_report(1, pod="2", resolved=asked)),
        a_snapshot(**second, report=a_report(2, pod="2", resolved=given_up)),
    ]
    status, reported = FineTuneJobStatus(), []
    for snapshot in snapshots:
        new = _status_of(replace(snapshot, status=status))
        transitions = [each for each in find_transitions(status, new) if each.reason == "PrecisionFallback"]
        reported.append([(each.message, each.is_warning) for each in transitions])
        status = new
    said = [(f"frozen weights are multiplied in BF16: {given_up['precisionReason']}", True)]
    assert reported == [[], [], said, [], [], [], said]


def test_published_weights_that_lost_the_training_are_a_warning_beside_the_success() -> None:
    judgement = Judgement(
        data=JudgedRows.EVALUATION, rows=4, tokens=90, base_loss=3, merged_loss=1, warnings=("Q4_K_M keeps 5 %",)
    )
    succeeded = a_snapshot(pods=(an_ended_pod(0, SUCCEEDED.model_copy(update={"judgement": judgement})),))
    status = _status_of(succeeded)
    assert status.judgement == judgement
    found = find_transitions(FineTuneJobStatus(), status)
    assert [(each.reason, each.message, each.is_warning) for each in found[-2:]] == [
        ("Succeeded", found[-2].message, False),
        ("ExportWarning", "Q4_K_M keeps 5 %", True),
    ]
    assert not find_transitions(status, _status_of(replace(succeeded, status=status)))
