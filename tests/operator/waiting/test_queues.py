"""A queue that holds and starts a Job, played on a real control plane: the operator leaves its suspension alone."""

import time
from typing import Any

import pytest
from kubernetes import client

from finetune_api.vocabulary import QUEUE_LABEL
from finetune_devcluster.kueue import install_kueue_crds
from finetune_operator.desired.names import child_name
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster

OLD_BEHAVIOUR_SECONDS = 3  # an operator that resumes such a Job does it within one


def test_a_job_that_a_queue_suspends_stays_suspended_until_the_queue_starts_it(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    install_kueue_crds(jobs.cluster)
    jobs.create("held")
    kubelet.wait_for_pod("held")
    batch: Any = client.BatchV1Api(jobs.cluster.api_client())
    name = jobs.child("held", child_name)["metadata"]["name"]

    held = {"metadata": {"labels": {QUEUE_LABEL: "research"}}, "spec": {"suspend": True}}
    batch.patch_namespaced_job(name, namespace, held)
    jobs.wait("held", lambda status: status.get("reason") == "WaitingInQueue", "the queue's wait", 45)
    time.sleep(OLD_BEHAVIOUR_SECONDS)
    assert jobs.child("held", child_name)["spec"]["suspend"] is True

    batch.patch_namespaced_job(name, namespace, {"spec": {"suspend": False}})
    kubelet.run(kubelet.wait_for_pod("held"))
    jobs.patch_run_policy("held", suspend=True)
    jobs.wait("held", lambda status: status.get("reason") == "QueueDecides", "who may suspend the Job")
    time.sleep(OLD_BEHAVIOUR_SECONDS)
    assert jobs.child("held", child_name)["spec"]["suspend"] is False
