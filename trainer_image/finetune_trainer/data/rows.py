"""Rows of data files, streamed with the place they came from: JSON Lines, JSON, CSV (and TSV), Parquet, Arrow.

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
from finetune_trainer.data.truncation import Cut

DATA_SUFFIXES = tuple(
    f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in ("", ".gz", ".zst")
)
DATA_SUFFIXES += (".parquet", ".arrow")


@dataclass(frozen=True)
class Row:
    """One row. `value` is what was parsed, or a sentence that says why nothing was."""

    location: str
    """Such as chat.jsonl:17."""
    value: Any
    is_broken: bool = False
    left_out: int = 0
    """Fingerprint of the long texts of which only a beginning is there; 0 where there are none."""


def read_rows(files: tuple[Path, ...], *, is_cut: bool = False) -> Iterator[Row]:
    """Every row of every file, in order. Files are named by the part of their path in which they differ. With
    `is_cut`, of texts that are too long to be encoded by preflight only the beginning is kept (`long_texts`)."""
    folder = Path(os.path.commonpath([path.parent for path in files])) if files else Path()
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            for where, found in _READERS[kind_of(path.name)](path, is_cut=is_cut):
                value, left_out = found if isinstance(found, Cut) else (found, 0)
                broken = isinstance(value, ValueError)
                yield Row(name + where, str(value) if broken else value, is_broken=broken, left_out=left_out)
        except (UnreadableFileError, OSError) as error:
            yield Row(name, f"{error}; nothing after this is read", is_broken=True)


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
