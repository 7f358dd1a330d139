"""Tables of measurements that the project keeps: programs can add rows to them."""

import csv
from dataclasses import fields
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest

from speed.cards.every_card import CARDS, TOKENS, USED, Outcome, write

BENCHMARKS = Path(__file__).parents[3] / "trainer_image/benchmarks"


@pytest.mark.parametrize("program", ["several_gpus", "whole_runs", "held_out.fp8", "held_out.masters"])
def test_a_table_has_the_columns_of_its_program(program: str) -> None:
    table = (BENCHMARKS / program.replace(".", "/")).with_suffix(".csv")
    assert table.read_text().split("\n")[0] == ",".join(import_module(program).COLUMNS)


def test_the_table_of_cards_takes_further_ones(tmp_path: Path) -> None:
    """And holds a card of every size, on which each plan held and left nothing unused."""
    table = tmp_path / "cards.csv"
    table.write_text((BENCHMARKS / "speed/cards/every_card.csv").read_text())
    lines = list(csv.DictReader(table.read_text().splitlines()))
    one = Outcome(**{field.name: lines[0][field.name] for field in fields(Outcome)})
    write(table, one, gpu="GPU", versions="torch 2", commit="abc")
    assert len(table.read_text().splitlines()) == len(lines) + 2

    assert {(float(line["card_gib"]), int(line["tokens"])) for line in lines} >= set(product(CARDS, TOKENS))
    for line in lines:
        share = float(line["peak_gib"]) / float(line["card_gib"])
        assert line["fallbacks"] == "0"
        assert line["keeps_all"] == "True" or USED <= share <= 1
