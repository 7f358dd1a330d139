"""Memory that runs out, which would run out again: one pod, and no other one after it."""

from typing import Any

import pytest

from finetune_api.base import Json
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster


def test_a_trainer_that_was_killed_for_its_memory_is_not_tried_again(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("hungry", maxRetries=3)
    pod = kubelet.wait_for_pod("hungry")
    kubelet.run(pod)
    jobs.wait_for_phase("hungry", "Running")

    kubelet.end(pod, 137, reason="OOMKilled")
    status = jobs.wait_for_phase("hungry", "Failed")["status"]
    assert status["failure"]["reason"] == "OutOfMemory"
    assert "limit of 32Gi" in status["failure"]["message"]
    assert "spec.resources.memory" in status["failure"]["hint"]

    # The Job has ended for good: without that, the Job controller would make another pod after 10 s.
    child = wait_for(lambda: jobs.child("hungry") if jobs.child("hungry")["status"].get("failed") else None, "the end")
    wait_for(lambda: "Failed" in _conditions(jobs.child("hungry")), "the Job controller's verdict", 30)
    assert child["spec"]["backoffLimit"] == 3
    assert [each.metadata.uid for each in kubelet.pods("hungry")] == [pod.metadata.uid]
    assert len(jobs.get("hungry")["status"]["attempts"]) == 1


def _conditions(child: Json) -> list[str]:
    return [each["type"] for each in child["status"].get("conditions", []) if each["status"] == "True"]
