"""Rows of a table in pinned host memory, gathered over the bus by the GPU: 8 KiB a token for an 8B model."""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 4096


@triton.jit
def _gather(table_ptr, ids_ptr, out_ptr, n, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    source = tl.load(ids_ptr + row).to(tl.int64) * n
    tl.store(out_ptr + row * n + columns, tl.load(table_ptr + source + columns, mask=inside), mask=inside)


def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table [V, N], in pinned memory or on the GPU, and ids [...] -> [..., N] on the device of `ids`."""
    n = table.shape[1]
    found = torch.empty(*ids.shape, n, dtype=table.dtype, device=ids.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(n))
    _gather[(ids.numel(), triton.cdiv(n, block))](table, ids.contiguous(), found, n, BLOCK_N=block)
    return found
