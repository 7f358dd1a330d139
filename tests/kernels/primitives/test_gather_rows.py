"""Gathered rows are those of an embedding, in every type and shape; from pinned memory in test_host_vocabulary.py."""

import pytest
import torch

from finetune_kernels.primitives.gather_rows import gather_rows, reference
from finetune_test_kernels.tensor_checks import DEVICE, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "width"), [((1,), 1), ((2, 3), 40), ((7,), 4100)])
def test_rows_are_the_references(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    table = normal(11, width, dtype=dtype)
    ids = (torch.arange(torch.Size(shape).numel(), device=DEVICE) * 5 % 11).view(shape)
    found = gather_rows(table, ids)
    assert torch.equal(found, reference(table, ids))
    assert found.shape == (*shape, width)
    assert not torch.equal(found, reference(table, (ids + 1) % 11))
