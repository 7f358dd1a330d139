"""Rows of Parquet and Arrow files (both of Arrow's forms, and what `datasets` saves to disk).

Every batch is checked in full before a value is touched, as offsets in a hostile file can point anywhere.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow  # type: ignore[import-untyped]
from pyarrow import ipc, parquet, types

from finetune_trainer.data.arrow_bounds import check_batches
from finetune_trainer.data.data_files import UnreadableFileError
from finetune_trainer.data.strict_json import listed, without_nulls
from finetune_trainer.data.truncation import Truncated, long_bytes, truncate_text

BATCH_BYTES = 8 * 2**20

MAX_BATCH_ROWS = 16
"""A file of 1 MB can repeat a text of 10 MB 200 times: 512 rows at a time took 4.1 GiB, 16 take 0.5 GiB and are as fast
for other files."""


def read_parquet(path: Path, *, max_characters: int | None = None) -> Iterator[tuple[str, Any]]:
    """Place and value of each row. Raises UnreadableFileError.

    With `max_characters`, a value with texts longer than that comes as a Truncated.
    """
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            rows = BATCH_BYTES * max(1, file.metadata.num_rows) // max(1, size)
            yield from _rows(file.iter_batches(batch_size=min(MAX_BATCH_ROWS, max(1, rows))), max_characters)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(f"not a valid Parquet file: {str(error)[:200]}") from None


def read_arrow(path: Path, *, max_characters: int | None = None) -> Iterator[tuple[str, Any]]:
    """Reads like `read_parquet`, from an Arrow file or stream."""
    try:
        with arrow.memory_map(str(path)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            check_batches(mapped, is_file=is_file)

            if is_file:
                file = ipc.open_file(mapped)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
                yield from _rows(batches, max_characters)
            else:
                yield from _rows(ipc.open_stream(mapped), max_characters)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(f"not a valid Arrow file: {str(error)[:200]}") from None


def _rows(batches: Iterator[Any], max_characters: int | None) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)
        names = batch.schema.names
        if len(set(names)) != len(names):
            raise UnreadableFileError(f"columns are named twice: {listed(names)}")

        # Most batches are too small to have a long text; those skip the slower conversion.
        limit = max_characters if max_characters is not None and batch.nbytes > long_bytes(max_characters) else None
        for index in range(batch.num_rows):  # one by one, as Python's values take more memory than Arrow's
            number += 1
            yield f"[{number}]", _value(batch, names, index, limit)


def _value(batch: Any, names: list[str], index: int, max_characters: int | None) -> Any:
    """One row as an object; a ValueError if it cannot be read."""
    try:
        if max_characters is None:
            return {name: without_nulls(batch.column(name)[index].as_py()) for name in names}

        convert = _TruncatingConverter(max_characters)
        value = {name: without_nulls(convert(batch.column(name)[index])) for name in names}
        return Truncated(value, convert.fingerprint) if convert.fingerprint else value
    except ValueError as error:  # a text that is not UTF-8, a date beyond Python's
        return ValueError(f"not readable: {error}")


class _TruncatingConverter:
    """Turns Arrow's values into Python's, with long texts truncated before they are copied."""

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self.fingerprint = 0

    def __call__(self, scalar: Any) -> Any:
        """The Python value of one Arrow value."""
        if not scalar.is_valid:
            return None

        kind = scalar.type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return self._convert_text(scalar)
        if types.is_dictionary(kind):
            return self(scalar.value)
        if types.is_struct(kind):
            return {name: self(entry) for name, entry in scalar.items()}
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return [self(entry) for entry in scalar.values]
        return scalar.as_py()

    def _convert_text(self, scalar: Any) -> Any:
        buffer = scalar.as_buffer()
        if buffer.size <= long_bytes(self._max_characters):
            return scalar.as_py()
        text, fingerprint = truncate_text(memoryview(buffer), self._max_characters)
        self.fingerprint = hash((self.fingerprint, fingerprint))
        return text
