"""Rows of data files, streamed with the place they came from: JSON Lines, JSON, CSV (and TSV), Parquet, Arrow.

Memory is one row, or one small Arrow batch, whatever the file's size.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.arrow_rows import read_arrow, read_parquet
from finetune_trainer.data_files import UnreadableFileError, kind_of, open_bytes
from finetune_trainer.json_rows import MAX_ROW_BYTES, read_json, read_json_lines
from finetune_trainer.long_texts import Cut
from finetune_trainer.strict_json import listed

DATA_SUFFIXES = tuple(
    f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".tsv") for packed in ("", ".gz", ".zst")
)
DATA_SUFFIXES += (".parquet", ".arrow")


@dataclass(frozen=True)
class Row:
    """One row. `value` is what was parsed, or a sentence that says why nothing was."""

    place: str
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


def _read_csv(path: Path, delimiter: str = ",", *, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)  # Python's default, 128 KiB, is less than a long document
    # Bytes that are no UTF-8 become surrogates, so that one bad row does not end the file.
    with open_bytes(path) as stream, io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: Any = next(_records(reader), (0, []))[1]
        if problem := _header_problem(header):
            yield ":1", problem
            return
        for line, fields in _records(reader):
            yield f":{line}", _csv_row(header, fields)


def _records(reader: Any) -> Iterator[tuple[int, Any]]:
    """First line and fields of every record that is not empty; a ValueError where it is not valid."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, ValueError(f"not valid CSV: {error}")
            continue
        if fields:
            yield line, fields


def _header_problem(header: Any) -> ValueError | None:
    if isinstance(header, ValueError):
        return header
    if len(set(header)) != len(header):
        return ValueError(f"columns are named twice: {listed(header)}")
    if any(not name.isprintable() for name in header):  # bytes that are no UTF-8 are not, either
        return ValueError("the header has characters that are no text: is it CSV in UTF-8?")
    return None


def _csv_row(header: list[str], fields: Any) -> Any:
    if isinstance(fields, ValueError):
        return fields
    if len(fields) != len(header):
        return ValueError(f"the row has {len(fields)} fields, the header {len(header)}")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return ValueError("not valid CSV: the row is not UTF-8")
    return dict(zip(header, fields, strict=True))


def _read_tsv(path: Path, *, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    return _read_csv(path, "\t", is_cut=is_cut)


_READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
