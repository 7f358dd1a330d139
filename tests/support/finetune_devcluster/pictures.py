"""`make pictures`: docs/watch.svg and docs/top.svg, as `finetune` shows many jobs of a development cluster.

Everything but the training is real: API server, scheduler, operator, pods, their reports and the client. The trainers
report steps and losses without a model (reporting_trainer.py), as this machine has no GPUs; the node offers eight.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from finetune_client.connection import Cluster
from finetune_client.show import list_jobs, show_top
from finetune_client.watch import Board
from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.platform import CHECKOUT
from finetune_devcluster.process_node.node import NodeOptions, ProcessNode
from finetune_test_operator.operator_process import OperatorProcess

GPUS = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "2Ti", "pods": "110", "nvidia.com/gpu": "8"}
WIDTH = 124
"""Cells of the pictures' terminal."""

JOBS = (
    ("team-support", "support-bot-llama-8b"),
    ("team-support", "support-bot-qwen3-8b"),
    ("team-support", "intent-router-1b"),
    ("team-support", "ticket-summaries-bad-row"),
    ("team-search", "query-rewriter-3b"),
    ("team-search", "reranker-qwen3-4b"),
    ("team-search", "answers-llama-8b-dora"),
    ("team-code", "review-notes-8b"),
    ("team-code", "commit-messages-1b"),
    ("team-code", "docstrings-3b"),
    ("team-code", "sql-assistant-8b"),
)
"""More jobs than the node has GPUs."""


@contextmanager
def running_jobs(work: Path) -> Iterator[Cluster]:
    """The cluster of many jobs, as its administrator's kubeconfig opens it."""
    programs = work / "programs"
    programs.mkdir()
    trainer = programs / "finetune-trainer"
    python = CHECKOUT / ".venv/bin/python"
    trainer.write_text(f'#!/bin/sh\nexec {python} -m finetune_test_programs.reporting_trainer "$@"\n')
    trainer.chmod(0o755)

    with DevCluster.start() as cluster:
        operator = OperatorProcess(cluster, work)
        operator.start()
        try:
            with ProcessNode.start(cluster, NodeOptions(images={"finetune-trainer": programs}, capacity=GPUS)):
                create_jobs(cluster)
                yield Cluster.open(str(cluster.kubeconfig), None, None)
        finally:
            operator.stop()


def create_jobs(cluster: DevCluster) -> None:
    """Create a namespace for each team, and its jobs."""
    core: Any = client.CoreV1Api(cluster.api_client())
    objects: Any = client.CustomObjectsApi(cluster.api_client())
    for namespace in dict.fromkeys(namespace for namespace, _ in JOBS):
        core.create_namespace({"metadata": {"name": namespace}})

    for namespace, name in JOBS:
        spec = {
            "model": {"source": "hf://meta-llama/Llama-3.1-8B-Instruct"},
            "dataset": {"source": "s3://acme-data/chat.jsonl"},
            "output": {"s3": {"bucket": "acme-models"}},
            "resources": {"gpus": 1, "cpu": "2", "memory": "8Gi"},
            "runPolicy": {"preflight": "Skip"},
        }
        body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        objects.create_namespaced_custom_object("finetune.dev", "v1alpha1", namespace, "finetunejobs", body)
        time.sleep(1)


def watch_for(cluster: Cluster, seconds: float) -> Board:
    """Look at all jobs every two seconds, as `finetune watch -A` does."""
    board, end = Board(), time.monotonic() + seconds
    while time.monotonic() < end:
        board.update(cluster.list_jobs(None))
        time.sleep(2)
    return board


def save(console: Console, path: Path, title: str) -> None:
    """Write what was shown as an SVG in the terminal's own colours, without fonts from elsewhere."""
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(path), title=title, code_format=template, clear=False)
    print(f"wrote {path}")


def recorder(width: int) -> Console:
    """A console that records, as wide as the picture."""
    console = Console(record=True, width=width, force_terminal=True, color_system="truecolor", highlight=False)
    console.file = sys.stderr
    return console


def main() -> int:
    """Run the jobs and take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="time of the watch (default: 150)")
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "docs")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="finetune-pictures-") as work, running_jobs(Path(work)) as cluster:
        board = watch_for(cluster, options.seconds)

        watch = recorder(WIDTH)
        watch.print("$ finetune watch -A")
        watch.print(board.draw(WIDTH, 40, everywhere=True))
        save(watch, options.folder / "watch.svg", "finetune watch -A")

        top = recorder(WIDTH)
        top.print("$ finetune top -A")
        show_top(cluster, top, everywhere=True)
        save(top, options.folder / "top.svg", "finetune top -A")

        # For docs/client.md, whose examples are copied from here.
        plain = Console(width=WIDTH, highlight=False)
        for form in ("", "wide"):
            list_jobs(cluster, plain, [], everywhere=True, form=form)
    return 0


if __name__ == "__main__":
    sys.exit(main())
