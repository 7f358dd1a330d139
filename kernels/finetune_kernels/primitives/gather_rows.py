"""Rows of a table in pinned host memory, gathered over the bus by the GPU: 8 KiB a token for an 8B model.

    out[..., :] = table[ids[...], :]

Source: CUDA's zero-copy access to pinned memory; the kernel is an embedding lookup.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional

MAX_BLOCK = 4096
"""Elements of a row that one program copies."""


def reference(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns what `gather_rows` returns, by PyTorch; `table` and `ids` are on one device."""
    return functional.embedding(ids, table)


@triton.jit
def _gather(table_ptr, ids_ptr, out_ptr, n_cols, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n_cols

    source = tl.load(ids_ptr + row).to(tl.int64) * n_cols
    tl.store(out_ptr + row * n_cols + columns, tl.load(table_ptr + source + columns, mask=mask), mask=mask)


def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the rows `ids` [...] of `table` [V, hidden], [..., hidden] on the device of `ids`.

    `table` is in pinned memory or on the GPU.
    """
    n_cols = table.shape[1]
    found = torch.empty(*ids.shape, n_cols, dtype=table.dtype, device=ids.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(n_cols))
    _gather[(ids.numel(), triton.cdiv(n_cols, block))](table, ids.contiguous(), found, n_cols, BLOCK_N=block)
    return found
