"""spec.scheduling: what may be passed on to queues and schedulers, by the API server and by `finetune validate`."""

from typing import Any

import pytest

from finetune_api.spec.scheduling import SchedulingSpec
from finetune_test_operator.two_doors import refusals

pytestmark = pytest.mark.cluster

TOO_LONG = "a" * 64

VALID: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a queue of Kueue": {"queueName": "team.gpus", "workloadPriorityClassName": "p" * 63},
    "Volcano": {"schedulerName": "volcano", "annotations": {"scheduling.volcano.sh/queue-name": "a" * 256}},
    "Run:ai": {"schedulerName": "runai-scheduler", "labels": {"runai/queue": "a", "run.ai/project": "a"}},
    "KAI": {"schedulerName": "kai-scheduler", "labels": {"kai.scheduler/queue": "a", "volcano.sh/x": ""}},
    "Kueue's limit of time": {"labels": {"kueue.x-k8s.io/max-exec-time-seconds": "3600"}},
    "Kueue's topology": {
        "annotations": {"kueue.x-k8s.io/podset-required-topology": "cloud/rack", "provreq.kueue.x-k8s.io/x": "1"}
    },
}

LABELS, ANNOTATIONS = "write labels of volcano.sh", "write annotations of volcano.sh"
INVALID: dict[str, tuple[dict[str, Any], str, str]] = {
    "a queue's name that is no label": ({"queueName": TOO_LONG}, "scheduling.queueName", "63"),
    "a queue of another namespace": ({"queueName": "b/gpus"}, "scheduling.queueName", "a LocalQueue of the job's"),
    "a priority without a queue": (
        {"workloadPriorityClassName": "high"},
        "spec.scheduling.workloadPriorityClassName",
        "write spec.scheduling.queueName too",
    ),
    "a priority whose name is no label": (
        {"queueName": "gpus", "workloadPriorityClassName": TOO_LONG},
        "spec.scheduling.workloadPriorityClassName",
        "at most 63 characters",
    ),
    "a label of the operator": ({"labels": {"finetune.dev/job-uid": "x"}}, "scheduling.labels", LABELS),
    "a label of Kubernetes": ({"labels": {"app.kubernetes.io/component": "x"}}, "scheduling.labels", LABELS),
    "a label that looks like a scheduler's": ({"labels": {"evil.volcano.sh/x": "x"}}, "scheduling.labels", LABELS),
    "another end of a label": ({"labels": {"runai/x y": "x"}}, "scheduling.labels", LABELS),
    "Kueue's queue as a label": (
        {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}},
        "scheduling.labels",
        "Kueue's queue and priority are queueName and workloadPriorityClassName",
    ),
    "another job's Workload": (
        {"labels": {"kueue.x-k8s.io/prebuilt-workload-name": "x"}},
        "scheduling.labels",
        LABELS,
    ),
    "an annotation of Kubernetes": (
        {"annotations": {"kubernetes.io/description": "x"}},
        "scheduling.annotations",
        ANNOTATIONS,
    ),
    "an annotation of the operator": (
        {"annotations": {"finetune.dev/active-seconds": "0"}},
        "scheduling.annotations",
        ANNOTATIONS,
    ),
}


def _with(minimal: dict[str, Any], scheduling: dict[str, Any]) -> dict[str, Any]:
    return minimal | {"spec": minimal["spec"] | {"scheduling": scheduling}}


@pytest.mark.parametrize("scheduling", VALID.values(), ids=VALID)
def test_what_schedulers_read_passes(jobs: Any, minimal: dict[str, Any], scheduling: dict[str, Any]) -> None:
    manifest = _with(minimal, scheduling)
    assert refusals(jobs, manifest) == ("", "")


@pytest.mark.parametrize(("scheduling", "field", "remedy"), INVALID.values(), ids=INVALID)
def test_everything_else_is_refused_with_what_to_write(
    jobs: Any, minimal: dict[str, Any], scheduling: dict[str, Any], field: str, remedy: str
) -> None:
    manifest = _with(minimal, scheduling)
    for refusal in refusals(jobs, manifest):
        assert field in refusal
        assert remedy in refusal


def test_every_rule_is_broken_by_a_manifest_of_the_table() -> None:
    remedies = [remedy for _, _, remedy in INVALID.values()]
    assert all(any(remedy in rule.message for remedy in remedies) for rule in SchedulingSpec.rules)
