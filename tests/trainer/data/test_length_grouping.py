"""Padding of batches whose rows are sorted by length, and the order in which they come."""

import random

import pytest

from finetune_trainer.data.length_grouping import group_by_length, padding_share

LENGTHS = random.Random(0).choices(range(5, 500), k=1001)


@pytest.mark.parametrize("count", [1, 2, 7, 1001])
def test_every_row_comes_once_and_the_longest_first(count: int) -> None:
    lengths = LENGTHS[:count]
    order = group_by_length(lengths, 8, seed=1)
    assert sorted(order) == list(range(count))
    assert lengths[order[0]] == max(lengths)


def test_the_order_depends_on_the_seed_alone() -> None:
    assert group_by_length(LENGTHS, 8, seed=1) == group_by_length(LENGTHS, 8, seed=1)
    assert group_by_length(LENGTHS, 8, seed=1) != group_by_length(LENGTHS, 8, seed=2)


def test_sorting_takes_most_of_the_padding_away() -> None:
    order = group_by_length(LENGTHS, 8, seed=1)
    assert padding_share([LENGTHS[number] for number in order], 4) < 0.05
    assert padding_share(LENGTHS, 4) > 0.3, "the control: the same rows as they come"


def test_padding_is_counted_to_the_longest_row_of_each_batch() -> None:
    assert padding_share([4, 2, 3], 2) == pytest.approx(1 - 9 / 11)
    assert padding_share([4, 2, 3], 1) == 0
    assert padding_share([], 2) == 0
