"""Advice for runs on a CPU, where NF4 saves memory and costs time: each product unpacks its weights anew. Pure."""

from collections.abc import Iterable

from finetune_api.vocabulary import Quantization
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.storage.sizes import format_size

ROOM = 2
"""Memory that a run needs, over that of its weights: activations, gradients, and the export."""


def advise_on_cpu(
    headers: Iterable[TensorHeader], quantization: Quantization, *, each: int, free: int | None
) -> str | None:
    """Advice if NF4 is asked for and the weights, at `each` bytes, fit in the `free` bytes without it; else None."""
    headers = list(headers)
    if quantization is not Quantization.NF4 or free is None:
        return None
    if any(header.dtype == "U8" for header in headers):
        return None  # the weights exist in NF4 only

    need = each * sum(header.parameters for header in headers)
    if ROOM * need > free:
        return None
    return (
        "write spec.model.quantization: None; on a CPU, NF4 saves memory and costs time, and without it the weights "
        f"take {format_size(need)} of the {format_size(free)} that are free"
    )
