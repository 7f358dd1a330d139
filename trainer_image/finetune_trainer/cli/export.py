"""`finetune export`: merges and converts on this machine, without a cluster and without training."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from finetune_api.failures import FailureReason
from finetune_api.spec.sources import Source
from finetune_trainer.chat.labels import Encoded
from finetune_trainer.cli.export_arguments import ExportArguments
from finetune_trainer.cli.export_judging import (
    NOT_JUDGED,
    FileLosses,
    check_judgeable,
    judge_files,
    read_judged_rows,
)
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.export import ExportedFile, ExportRequest, export
from finetune_trainer.sources import FetchedSource, SourceAccess, fetch_adapter, fetch_model

GIGABYTE = 1e9
INTERRUPTED = 130
"""Exit code of a program that Ctrl-C has stopped, as shells expect it."""


@dataclass(frozen=True)
class TableRow:
    """One line of the closing table: a GGUF file, or the merged folder."""

    path: str
    size: int
    seconds: float
    loss: float | None = None
    kept: float | None = None
    """Share of the training's improvement that the file keeps."""


def export_here(arguments: ExportArguments) -> int:
    """Fetches, exports, and prints a table of the files; returns the exit code."""
    console = Console(stderr=True, highlight=False)
    began, since = time.monotonic(), time.time()

    try:
        files, losses = _export(arguments, console)
    except TrainerError as error:
        console.print(f"{error.reason}: {error.message}", markup=False, soft_wrap=True)
        return int(error.exit_code)
    except KeyboardInterrupt:
        console.print(_interrupted(arguments, since), markup=False, soft_wrap=True)
        return INTERRUPTED

    Console(highlight=False).print(to_table(to_rows(files, arguments.output, losses)))
    _show_losses(losses, console, has_gguf=bool(arguments.gguf))
    console.print(f"{time.monotonic() - began:.1f} s in all, sources fetched and checked")
    return 0


def _interrupted(arguments: ExportArguments, since: float) -> str:
    """The outputs that are there after Ctrl-C, for people: those written `since` the start are complete."""
    gguf = (arguments.output / "gguf" / f"{arguments.name}-{kind}.gguf" for kind in arguments.gguf)
    merged = [arguments.output / "merged"] if arguments.merged is not None else []
    made = [str(path) for path in (*merged, *gguf) if path.exists() and path.stat().st_mtime >= since]
    return f"interrupted; written and complete: {', '.join(made)}" if made else "interrupted; nothing was written"


def _show_losses(losses: FileLosses | None, console: Console, *, has_gguf: bool) -> None:
    """Prints what the files' losses are measured against, and what they lost; or that nobody measured it."""
    if losses is None:
        if has_gguf:
            console.print(NOT_JUDGED, markup=False, soft_wrap=True)
        return

    console.print(f"loss of the base {losses.base:.4f}, of the merged model {losses.merged:.4f}")
    if losses.warning is not None:
        console.print(f"warning: {losses.warning}", style="yellow", markup=False, soft_wrap=True)


def _export(arguments: ExportArguments, console: Console) -> tuple[list[ExportedFile], FileLosses | None]:
    """Fetches adapter and base, exports with a progress bar for each, and judges the files if there are rows for it."""
    device = choose_device(arguments.device)
    access = SourceAccess(arguments.credentials, arguments.endpoint_url, arguments.region)
    arguments.output.mkdir(parents=True, exist_ok=True)

    # Downloads go to the disk of the output, which the user chose for files of this size.
    with (
        tempfile.TemporaryDirectory(prefix=".sources-", dir=arguments.output) as work,
        _progress_bar(console) as bar,
    ):
        adapter = None
        if arguments.adapter is not None:
            task = bar.add_task(f"adapter {arguments.adapter}", total=None)
            fetched = fetch_adapter(arguments.adapter, Path(work) / "adapter", access, _advance(bar, task))
            adapter = fetched.folder
            _finish(bar, task, fetched)

        task = bar.add_task(f"base {arguments.base}", total=None)
        base = fetch_model(arguments.base, arguments.revision, Path(work) / "base", access, _advance(bar, task))
        _finish(bar, task, base)

        request = ExportRequest(
            base=base.folder,
            adapter=adapter,
            output=arguments.output,
            merged=arguments.merged,
            gguf=arguments.gguf,
            name=arguments.name,
            base_name=Source.parse(arguments.base).hub_name,
        )

        # Rows that cannot be used are said before the work, not after it.
        rows = _read_rows(arguments, request, device)
        task = bar.add_task("export", total=None)
        files = export(
            request,
            device=device,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            on_tensor=lambda name: bar.update(task, description=name),
            on_notice=lambda text: bar.console.print(f"note: {text}", markup=False, soft_wrap=True),
        )
        bar.update(task, description="judging")
        return files, judge_files(request, files, rows, device) if rows else None


def _read_rows(arguments: ExportArguments, request: ExportRequest, device: torch.device) -> list[Encoded]:
    """Rows to judge on; none if the user gives none."""
    if arguments.rows is None:
        return []
    base = open_base_model(request.base, adapter=request.adapter)
    check_judgeable(base.full_config)
    return read_judged_rows(arguments.rows, base.tokenizer.folder, device)


def choose_device(name: str) -> torch.device:
    """The device `name`; auto: the GPU if there is one. Raises TrainerError if cuda is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, "--device cuda: this machine has no usable NVIDIA GPU")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def to_rows(files: list[ExportedFile], output: Path, losses: FileLosses | None = None) -> list[TableRow]:
    """Lines of the table: one for the folder of merged weights, one for every other file."""
    # Merged weights are many files, none of interest by itself.
    merged = [file for file in files if file.kind == "merged"]
    rows = [
        TableRow(str(file.path.relative_to(output)), file.size, file.seconds, *_judged(losses, file.type))
        for file in files
        if file.kind != "merged"
    ]
    if merged:
        total, seconds = sum(file.size for file in merged), sum(file.seconds for file in merged)
        rows.insert(0, TableRow("merged/", total, seconds, losses.merged if losses else None))
    return rows


def _judged(losses: FileLosses | None, kind: str) -> tuple[float | None, float | None]:
    loss = losses.files.get(kind) if losses is not None else None
    return loss, losses.kept(loss) if losses is not None and loss is not None else None


def to_table(rows: list[TableRow]) -> Table:
    """Table of the files: size, seconds to encode and write, and rate; small text files have no rate."""
    table = Table("file")
    is_judged = any(row.loss is not None for row in rows)
    for heading in ("bytes", "seconds", "GB/s", *(("loss", "improvement kept") if is_judged else ())):
        table.add_column(heading, justify="right")
    for row in rows:
        rate = f"{row.size / row.seconds / GIGABYTE:.2f}" if row.seconds else ""
        cells = [row.path, f"{row.size:,}", f"{row.seconds:.2f}" if row.seconds else "", rate]
        if is_judged:
            cells += ["" if row.loss is None else f"{row.loss:.4f}", "" if row.kept is None else f"{row.kept:.0%}"]
        table.add_row(*cells)
    return table


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _finish(bar: Progress, task: TaskID, fetched: FetchedSource) -> None:
    """Fills the bar of a source that has been fetched."""
    size = sum(path.stat().st_size for path in fetched.files)
    bar.update(task, total=size, completed=size)


def _advance(bar: Progress, task: TaskID) -> Callable[[int], None]:
    """Callback that counts downloaded bytes; files that are on this machine already count none."""
    return lambda count: bar.update(task, advance=count)
