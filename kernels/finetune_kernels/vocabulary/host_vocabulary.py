"""Embedding and head in pinned host memory: 2 GiB of an 8B model that a pass needs for milliseconds.

A kernel gathers the embedding's rows over the bus, 8 KiB a token. The head comes to the GPU in blocks of the
vocabulary, for the loss (`blocked_cross_entropy`) and for samples. A head in 8 bits was rejected: it changes the loss.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from finetune_kernels.planning.block_sizes import VOCABULARY_BLOCK
from finetune_kernels.primitives.gather_rows import gather_rows


def movable_bytes(causal: Any) -> int:
    """Bytes of embedding and head of a transformers model; 0 unless both are plain and frozen."""
    return sum(weight.nbytes for weight in _tables(causal).values())


def waiting_bytes(causal: Any, device: torch.device) -> int:
    """Bytes of embedding and head that were loaded into host memory, of a model on `device`; 0 once they work there."""
    tables = (weight for weight in _tables(causal).values() if isinstance(weight, nn.Parameter))

    return sum(weight.nbytes for weight in tables if weight.device.type != device.type)


def in_host_memory(weight: torch.Tensor) -> torch.Tensor:
    """Returns the values of `weight` in host memory, from which a GPU reads them: itself if it is there already."""
    if weight.is_pinned():
        return weight.detach()
    return torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda).copy_(weight.detach())


def move_to_host(causal: Any) -> None:
    """Moves both, and lets their modules work from host memory. `movable_bytes` must not be 0."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    moved: dict[int, torch.Tensor] = {}

    for module in (embedding, head):
        weight = module.weight
        if weight.data_ptr() not in moved:
            moved[weight.data_ptr()] = in_host_memory(weight)
        del module.weight  # no longer a parameter, which `model.to` would bring back to the GPU
        module.weight = moved[weight.data_ptr()]

    embedding.forward = lambda ids: gather_rows(embedding.weight, ids)
    head.forward = lambda hidden: _project(hidden, head.weight)


def bring_back(causal: Any, device: torch.device) -> None:
    """Moves both to `device`, if they were loaded into host memory and do not work there."""
    if not waiting_bytes(causal, device):
        return

    brought: dict[int, nn.Parameter] = {}
    for module in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        weight = module.weight
        if weight.data_ptr() not in brought:
            brought[weight.data_ptr()] = nn.Parameter(weight.detach().to(device), requires_grad=False)
        module.weight = brought[weight.data_ptr()]


def _tables(causal: Any) -> dict[int, torch.Tensor]:
    """Both by their address, tied ones once; none unless both are plain and frozen."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
        return {}

    if embedding.weight.requires_grad or head.weight.requires_grad:
        return {}
    return {weight.data_ptr(): weight for weight in (embedding.weight, head.weight)}


def _project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [..., H] -> logits [..., V] of a head [V, H] in host memory."""
    if hidden.requires_grad and torch.is_grad_enabled():
        return functional.linear(hidden, on_device(weight, hidden))  # backward needs all of it again

    # A whole head beside the layers is what no plan has room for.
    logits = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
    parts = torch.split(logits, VOCABULARY_BLOCK, dim=-1)
    for block, part in zip(torch.split(weight, VOCABULARY_BLOCK), parts, strict=True):
        part.copy_(functional.linear(hidden, on_device(block, hidden)))
    return logits


def on_device(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns `weight` on the device of `like`: itself, or a copy that lives as long as the caller keeps it."""
    return weight.to(like.device, non_blocking=True)
