"""`kubectl finetune artifacts`: what a job made, as its status lists it; `finetune`, which has S3, downloads it.

A status lists exactly what the manifest in S3 does, so a listing needs no right to the bucket.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from finetune_api.base import Json
from finetune_client.connection import Cluster
from finetune_client.errors import ClientError, Exit
from finetune_client.terminal.screen import plain_table, print_line
from finetune_client.terminal.text import find, number, word

_NAME = 253


def show_artifacts(cluster: Cluster, out: Console, options: argparse.Namespace) -> int:
    """Print a job's artifacts with size, digest and address, or have them downloaded; returns the exit code."""
    namespace, slash, name = options.job.rpartition("/")
    if options.download is not None:
        return _hand_over()
    if slash:
        cluster.namespace = namespace

    job = cluster.get_job(name)
    artifacts = [each for each in find(job, "status", "artifacts") or () if isinstance(each, dict)]
    if not artifacts:
        phase = word(job, "status", "phase", limit=32) or "not known yet"
        raise ClientError(f"job {name} has no artifacts yet: its phase is {phase}; `finetune watch {name}` waits")

    _print(out, job, [each for each in artifacts if not options.type or each.get("type") in options.type])
    return int(Exit.OK)


def _print(out: Console, job: Json, artifacts: list[Json]) -> None:
    table = plain_table("TYPE", "QUANTIZATION", "LOSS", "BYTES", "SHA256")
    for each in artifacts:
        loss = number(each, "loss")
        cells = (word(each, "type", limit=32), word(each, "quantization", limit=16) or "-")
        size = f"{number(each, 'bytes') or 0:,.0f}"
        digest = word(each, "sha256", limit=64)[:12]
        table.add_row(*map(Text, (*cells, "-" if loss is None else f"{loss:.4f}", size, f"{digest}…")))
    out.print(table)

    for each in artifacts:
        print_line(out, f"{word(each, 'sha256', limit=64)}  {word(each, 'uri')}")
    for each in find(job, "status", "failedExports") or ():
        kind = f"{word(each, 'type', limit=32)} {word(each, 'quantization', limit=16)}"
        print_line(out, f"not made: {kind}: {word(each, 'message', limit=300)}")
    name, namespace = word(job, "metadata", "name", limit=_NAME), word(job, "metadata", "namespace", limit=_NAME)
    print_line(out, f"as the job's status lists them; `finetune artifacts {namespace}/{name}` also asks the store")


def _hand_over() -> int:
    """Run `finetune` with the words as they were typed: both programs have the same options."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which("finetune", path=beside)
    if program is None:
        raise ClientError("program finetune is not installed: pip install 'finetune-operator[trainer]'", Exit.USAGE)
    return subprocess.run([program, *sys.argv[1:]], check=False).returncode
