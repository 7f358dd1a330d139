"""Packed documents in padded batches: every row comes back to its place, and little of a batch is padding."""

import pytest
import torch

from finetune_kernels.mixers.documents import BatchesOfPass, DocumentBatches
from finetune_kernels.primitives.attention.inputs import PackedSequences

CPU = torch.device("cpu")
LENGTHS = [
    ([5], ((1, 5),)),
    ([4, 4, 4], ((3, 4),)),
    ([3, 7, 4], ((2, 7), (1, 3))),
    ([1, 2, 1024, 513, 512], ((2, 1024), (1, 512), (1, 2), (1, 1))),
]


def packed(*lengths: int) -> PackedSequences:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSequences(ends, max(lengths), sum(lengths))


@pytest.mark.parametrize(("lengths", "shapes"), LENGTHS, ids=str)
def test_rows_come_back_to_their_places(lengths: list[int], shapes: tuple[tuple[int, int], ...]) -> None:
    batches = DocumentBatches.of_lengths(lengths, CPU)
    assert batches.shapes == shapes
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows.requires_grad_()

    summed = batches.run(lambda part: part.cumsum(1), rows)
    expected = torch.cat([document.cumsum(0) for document in rows.split(lengths)])
    assert torch.equal(summed, expected)
    ours, theirs = (torch.autograd.grad(found.square().sum(), rows)[0] for found in (summed, expected))
    torch.testing.assert_close(ours, theirs)


def test_less_than_half_of_a_batch_is_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(1, 30, (), generator=generator))
        lengths = torch.randint(1, 2048, (count,), generator=generator).tolist()
        batches = DocumentBatches.of_lengths(lengths, CPU)
        assert batches.padding < sum(lengths)
        assert len(batches.shapes) <= 11, "a batch for each power of two at most"


def test_the_batches_of_a_pass_are_found_once() -> None:
    shared, sequences = BatchesOfPass(), packed(3, 9)
    found = shared.of(sequences)
    assert shared.of(PackedSequences(sequences.cu_seqlens, 9, 12)) is found
    assert shared.of(packed(4, 8)).shapes == ((1, 8), (1, 4)), "another tensor of ends is that of another pass"
    assert shared.of(packed(6, 6)).slots is None, "a batch is taken as it is"
