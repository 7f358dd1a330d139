"""`finetune compare`: tables of two results, with their loss curves, configuration and samples."""

import argparse
import logging
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune_trainer.cli.compare.figures import Row, compare_configuration, compare_figures, compare_samples
from finetune_trainer.cli.compare.read_result import Access, ReadResult, read_result
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.logging_setup import configure_logging

SAME = "The configurations are the same."
notes, tables = Console(stderr=True, highlight=False), Console(highlight=False)


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `finetune compare`."""
    for name in ("first", "second"):
        parser.add_argument(name, help="output folder, s3://bucket/prefix/namespace/job/, job.yaml, or name of a job")
    parser.add_argument("--credentials", type=Path, metavar="DIR", help="folder with AWS_ACCESS_KEY_ID and so on")
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 store that is not AWS (default: the job's)")
    parser.add_argument("--region", help="region of the store (default: the job's)")


def compare_here(options: argparse.Namespace) -> int:
    """Shows both results side by side; returns the exit code."""
    configure_logging(logging.ERROR)
    access = Access(options.credentials, options.endpoint_url, options.region)
    try:
        first, second = (read_result(name, access) for name in (options.first, options.second))
    except TrainerError as error:
        notes.print(f"{error.reason}: {error.message}", markup=False, soft_wrap=True)
        return int(error.exit_code)

    _show("", compare_figures(first, second), first, second)
    if differing := compare_configuration(first.manifest, second.manifest):
        _show("configuration that differs", differing, first, second)
    else:
        tables.print(SAME)
    if samples := compare_samples(first, second):
        _show("last answer to", samples, first, second)
    return 0


def _show(heading: str, rows: list[Row], first: ReadResult, second: ReadResult) -> None:
    table = Table(heading, show_lines=heading.startswith("last"))
    for name in (first.name, second.name):
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    tables.print(table)
