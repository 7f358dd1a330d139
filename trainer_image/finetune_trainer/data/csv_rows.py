"""Rows of CSV and TSV files."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.data.csv_truncation import TruncatedLines
from finetune_trainer.data.data_files import open_bytes
from finetune_trainer.data.json_rows import MAX_ROW_BYTES
from finetune_trainer.data.strict_json import listed
from finetune_trainer.data.truncation import Truncated


def read_csv(path: Path, delimiter: str = ",", *, max_characters: int | None = None) -> Iterator[tuple[str, Any]]:
    """Place and value of each record; a ValueError if it is not valid.

    With `max_characters`, a value with fields longer than that comes as a Truncated.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # Python's default, 128 KiB, is less than a long document

    # Bytes that are not UTF-8 become surrogates, so that one bad row does not end the file.
    with open_bytes(path) as stream, io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as file:
        lines = TruncatedLines(stream, delimiter, MAX_ROW_BYTES) if max_characters is not None else None
        reader = csv.reader(lines or file, delimiter=delimiter, strict=True)
        records = _records(reader, lines or reader)

        header: Any = next(records, (0, []))[1]
        if problem := _header_problem(header):
            yield ":1", problem
            return

        if lines is not None:
            lines.max_characters = max_characters  # column names are never truncated
        for number, fields in records:
            value = _parse_record(header, fields)
            fingerprint = lines.fingerprint if lines is not None and not isinstance(value, ValueError) else 0
            yield f":{number}", Truncated(value, fingerprint) if fingerprint else value


def read_tsv(path: Path, *, max_characters: int | None = None) -> Iterator[tuple[str, Any]]:
    """Reads like `read_csv`, with tabs for commas."""
    return read_csv(path, "\t", max_characters=max_characters)


def _records(reader: Any, counter: Any) -> Iterator[tuple[int, Any]]:
    """First line and fields of every record that is not empty; a ValueError if it is not valid.

    `counter` counts the lines read.
    """
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
    """The reason why a header is refused; None for a good one."""
    if isinstance(header, ValueError):
        return header
    if len(set(header)) != len(header):
        return ValueError(f"columns are named twice: {listed(header)}")
    if any(not name.isprintable() for name in header):  # bytes that are not UTF-8 are not printable, either
        return ValueError("the header has characters that are not text: save the file as CSV in UTF-8")
    return None


def _parse_record(header: list[str], fields: Any) -> Any:
    """The record as an object; a ValueError if it is not valid."""
    if isinstance(fields, ValueError):
        return fields
    if len(fields) != len(header):
        return ValueError(f"the row has {len(fields)} fields, but the header has {len(header)}")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return ValueError("not valid CSV: the row is not UTF-8")
    return dict(zip(header, fields, strict=True))
