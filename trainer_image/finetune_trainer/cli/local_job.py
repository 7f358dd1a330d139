"""The verbs that take a job: `finetune init`, `finetune run` and `finetune validate`, with their options.

Whatever is heavy is imported when it is called: `finetune --help` reads this file too.
"""

import argparse
import shlex
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from finetune_trainer.cli.machine import describe_device, has_nvidia_gpu

if TYPE_CHECKING:
    from finetune_api.job import FineTuneJob
    from finetune_trainer.cli.manifest.read import LocalJob

DEFAULT_OUTPUT = Path("results")
"""Folder for the results of a job without a manifest, which names no bucket."""
INVALID = 10
"""Exit code of an invalid manifest (ExitCode.CONFIGURATION)."""
console = Console(stderr=True, highlight=False)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `finetune run`."""
    _add_manifest_options(parser)
    parser.add_argument("--verbose", action="store_true", help="show the trainer's log")


def add_validate_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `finetune validate`."""
    _add_manifest_options(parser)
    parser.add_argument(
        "--manifest-only", action="store_true", help="check the manifest alone: fetch nothing, write nothing"
    )


def _add_manifest_options(parser: argparse.ArgumentParser) -> None:
    from finetune_trainer.cli.manifest.options import add_field_options

    parser.add_argument("manifest", type=Path, nargs="?", help="YAML file with one FineTuneJob")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for the results (default: spec.output.s3; without a manifest: {DEFAULT_OUTPUT}/)",
    )
    parser.add_argument(
        "--credentials",
        type=Path,
        metavar="DIR",
        help="folder with output/, model/, dataset/ and hub/, each like a mounted Secret (default: boto3's chain)",
    )
    add_field_options(parser)


def add_init_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `finetune init`."""
    from finetune_trainer.cli.manifest.options import add_field_options

    parser.add_argument("manifest", type=Path, nargs="?", default=Path("job.yaml"), help="file to write (job.yaml)")
    parser.add_argument("--bucket", metavar="NAME", help="S3 bucket for the results; without one, a folder takes them")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_field_options(parser, any_field=False)


def call_run(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Trains on this machine; returns the exit code."""
    found = _load(options)
    if found is None:
        return INVALID
    for note in found.notes:
        _say(note)
    from finetune_trainer.cli.run import run_here

    return run_here(found.job, options.output, options.credentials, verbose=options.verbose)


def call_validate(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Checks the job on this machine; returns the exit code."""
    found = _load(options)
    if found is None:
        return INVALID
    for note in (*found.notes, *found.cluster_notes):
        _say(f"note: {note}")
    if options.manifest_only:
        _say(f"{options.manifest or 'the job'}: valid")
        return 0

    if (device := describe_device(found.job.spec.resources.gpus, has_nvidia_gpu())) is not None:
        _say(f"note: {device}")
    code = _check_here(found.job, options.output, options.credentials)
    if code == 0:
        _say(f"nothing keeps it from running. Next:\n  {shlex.join(['finetune', 'run', *sys.argv[2:]])}")
    return code


def call_init(options: argparse.Namespace, _: Sequence[str]) -> int:
    """Writes a manifest; returns the exit code."""
    from finetune_trainer.cli.manifest.starter import write_starter

    return write_starter(options, console)


def _load(options: argparse.Namespace) -> "LocalJob | None":
    """Reads the job; prints all its errors and returns None if it is invalid."""
    from finetune_trainer.cli.manifest.read import InvalidManifestError, read_job

    if options.manifest is None and options.output is None:
        options.output = DEFAULT_OUTPUT
    try:
        return read_job(options.manifest, options.changes, needs_bucket=options.output is None)
    except InvalidManifestError as error:
        for line in error.errors:
            _say(line)
    return None


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _check_here(job: "FineTuneJob", output: Path | None, credentials: Path | None) -> int:
    """Runs preflight on this machine's CPU; returns the exit code."""
    from finetune_trainer.preflight.process_memory import block_torch_import

    block_torch_import()  # before anything imports transformers, which would import torch
    from finetune_api.run_config import JobIdentity, RunConfig
    from finetune_trainer.cli.preflight import preflight_here
    from finetune_trainer.job.logging_setup import configure_screen_logging
    from finetune_trainer.job.settings import LOCAL_ATTEMPT, LOCAL_HUB_RETRIES, Settings

    configure_screen_logging(_say, verbose=False)
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=str(uuid.uuid4()))

    with tempfile.TemporaryDirectory(prefix=f"finetune-{job.metadata.name}-") as work:
        settings = Settings(
            work=Path(work),
            attempt_id=LOCAL_ATTEMPT,
            credentials=credentials,
            output_folder=output,
            hub_retries=LOCAL_HUB_RETRIES,
        )
        return preflight_here(RunConfig.from_spec(identity, job.spec, progress=None), settings)
