"""Logs by the path of a real cluster: client, API server, kubelet's endpoint, the files of the pod's container."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.process_node.node import NodeOptions, ProcessNode
from finetune_test_operator.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

TRAINER = """#!/bin/sh
if [ "$1" = preflight ]; then echo "checks of $FINETUNE_ATTEMPT_ID"; exit 10; fi
if mkdir {folder}/seen 2>/dev/null; then
  printf 'first attempt\\nstep 1\\n\\033[2Jnode is going down\\n'
  exit 30
fi
echo second attempt
until [ -e {folder}/go ]; do sleep 0.1; done
for step in 1 2 3; do echo "step $step of $((40 + 2))"; sleep 0.3; done
exit 10
"""
"""A trainer that is interrupted once, then writes slowly and fails."""
LOGS_TOO = (("", "pods/log", "get"), ("", "pods", "list"), ("finetune.dev", "finetunejobs", "get,list"))


@pytest.fixture
def node(dev_cluster: DevCluster, namespace: str, tmp_path: Path) -> Iterator[ProcessNode]:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "finetune-trainer").write_text(TRAINER.format(folder=tmp_path))
    (programs / "finetune-trainer").chmod(0o755)
    options = NodeOptions(images={"finetune-trainer": programs}, name=f"node-of-{namespace}")
    with ProcessNode.start(dev_cluster, options) as node:
        yield node


def test_logs_are_read_followed_and_those_of_earlier_attempts_kept(
    operator: OperatorProcess, node: ProcessNode, jobs: Any, users: Any, finetune: Any, tmp_path: Path
) -> None:
    me = ("--kubeconfig", users.make("reader", LOGS_TOO))
    jobs.create("bot")
    jobs.wait("bot", lambda status: len(status.get("attempts", ())) == 2, "the second attempt", seconds=40)
    first = finetune("logs", "bot", "--attempt", "1", *me)
    assert (first.code, first.out) == (0, "first attempt\nstep 1\nnode is going down\n")
    assert finetune("logs", "bot", "--attempt", "1", "--tail", "1", *me).out == "node is going down\n"
    assert finetune("logs", "bot", *me).out == "second attempt\n"
    assert "has 2 pods of its trainer: write --attempt 1 to 2" in finetune("logs", "bot", "--attempt", "3", *me).err

    # Followed from before the first step to the end of the pod, which ends the command.
    threading.Timer(1, (tmp_path / "go").touch).start()
    began = time.monotonic()
    followed = finetune("logs", "bot", "-f", *me)
    assert time.monotonic() - began > 1.5, "it waited for what was still to come"
    assert followed.out == "second attempt\nstep 1 of 42\nstep 2 of 42\nstep 3 of 42\n"
    jobs.wait_for_phase("bot", "Failed")
    assert finetune("logs", "bot", "--tail", "1", *me).out == "step 3 of 42\n"


def test_the_log_of_the_checks_is_read_too(
    operator: OperatorProcess, node: ProcessNode, jobs: Any, users: Any, finetune: Any
) -> None:
    me = ("--kubeconfig", users.make("reader", LOGS_TOO))
    jobs.create("checked", preflight="Run")
    jobs.wait_for_phase("checked", "Failed", seconds=40)
    assert finetune("logs", "checked", "--preflight", *me).out.startswith("checks of ")
    none = finetune("logs", "checked", *me)
    assert none.code == 3
    assert "has no pod of its trainer any more, or not yet" in none.err
