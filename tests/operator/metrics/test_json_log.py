"""The log of a real operator in JSON: every line, whoever wrote it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster


@pytest.fixture
def json_operator(operator: OperatorProcess) -> Iterator[OperatorProcess]:
    operator.stop()
    operator.log_format = "json"
    operator.start()
    yield operator
    operator.stop()
    operator.log_format = "text"
    operator.start()


def test_every_line_is_an_object_and_those_about_a_job_name_it(
    json_operator: OperatorProcess, kubelet: PlayedKubelet, jobs: Any
) -> None:
    job = jobs.create("logged")
    kubelet.run(kubelet.wait_for_pod("logged"))
    jobs.wait_for_phase("logged", "Running")

    lines = [json.loads(line) for line in json_operator.log.splitlines()]
    assert {line["logger"].partition(".")[0] for line in lines} >= {"finetune_operator", "kopf"}
    assert all({"time", "level", "message", "pod"} <= line.keys() for line in lines)

    about = [line for line in lines if line.get("job") == "logged"]
    assert about
    for line in about:
        assert line["namespace"] == jobs.namespace
        assert line["job_uid"] == job["metadata"]["uid"]
