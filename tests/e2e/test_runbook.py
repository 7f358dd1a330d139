"""The runbook: each of its commands, run as it stands there and in its order, while a job trains."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.failures import FAILURES, Consequence
from finetune_devcluster.kueue import install_kueue_crds, remove_kueue_crds
from finetune_devcluster.platform import CHECKOUT, SYSTEM_NAMESPACE, Platform
from finetune_operator.status_reasons import STATUS_REASONS
from finetune_test_programs.binaries import helm_binary, kube_binary

PAGE = (CHECKOUT / "docs/runbook.md").read_text()
NAMESPACE, NAME = "team", "support-bot"
BLOCK = re.compile(r"```sh\n(?P<commands>.*?)```\n(?:```text\n(?P<expected>.*?)```)?", re.DOTALL)
WAITS_FOR_A_PERSON = [
    *(reason.value for reason, row in STATUS_REASONS.items() if row.is_stalled),
    *(reason.value for reason, row in FAILURES.items() if row.seen_by_operator is Consequence.WAITS),
]


@pytest.mark.parametrize("reason", WAITS_FOR_A_PERSON)
def test_every_reason_to_wait_has_its_section(reason: str) -> None:
    assert f"\n### {reason}\n" in PAGE


def test_every_link_of_the_page_has_its_section() -> None:
    headings = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {link for link in re.findall(r"\(#([^)]*)\)", PAGE) if link not in anchors} == set()


@pytest.fixture
def desk(platform: Platform, tmp_path: Path) -> Iterator[Path]:
    """The folder of whoever is paged: kubectl and helm on PATH, the chart and its values."""
    programs = {"kubectl": f"{kube_binary()} kubectl", "helm": str(helm_binary())}
    (tmp_path / "bin").mkdir()
    for name, command in programs.items():
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)

    (tmp_path / "charts").symlink_to(CHECKOUT / "charts")
    values = platform.cluster.helm("get", "values", "finetune-operator", "-n", SYSTEM_NAMESPACE, "-o", "yaml").stdout
    (tmp_path / "values.yaml").write_text(values)
    install_kueue_crds(platform.cluster)  # whoever reads about queues has Kueue
    yield tmp_path
    remove_kueue_crds(platform.cluster)
    platform.install_operator()


def _run(commands: str, platform: Platform, desk: Path) -> str:
    environment = os.environ | {
        "PATH": f"{desk / 'bin'}:{os.environ['PATH']}",
        "KUBECONFIG": str(platform.cluster.kubeconfig),
        "HOME": str(desk),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=desk, env=environment, capture_output=True, text=True, check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}\n{platform.operator_log()}"
    return done.stdout


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_every_command_of_the_page_succeeds(platform: Platform, desk: Path, small_job: Any) -> None:
    platform.create_namespace(NAMESPACE)
    job = small_job(NAME, training={"maxSteps": 5000, "batchSize": 1, "gradientAccumulation": 1})
    job["metadata"]["namespace"] = NAMESPACE
    platform.apply(job)
    running = {"what": "training", "timeout": 120.0}
    platform.wait_for(NAMESPACE, NAME, lambda job: "progress" in job.get("status", {}), **running)

    # Sections of alerts may stand behind it, but nothing works once the operator and its jobs are gone.
    start = PAGE.index("\n## Uninstall\n")
    end = PAGE.index("\n## ", start + 1)
    names, *blocks = BLOCK.finditer(PAGE[:start] + PAGE[end:] + PAGE[start:end])
    assert len(blocks) >= 20
    for block in blocks:
        uids = [pod.metadata.uid for pod in platform.trainer_pods(NAMESPACE, NAME)]
        output = _run(f"{names['commands']}\n{block['commands']}", platform, desk)
        for fragment in (block["expected"] or "").splitlines():
            assert fragment in output, f"{block['commands']}\n{output}"

        # Upgrades and restarts of the operator leave trainers alone.
        if "helm upgrade" in block["commands"] or "rollout" in block["commands"]:
            assert [pod.metadata.uid for pod in platform.trainer_pods(NAMESPACE, NAME)] == uids

    assert yaml.safe_load((desk / "jobs.yaml").read_text())["items"][0]["metadata"]["name"]
