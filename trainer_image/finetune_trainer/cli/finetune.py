"""`finetune`: the commands that a user runs on their own machine.

    finetune init [job.yaml]                      writes a commented manifest to begin with
    finetune run job.yaml [--output DIR]          the same manifest as on a cluster: a live view, then the artifacts
    finetune run --model SRC --data SRC           the same without a manifest
    finetune validate job.yaml [--output DIR]     every error of the manifest, then those of model, data and output
    finetune export --base SRC --output DIR ...   merge an adapter and write GGUF files: no cluster, no training
    finetune artifacts JOB [--download DIR]       list what a job made, or download it with every digest checked
    finetune chat RESULT [--compare]              talk to what a job made, beside its base or alone
    finetune compare A B                          two results side by side
    finetune submit|list|watch|...                jobs in a cluster, by finetune_client: no PyTorch is needed for these

A verb's options are made, and its code is imported, only if that verb is called: `finetune --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from finetune_client.verb import Verb
from finetune_client.verbs import VERBS as CLUSTER_VERBS
from finetune_trainer.cli.local_job import (
    add_init_options,
    add_run_options,
    add_validate_options,
    call_init,
    call_run,
    call_validate,
)

PARTS = ("torch", "transformers", "peft", "trl", "bitsandbytes")
INVALID = 10
"""Exit code of an invalid manifest or invalid arguments (ExitCode.CONFIGURATION)."""
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Console script."""
    if sys.argv[1:2] == ["__complete"]:
        from finetune_client.complete import print_candidates

        print_candidates(sys.argv[2:], VERBS)
        sys.exit(0)

    try:
        verb, options, unknown = parse(sys.argv[1:])
        code = VERBS[verb].call(options, unknown)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("finetune_"):
            raise
        message = (
            f"package {error.name} is missing: what runs on this machine needs pip install 'finetune-operator[trainer]'"
        )
        console.print(message, markup=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(code)


def parse(words: Sequence[str]) -> tuple[str, argparse.Namespace, list[str]]:
    """Splits the command line into verb, options, and words that are no option.

    `export` reports such words with its other errors; for any other verb, and for an unknown one, this exits with 2.
    """
    examples = "\n".join(f"  {verb.examples[0]}" for verb in VERBS.values())
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tune a model as a FineTuneJob describes it.",
        epilog=f"examples:\n{examples}\n\n`finetune VERB --help` describes the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show the versions of this program and of its parts"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    for name, verb in VERBS.items():
        subparser = verbs.add_parser(
            name,
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog="\n  ".join(("examples:", *verb.examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=name != "export",
        )
        # Making the options of a verb imports what they refer to.
        if name in words:
            verb.add_options(subparser)

    options, unknown = parser.parse_known_args(words)
    if unknown and options.verb != "export":
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if getattr(options, "changes", None) == [] and options.manifest is None:
        parser.error(f"finetune {options.verb} needs a manifest, or --model and --data")
    return options.verb, options, unknown


class _ShowVersion(argparse.Action):
    """Prints the versions, read from the packages' metadata: nothing is imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import distributions, version

        installed = {found.metadata["Name"] for found in distributions()}
        parts = ", ".join(f"{name} {version(name) if name in installed else 'not installed'}" for name in PARTS)
        print(f"finetune {version('finetune-operator')} ({parts})")
        parser.exit()


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    from finetune_trainer.cli.export_arguments import add_export_arguments

    add_export_arguments(parser)


def _add_artifacts_options(parser: argparse.ArgumentParser) -> None:
    from finetune_client.verb import add_cluster_options, add_result_options

    parser.add_argument(
        "job",
        help="job.yaml, [namespace/]name in the cluster, s3://bucket/prefix/namespace/job/, or a result folder",
    )
    add_result_options(parser)
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="the folder of `finetune run job.yaml --output DIR`"
    )
    add_cluster_options(parser)


def _quiet_libraries() -> None:
    """Keeps libraries off the screen: they log and draw bars as soon as they are imported."""
    from finetune_trainer.job.logging_setup import configure_screen_logging

    configure_screen_logging(lambda text: console.print(text, markup=False, soft_wrap=True), verbose=False)


def _export(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    from finetune_trainer.cli.export_arguments import InvalidArgumentsError, check_export_arguments

    try:
        checked = check_export_arguments(options, unknown)
    except InvalidArgumentsError as error:
        for line in error.errors:
            console.print(line, markup=False, soft_wrap=True)
        return INVALID

    _quiet_libraries()
    from finetune_trainer.cli.export import export_here  # imports torch

    return export_here(checked)


def _artifacts(options: argparse.Namespace, _: Sequence[str]) -> int:
    from finetune_trainer.cli.artifacts import artifacts_here

    return artifacts_here(options)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    from finetune_trainer.cli.chat.options import add_chat_options

    add_chat_options(parser)


def _chat(options: argparse.Namespace, _: Sequence[str]) -> int:
    _quiet_libraries()
    from finetune_trainer.cli.chat.command import chat_here  # imports torch

    return chat_here(options)


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    from finetune_trainer.cli.compare.command import add_compare_options

    add_compare_options(parser)


def _compare(options: argparse.Namespace, _: Sequence[str]) -> int:
    from finetune_trainer.cli.compare.command import compare_here

    return compare_here(options)


VERBS = {
    "init": Verb(
        "write a commented manifest to begin with",
        (
            "finetune init",
            "finetune init job.yaml --model Qwen/Qwen3-0.6B --data train.jsonl --eval 0.05",
        ),
        add_init_options,
        call_init,
    ),
    "run": Verb(
        "train on this machine, from a manifest or from options",
        (
            "finetune run --model Qwen/Qwen3-0.6B --data train.jsonl",
            "finetune run job.yaml --output results/",
            "finetune run job.yaml --output results/ --max-steps 20 --set spec.training.batchSize=4",
        ),
        add_run_options,
        call_run,
    ),
    "validate": Verb(
        "check a manifest, its model, data and output",
        (
            "finetune validate job.yaml",
            "finetune validate job.yaml --manifest-only",
            "finetune validate --model Qwen/Qwen3-0.6B --data train.jsonl",
        ),
        add_validate_options,
        call_validate,
    ),
    "export": Verb(
        "merge an adapter and write GGUF files",
        (
            "finetune export --base hf://org/model --adapter results/mine/adapter --output out/ --gguf Q4_K_M",
            "finetune export --base ./model --output out/ --merged BF16 --gguf Q8_0 --gguf F16",
        ),
        _add_export_options,
        _export,
    ),
    "artifacts": Verb(
        "list or download what a job made",
        (
            "finetune artifacts s3://bucket/prefix/namespace/job/ --download out/",
            "finetune artifacts support-bot -n team-a",
            "finetune artifacts job.yaml --results results/",
        ),
        _add_artifacts_options,
        _artifacts,
    ),
    "chat": Verb(
        "talk to what a job made, in the terminal",
        (
            "finetune chat results/mine",
            'finetune chat results/mine --compare --prompt "What is a pod?"',
            "finetune chat mine-Q4_K_M.gguf --temperature 0.7",
        ),
        _add_chat_options,
        _chat,
    ),
    "compare": Verb(
        "show two results side by side: losses, metrics, configuration, samples",
        (
            "finetune compare results/mine results/other",
            "finetune compare results/mine s3://bucket/prefix/other/",
        ),
        _add_compare_options,
        _compare,
    ),
    **{name: verb for name, verb in CLUSTER_VERBS.items() if name != "artifacts"},
}
