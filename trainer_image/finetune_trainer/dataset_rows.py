"""Rows of data files, streamed with the place they came from: JSON Lines, JSON, CSV, Parquet.

Memory is one line, or one Parquet batch, whatever the file's size (a .json file, which is one value, excepted).
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

PARQUET_BATCH_ROWS = 512


@dataclass(frozen=True)
class Row:
    """One row. `value` is what was parsed, or a sentence that says why nothing was."""

    place: str
    """Such as chat.jsonl:17."""
    value: Any
    is_broken: bool = False


def read_rows(files: tuple[Path, ...]) -> Iterator[Row]:
    """Every row of every file, in order."""
    for path in files:
        yield from _READERS[path.suffix](path)


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                yield Row(place, json.loads(line, object_pairs_hook=_unique_keys))
            except ValueError as error:
                yield Row(place, f"not valid JSON: {error}", is_broken=True)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except ValueError as error:
        yield Row(path.name, f"not valid JSON: {error}", is_broken=True)
        return
    if not isinstance(value, list):
        yield Row(
            path.name, "a .json file must hold a list of rows; write one row per line in a .jsonl file", is_broken=True
        )
        return
    for number, entry in enumerate(value, start=1):
        yield Row(f"{path.name}[{number}]", entry)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            try:
                entry = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                yield Row(f"{path.name}:{reader.line_num}", f"not valid CSV: {error}", is_broken=True)
                return
            if None in entry or None in entry.values():
                yield Row(
                    f"{path.name}:{reader.line_num}",
                    "the row has another number of fields than the header",
                    is_broken=True,
                )
            else:
                yield Row(f"{path.name}:{reader.line_num}", entry)


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for entry in batch.to_pylist():
                number += 1
                yield Row(f"{path.name}[{number}]", entry)
    except (ArrowException, OSError) as error:
        yield Row(path.name, f"not a valid Parquet file: {error}", is_broken=True)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is written twice")
    return entry


_READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
