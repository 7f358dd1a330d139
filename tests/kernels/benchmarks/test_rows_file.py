"""Rows that are added to CSV files of measurements."""

from pathlib import Path

import pytest

from benchmarks.rows_file import append_rows


def test_the_first_row_brings_the_names_of_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_rows(path, ("gpu", "step_ms"), [{"gpu": "H200", "step_ms": 1.5}])
    append_rows(path, ("gpu", "step_ms"), [{"gpu": "L4", "step_ms": None}, {"gpu": "T4"}])
    assert path.read_bytes() == b"gpu,step_ms\nH200,1.5\nL4,\nT4,\n"


def test_a_file_of_other_columns_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("gpu,tokens\nH200,9\n")
    with pytest.raises(ValueError, match=r"its columns are gpu, tokens; name another file: rows have gpu, step_ms"):
        append_rows(path, ("gpu", "step_ms"), [{"gpu": "H200", "step_ms": 1.5}])
    assert path.read_text() == "gpu,tokens\nH200,9\n"


def test_a_row_with_a_column_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens"):
        append_rows(tmp_path / "rows.csv", ("gpu",), [{"gpu": "H200", "tokens": 9}])
