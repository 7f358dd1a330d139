"""Memory that tensors are read into comes back when it is no longer used, and only so much of it is kept."""

import gc

import torch

from finetune_trainer.export.tensor_io.buffers import MAX_FREE_BYTES, MIN_POOLED_BYTES, BufferPool


def test_memory_comes_back_when_the_last_tensor_that_shares_it_is_gone() -> None:
    pool = BufferPool()
    first = pool.take(2 * MIN_POOLED_BYTES)
    place, view = first.data_ptr(), first.view(torch.bfloat16).reshape(2, -1)[1]
    del first
    gc.collect()
    other = pool.take(MIN_POOLED_BYTES)
    assert not place <= other.data_ptr() < place + 2 * MIN_POOLED_BYTES, "a view still lives there"
    del view
    again = pool.take(MIN_POOLED_BYTES + 1)
    assert (again.data_ptr(), again.numel()) == (place, MIN_POOLED_BYTES + 1)
    assert pool.take(MIN_POOLED_BYTES).data_ptr() not in (place, other.data_ptr())


def test_little_memory_is_kept() -> None:
    pool = BufferPool()
    held = [pool.take(MAX_FREE_BYTES // 4) for _ in range(6)]
    held.clear()
    assert sum(map(len, pool._free)) == MAX_FREE_BYTES
