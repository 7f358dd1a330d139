"""The dev cluster starts in seconds and leaves nothing behind, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_devcluster.cluster import ClusterOptions, DevCluster

pytestmark = pytest.mark.cluster
START_LIMIT_SECONDS = 30  # 4-7 s on two idle cores; the suite may share them
OWNER = """
import signal, time
from finetune_devcluster.cluster import DevCluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores it
with DevCluster.start() as cluster:
    print(cluster.folder, flush=True)
    time.sleep(600)
"""


def processes_of(folder: str) -> list[str]:
    """Command lines that mention a folder, other than this process's own children that already ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if folder in command:
                found.append(command)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_cluster_whose_owner_ends_leaves_no_process(number: signal.Signals) -> None:
    began = time.monotonic()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with owner:
        assert owner.stdout
        folder = owner.stdout.readline().strip()
        assert time.monotonic() - began < START_LIMIT_SECONDS
        assert len(processes_of(folder)) >= 4
        owner.send_signal(number)
        owner.wait(30)
    deadline = time.monotonic() + 10
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    if number == signal.SIGINT:
        assert not Path(folder).exists()


def test_the_folder_of_a_killed_owner_is_removed_by_the_next_start(dev_cluster: DevCluster) -> None:
    parent = dev_cluster.folder.parent
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = parent / f"finetune-devcluster-{gone.pid}-stale"
    stale.mkdir()
    with DevCluster.start(ClusterOptions(kubeconfig=dev_cluster.kubeconfig)):
        assert not stale.exists()
    assert dev_cluster.folder.exists(), "the folder of a living owner stays"


def test_an_existing_cluster_can_be_used_instead(dev_cluster: DevCluster) -> None:
    with DevCluster.start(ClusterOptions(kubeconfig=dev_cluster.kubeconfig)) as attached:
        assert attached.api_url == dev_cluster.api_url
        versions = json.loads(attached.kubectl("version", "-o", "json").stdout)
        assert versions["serverVersion"]["gitVersion"] == versions["clientVersion"]["gitVersion"]
        with pytest.raises(RuntimeError, match="start a cluster instead"):
            attached.user_kubeconfig("somebody")
    assert dev_cluster.kubectl("get", "--raw", "/readyz").stdout == "ok"


def test_kubectl_failures_carry_what_kubectl_said(dev_cluster: DevCluster) -> None:
    with pytest.raises(RuntimeError, match='namespaces "nowhere" not found'):
        dev_cluster.kubectl("get", "namespace", "nowhere")
    assert "KUBECONFIG" not in os.environ
