"""Rows of data files, streamed, each with its location: JSON Lines, JSON, CSV, TSV, Parquet, Arrow.

Memory is one row, or one small Arrow batch, whatever the file's size.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.data.arrow_rows import read_arrow, read_parquet
from finetune_trainer.data.csv_rows import read_csv, read_tsv
from finetune_trainer.data.data_files import UnreadableFileError, kind_of
from finetune_trainer.data.json_rows import read_json, read_json_lines
from finetune_trainer.data.truncation import Truncated
from finetune_trainer.stopping import stop_point

DATA_SUFFIXES = tuple(
    f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in ("", ".gz", ".zst")
)
DATA_SUFFIXES += (".parquet", ".arrow")


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    location: str
    """File and line, such as chat.jsonl:17, or file and entry, such as chat.json[17]."""

    value: Any
    """The parsed value; of a broken row a sentence that says why it cannot be parsed."""

    is_broken: bool = False
    fingerprint: int = 0
    """Hash of the whole texts that were truncated in `value`; 0 if none was."""


def read_rows(files: tuple[Path, ...], *, max_characters: int | None = None) -> Iterator[Row]:
    """Every row of every file, in order; a file is named by the part of its path that differs from the others'.

    With `max_characters`, texts longer than that may be truncated to a beginning that is still longer (`truncation`).
    Raises InterruptedRunError if the run is asked to stop.
    """
    # Names such as train/a.jsonl and test/a.jsonl stay apart, without the path of a temporary folder.
    folder = Path(os.path.commonpath([path.parent for path in files])) if files else Path()

    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            for place, found in _READERS[kind_of(path.name)](path, max_characters=max_characters):
                stop_point()
                value, fingerprint = found if isinstance(found, Truncated) else (found, 0)
                is_broken = isinstance(value, ValueError)
                yield Row(name + place, str(value) if is_broken else value, is_broken, fingerprint)
        except (UnreadableFileError, OSError) as error:
            yield Row(name, f"{error}; the rest of the file is not read", is_broken=True)


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
