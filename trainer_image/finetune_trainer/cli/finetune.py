"""`finetune`: the commands that a user runs on their own machine.

    finetune run job.yaml [--output DIR]          the same manifest as on a cluster: a progress bar, then the artifacts
    finetune validate job.yaml [--output DIR]     every error of the manifest, then those of model, data and output
    finetune export --base SRC --output DIR ...   merge an adapter and write GGUF files: no cluster, no training
    finetune artifacts JOB [--download DIR]       list what a job made, or download it with every digest checked

A verb's options are made, and its code is imported, only if that verb is called: `finetune --help` answers at once.
"""

import argparse
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from pydantic import ValidationError

    from finetune_api.job import FineTuneJob

INVALID = 10
"""Exit code of an invalid manifest or invalid arguments (ExitCode.CONFIGURATION)."""
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Verb:
    """One command: its help, its options, and the function that carries it out."""

    help: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace, Sequence[str]], int]
    """Takes the options and the words that no option takes; returns the exit code."""


def main() -> None:
    """Console script."""
    verb, options, unknown = parse(sys.argv[1:])
    sys.exit(VERBS[verb].call(options, unknown))


def parse(words: Sequence[str]) -> tuple[str, argparse.Namespace, list[str]]:
    """Splits the command line into verb, options, and words that are no option.

    `export` reports such words with its other errors; for any other verb, and for an unknown one, this exits with 2.
    """
    examples = "\n".join(f"  {verb.example}" for verb in VERBS.values())
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a model as a FineTuneJob describes it.",
        epilog=f"examples:\n{examples}\n\n`finetune VERB --help` describes the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    for name, verb in VERBS.items():
        subparser = verbs.add_parser(
            name,
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=name != "export",
        )
        # Making the options of a verb imports what they refer to.
        if name in words:
            verb.add_options(subparser)

    options, unknown = parser.parse_known_args(words)
    if unknown and options.verb != "export":
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options.verb, options, unknown


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_manifest_options(parser)
    parser.add_argument("--verbose", action="store_true", help="show the trainer's log")


def _add_validate_options(parser: argparse.ArgumentParser) -> None:
    _add_manifest_options(parser)
    parser.add_argument(
        "--manifest-only", action="store_true", help="check the manifest alone: fetch nothing, write nothing"
    )


def _add_manifest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, help="YAML file with one FineTuneJob")
    parser.add_argument("--output", type=Path, help="folder for the results (default: spec.output.s3)")
    parser.add_argument(
        "--credentials",
        type=Path,
        metavar="DIR",
        help="folder with output/, model/, dataset/ and hub/, each like a mounted Secret (default: boto3's chain)",
    )


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    from finetune_trainer.cli.export_arguments import add_export_arguments

    add_export_arguments(parser)


def _add_artifacts_options(parser: argparse.ArgumentParser) -> None:
    from finetune_api.vocabulary import ArtifactType

    kinds = [kind.value for kind in ArtifactType]
    parser.add_argument(
        "job", help="job.yaml, [namespace/]name in the cluster, s3://bucket/prefix/job/, or a folder with manifest.json"
    )
    parser.add_argument("--download", type=Path, metavar="DIR", help="download into this folder and check every digest")
    parser.add_argument("--type", action="append", choices=kinds, help="only these artifacts; may be repeated")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="the folder of `finetune run job.yaml --output DIR`"
    )
    parser.add_argument(
        "--credentials", type=Path, metavar="DIR", help="folder with AWS_ACCESS_KEY_ID and so on as files"
    )
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 store that is not AWS (default: the job's)")
    parser.add_argument("--region", help="region of the store (default: the job's)")


def _run(options: argparse.Namespace, _: Sequence[str]) -> int:
    job = _load(options.manifest)
    if job is None:
        return INVALID
    from finetune_trainer.cli.run import run_here

    return run_here(job, options.output, options.credentials, verbose=options.verbose)


def _validate(options: argparse.Namespace, _: Sequence[str]) -> int:
    job = _load(options.manifest)
    if job is None:
        return INVALID
    if options.manifest_only:
        console.print(f"{options.manifest}: valid")
        return 0
    return validate(job, options.output, options.credentials)


def _export(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    from finetune_trainer.cli.export_arguments import InvalidArgumentsError, check_export_arguments

    try:
        checked = check_export_arguments(options, unknown)
    except InvalidArgumentsError as error:
        for line in error.errors:
            console.print(line, markup=False, soft_wrap=True)
        return INVALID

    # huggingface_hub reads this once, while it is imported; the export shows a bar of its own.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from finetune_trainer.cli.export import export_here  # imports torch

    return export_here(checked)


def _artifacts(options: argparse.Namespace, _: Sequence[str]) -> int:
    from finetune_trainer.cli.artifacts import artifacts_here

    return artifacts_here(options)


def _load(manifest: Path) -> "FineTuneJob | None":
    """Reads the manifest; prints all its errors and returns None if it is invalid."""
    import yaml
    from pydantic import ValidationError

    from finetune_api.job import load_manifest

    try:
        return load_manifest(manifest.read_text(encoding="utf-8"))
    except ValidationError as error:
        lines = explain_errors(error)
    except (OSError, yaml.YAMLError) as error:
        lines = [str(error)]

    for line in lines:
        console.print(f"{manifest}: {line}", markup=False, soft_wrap=True)
    return None


def explain_errors(error: "ValidationError") -> list[str]:
    """One line per error: the field's path, what was found, and what is wrong with it."""
    lines = []
    for entry in error.errors(include_url=False):
        path = ".".join(str(part) for part in entry["loc"])
        found = entry["input"] if isinstance(entry["input"], str | int | float | bool) else None
        text = entry["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: found {found!r}: {text}" if found is not None else f"{path}: {text}")
    return lines


def validate(job: "FineTuneJob", output: Path | None, credentials: Path | None) -> int:
    """Runs preflight on this machine's CPU; returns the exit code."""
    from finetune_trainer.preflight.process_memory import block_torch_import

    block_torch_import()  # before anything imports transformers, which would import torch
    from finetune_api.run_config import JobIdentity, RunConfig
    from finetune_trainer.cli.preflight import preflight_here
    from finetune_trainer.job.logging_setup import configure_logging
    from finetune_trainer.job.settings import Settings

    configure_logging(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=str(uuid.uuid4()))

    with tempfile.TemporaryDirectory(prefix=f"finetune-{job.metadata.name}-") as work:
        settings = Settings(work=Path(work), attempt_id=identity.uid, credentials=credentials, output_folder=output)
        return preflight_here(RunConfig.from_spec(identity, job.spec, progress=None), settings)


VERBS = {
    "run": Verb(
        "run a manifest on this machine, without a cluster",
        "finetune run job.yaml --output results/",
        _add_run_options,
        _run,
    ),
    "validate": Verb(
        "check a manifest, its model, data and output",
        "finetune validate job.yaml",
        _add_validate_options,
        _validate,
    ),
    "export": Verb(
        "merge an adapter and write GGUF files",
        "finetune export --base hf://org/model --adapter results/mine/adapter --output out/ --gguf Q4_K_M",
        _add_export_options,
        _export,
    ),
    "artifacts": Verb(
        "list or download what a job made",
        "finetune artifacts s3://bucket/prefix/job/ --download out/",
        _add_artifacts_options,
        _artifacts,
    ),
}
