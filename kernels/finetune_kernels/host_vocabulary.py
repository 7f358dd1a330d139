"""Embedding and head in pinned host memory: 2 GiB of an 8B model that a pass needs for milliseconds.

The kernel that gathers the embedding's rows reads them over the bus, 8 KiB a token. The head comes to the GPU for the
loss, in blocks of the vocabulary (`blocked_cross_entropy`). An 8-bit head was rejected: it changes the loss.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional

LARGEST_BLOCK = 4096


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
    block = min(LARGEST_BLOCK, triton.next_power_of_2(n))
    _gather[(ids.numel(), triton.cdiv(n, block))](table, ids.contiguous(), found, n, BLOCK_N=block)
    return found


def movable_bytes(causal: Any) -> int:
    """Bytes of embedding and head of this transformers model; 0 where they are not plain and frozen."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
        return 0
    if embedding.weight.requires_grad or head.weight.requires_grad:
        return 0
    weights = {weight.data_ptr(): weight.numel() * weight.element_size() for weight in (embedding.weight, head.weight)}
    return sum(weights.values())


def move_to_host(causal: Any) -> None:
    """Move both; from then on their modules, too, work from host memory. There must be `movable_bytes`."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    moved: dict[int, torch.Tensor] = {}
    for module in (embedding, head):
        weight = module.weight.detach()
        if weight.data_ptr() not in moved:
            host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
            moved[weight.data_ptr()] = host.copy_(weight)
        del module.weight  # no parameter any more, which `model.to` would bring back
        module.weight = moved[weight.data_ptr()]
    embedding.forward = lambda ids: gather_rows(embedding.weight, ids)
    head.forward = lambda hidden: functional.linear(hidden, on_device(head.weight, hidden))


def on_device(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`weight` where `like` is: itself, or a copy for as long as the caller keeps it."""
    return weight.to(like.device, non_blocking=True)
