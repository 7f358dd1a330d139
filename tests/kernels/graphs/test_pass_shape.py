"""The sizes of passes: those of equal lengths as they are, and packs by the recording that takes them."""

import pytest
import torch

from finetune_kernels.graphs.pass_shape import PassShape
from finetune_kernels.primitives.attention.inputs import PackedSequences


def shape(*lengths: int, pads: bool = True) -> PassShape:
    """The shape of a pass of these documents."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return PassShape.of(PackedSequences(ends, max(lengths), sum(lengths)), trains_input=False, pads=pads)


def test_packs_of_about_one_size_have_one_shape_and_others_another() -> None:
    first = shape(600, 400)
    assert first == PassShape(1024, 4, 1024, trains_input=False, is_bound=True)
    assert shape(520, 300, 190) == shape(900, 60, 1) == shape(513, 511) == first
    assert shape(600, 360) == first._replace(rows=960)
    assert shape(512, 488) == first._replace(longest=512)
    assert shape(600, 200, 100, 100) == first._replace(sequences=8)
    assert shape(600, 425).rows == 1152


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
