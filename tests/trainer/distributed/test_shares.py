"""Shares of a step, without processes."""

from itertools import chain

import pytest

from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_trainer.distributed.shares import FILLER, share_length, share_of, split_batch


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("rows", range(25))
def test_every_row_is_in_one_share_of_its_own_step(rows: int, processes: int) -> None:
    step = 8
    shares = [list(share_of(range(rows), step, rank, processes)) for rank in range(processes)]
    assert [len(share) for share in shares] == [share_length(rows, step, rank, processes) for rank in range(processes)]
    assert sorted(row for row in chain(*shares) if row != FILLER) == list(range(rows))

    part = step // processes
    for begin in range(0, rows, step):
        of_step = [share[begin // processes : begin // processes + part] for share in shares]
        assert all(of_step), "a process without a row would not meet the others"
        assert {row for row in chain(*of_step) if row != FILLER} == set(range(begin, min(begin + step, rows)))


@pytest.mark.parametrize(
    ("batch", "processes", "expected"),
    [
        (MicroBatch(2, 8), 2, MicroBatch(2, 4)),
        (MicroBatch(4, 1), 2, MicroBatch(2, 1)),
        (MicroBatch(8, 1), 8, MicroBatch(1, 1)),
        (MicroBatch(4, 3), 2, MicroBatch(3, 2)),
        (MicroBatch(2, 5), 1, MicroBatch(2, 5)),
    ],
)
def test_a_step_has_the_same_sequences_for_any_number_of_processes(
    batch: MicroBatch, processes: int, expected: MicroBatch
) -> None:
    assert split_batch(batch, processes) == expected
    assert expected.sequences * processes == batch.sequences


def test_a_step_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a step of 6 sequences cannot be divided among 4"):
        split_batch(MicroBatch(2, 3), 4)
