"""Rows of CSV and TSV files."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.csv_truncation import CutLines
from finetune_trainer.data.data_files import open_bytes
from finetune_trainer.data.json_rows import MAX_ROW_BYTES
from finetune_trainer.data.strict_json import listed
from finetune_trainer.data.truncation import Cut


def read_csv(path: Path, delimiter: str = ",", *, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    """Place and value of each record; a ValueError where it is not valid. With `is_cut`, a value with long fields comes
    as a Cut."""
    csv.field_size_limit(MAX_ROW_BYTES)  # Python's default, 128 KiB, is less than a long document
    # Bytes that are no UTF-8 become surrogates, so that one bad row does not end the file.
    with open_bytes(path) as stream, io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as file:
        cut = CutLines(stream, delimiter, MAX_ROW_BYTES) if is_cut else None
        reader = csv.reader(cut or file, delimiter=delimiter, strict=True)
        records = _records(reader, cut or reader)
        header: Any = next(records, (0, []))[1]
        if problem := _header_problem(header):
            yield ":1", problem
            return
        if cut is not None:
            cut.is_cutting = True
        for line, fields in records:
            value = _csv_row(header, fields)
            left_out = cut.left_out if cut is not None and not isinstance(value, ValueError) else 0
            yield f":{line}", Cut(value, left_out) if left_out else value


def _records(reader: Any, counter: Any) -> Iterator[tuple[int, Any]]:
    """First line and fields of every record that is not empty; a ValueError where it is not valid. `counter` counts
    the lines read."""
    while True:
        line = counter.line_num + 1
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


def read_tsv(path: Path, *, is_cut: bool = False) -> Iterator[tuple[str, Any]]:
    """As `read_csv`, with tabs."""
    return read_csv(path, "\t", is_cut=is_cut)
