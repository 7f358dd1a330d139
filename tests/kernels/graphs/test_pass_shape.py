"""The sizes of passes: those of equal lengths as they are, and packs by the recording that takes them."""

import random
from collections import Counter
from itertools import chain

import pytest
import torch
from trl.data_utils import pack_dataset

from finetune_kernels.graphs.pass_shape import PassShape
from finetune_kernels.primitives.attention.inputs import PackedSequences
from speed.rows import Row
from speed.token_rows import dataset


def shape(*lengths: int, pads: bool = True) -> PassShape:
    """The shape of a pass of these documents."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return PassShape.of(PackedSequences(ends, max(lengths), sum(lengths)), trains_input=False, pads=pads)


def test_packs_of_about_one_size_have_one_shape_and_others_another() -> None:
    first = shape(600, 400)
    assert first == PassShape(1024, 8, 1024, trains_input=False, is_bound=True)
    assert shape(520, 300, 190) == shape(900, 60, 1) == shape(513, 511) == shape(200, 200, 200, 200, 201) == first
    assert shape(600, 360) == first._replace(rows=960)
    assert shape(*[125] * 7, 126) == first._replace(sequences=16)
    assert shape(600, 425).rows == 1152
    assert shape(5000, 2000, 1000) == PassShape(8192, 64, 8192, trains_input=False, is_bound=True)
    assert shape(4000, 3000, 1000).longest == 4096


@pytest.mark.parametrize("batch", [1, 4])
def test_nearly_all_packs_of_a_run_share_one_recording(batch: int) -> None:
    """Conversations of 500 tokens on average, packed as a job's are."""
    row = Row("llama-8b", 2048, batch, 1, mean=500)
    packs = list(pack_dataset(dataset(row, 100), row.length, "bfd")["seq_lengths"])
    random.Random(0).shuffle(packs)
    passes = [list(chain(*packs[first : first + batch])) for first in range(0, len(packs), batch)]
    ((_, most),) = Counter(shape(*lengths) for lengths in passes).most_common(1)
    exact = Counter(shape(*lengths, pads=False) for lengths in passes).most_common(1)
    assert len(passes) >= 100
    assert most >= 0.9 * len(passes)  # 0.93 with one sequence, as one document fills some of them; 0.98 with four
    assert exact[0][1] < 0.1 * len(passes), "the control, 0.05 and 0.02: without room for smaller packs"


@pytest.mark.parametrize("lengths", [(512, 512), (1000,)])
def test_equal_lengths_are_a_batch_and_stay_one(lengths: tuple[int, ...]) -> None:
    assert shape(*lengths) == shape(*lengths, pads=False)
    assert not shape(*lengths).is_bound


def test_a_pack_that_may_not_be_filled_has_its_own_sizes() -> None:
    assert shape(600, 400, pads=False) == PassShape(1000, 2, 600, trains_input=False)


def test_a_recording_has_room_for_the_empty_document_and_the_rows_behind_it() -> None:
    for tokens in range(2, 5000, 37):
        for count in (2, 3, 7, 8):
            lengths = [max(1, tokens // count)] * (count - 1)
            lengths.append(max(1, tokens - sum(lengths) + 1))
            found = shape(*lengths)
            if found.is_bound:
                empty = found.rows - sum(lengths)
                assert 0 <= empty <= sum(lengths) / 8
                assert found.sequences > count
                assert found.longest >= max(*lengths, empty)


def test_bounds_are_no_batch() -> None:
    """4 x 256 tokens: by the numbers alone, a pack of four documents whose longest might have 256."""
    sequences = PackedSequences(torch.tensor([0, 200, 440, 1024, 1024]), 256, 1024, is_bounded=True)
    assert not sequences.is_batch
    assert PackedSequences(sequences.cu_seqlens, 256, 1024).is_batch
    assert [rows.stop - rows.start for rows in sequences.slices()] == [200, 240, 584]
