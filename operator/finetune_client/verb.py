"""A command of the command line: its help, its options, and what carries it out; options that several share."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.vocabulary import ArtifactType


@dataclass(frozen=True)
class Verb:
    """One command: its help, its options, and the function that carries it out."""

    help: str
    examples: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace, Sequence[str]], int]
    """Takes the options and the words that no option takes; returns the exit code."""


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a cluster and a namespace, as kubectl has them."""
    parser.add_argument("-n", "--namespace", help="namespace (default: that of the context)")
    parser.add_argument("--context", help="context of the kubeconfig (default: the current one)")
    parser.add_argument(
        "--kubeconfig",
        metavar="FILE",
        help="kubeconfig (default: $KUBECONFIG, ~/.kube/config, the pod's own account)",
    )


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a listing and a download of artifacts."""
    kinds = [kind.value for kind in ArtifactType]
    parser.add_argument("--download", type=Path, metavar="DIR", help="download into this folder and check every digest")
    parser.add_argument("--type", action="append", choices=kinds, help="only these artifacts; may be repeated")
    parser.add_argument(
        "--credentials", type=Path, metavar="DIR", help="folder with AWS_ACCESS_KEY_ID and so on as files"
    )
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 store that is not AWS (default: the job's)")
    parser.add_argument("--region", help="region of the store (default: the job's)")
