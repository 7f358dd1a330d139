"""Terminated pods are remembered, and not for ever."""

import pytest

from finetune_operator.observe.terminated_pods import TerminatedPods


def test_only_the_newest_terminated_pods_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.observe.terminated_pods.MAX_TERMINATED_PODS", 2)
    pods = TerminatedPods()
    for uid in ("1", "2", "3"):
        terminated = {"exitCode": 30}
        pods.note(
            {
                "metadata": {"namespace": "n", "name": uid, "uid": uid, "labels": {"finetune.dev/job-uid": "job"}},
                "status": {"containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}]},
            }
        )
    pods.note({"metadata": {"namespace": "n", "name": "4", "uid": "4"}, "status": {}})
    assert [pod.uid for pod in pods.of("n", "job")] == ["2", "3"]
