"""Tables of measurements that the project keeps: programs can add rows to them."""

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "trainer_image/benchmarks"


@pytest.mark.parametrize("program", ["several_gpus", "whole_runs", "held_out.fp8", "held_out.masters"])
def test_a_table_has_the_columns_of_its_program(program: str) -> None:
    table = (BENCHMARKS / program.replace(".", "/")).with_suffix(".csv")
    assert table.read_text().split("\n")[0] == ",".join(import_module(program).COLUMNS)
