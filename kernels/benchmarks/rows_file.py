"""CSV files of measurements, to which programs add a row as soon as it is known."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file whose first line names the columns; None becomes an empty field.

    Raises ValueError if the file has other columns, or a row does.
    """
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        names = next(csv.reader(file), None)
        if names is not None and names != list(columns):
            message = f"{path}: its columns are {', '.join(names)}; name another file: rows have {', '.join(columns)}"
            raise ValueError(message)

        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if names is None:
            writer.writeheader()
        writer.writerows(rows)
