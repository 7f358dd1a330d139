"""One case of the benchmark: a timed call with its cost, the sizes that it has, and helpers that all subjects share."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from finetune_kernels.ops.rotary_embedding import Heads

Run = Callable[[], Any]

HEADS = Heads(query=32, key_value=8, size=128)
"""Heads of Llama 8B."""
SOFTCAP_HEADS = Heads(query=16, key_value=8, size=256)
"""Heads of Gemma 2 9B, whose scores are capped."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer and of the head; by default Llama 8B with two rows of 2,048 tokens."""

    tokens: int = 4096
    hidden: int = 4096
    feed_forward: int = 14336
    heads: Heads = HEADS
    vocabulary: int = 128256
    rank: int = 16
    layers: int = 32
    softcap_heads: Heads = SOFTCAP_HEADS
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def element(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Returns a tensor of normal values on the device."""
        return torch.randn(shape, dtype=self.dtype, device=self.device) * scale


@dataclass(frozen=True)
class Case:
    """One computation; its kernel and direction are its name in micro.csv."""

    kernel: str
    direction: str
    """forward, backward, both or step."""
    shape: str
    work: float
    """Bytes where `unit` is TB/s, operations where it is TFLOP/s."""
    unit: str
    run: Run
    """Ours."""
    eager: Run | None = None
    """The same computation by PyTorch's own operations."""
    rival: Run | None = None
    """The same computation by another library's kernel."""
    rival_name: str = ""


Maker = Callable[[Sizes], Iterator[Case]]
"""Yields the cases of one subject, one after the other, so that tensors are made when they are needed."""


def liger(name: str) -> Any:
    """Returns a function of Liger, or None if it is not installed or has no function of that name."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}", None)
    except ImportError:
        return None


def backward_of(function: Callable[..., Any], inputs: list[torch.Tensor], *gradients: torch.Tensor) -> Run:
    """Returns a call of the backward pass of `function(*inputs)`, by autograd; the first call runs forward, too."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    outputs: list[Any] = []

    def run() -> Any:
        if not outputs:
            outputs.append(function(*leaves))
        return torch.autograd.grad(outputs[0], leaves, gradients, retain_graph=True)

    return run
