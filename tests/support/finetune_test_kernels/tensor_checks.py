"""Helpers of the kernels' tests: random tensors, errors, and a guard over what autograd saves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune_kernels.ops.rms_norm import Norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def doubled(value: object) -> object:
    """Tensors of any floating type in fp64; everything else as it is."""
    if isinstance(value, Norm):
        return value._replace(weight=value.weight.double(), bias=None if value.bias is None else value.bias.double())
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    if found.shape != expected.shape:
        raise ValueError(f"{tuple(found.shape)} is not {tuple(expected.shape)}")
    exact = expected.detach().double()
    return float((found.detach().double() - exact).abs().max() / exact.abs().max())


def largest_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest `relative_error` of tensors of the same names."""
    if found.keys() != expected.keys():
        raise ValueError(f"{sorted(found)} are not {sorted(expected)}")
    return max(relative_error(found[name], value) for name, value in expected.items())


def root_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    wide = exact.detach().double()
    return float((found.detach().double() - wide).norm() / wide.norm())


@dataclass
class SavedTensors:
    """Tensors that were saved for backward, each with a copy and its version."""

    entries: list[tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=list)

    def changed(self) -> list[str]:
        """Names the tensors that have changed since they were saved; values are compared, too, as kernels write past
        version counters."""
        return [
            f"saved tensor {index} {tuple(saved.shape)} {saved.dtype}"
            for index, (saved, copy, version) in enumerate(self.entries)
            if saved._version != version or not torch.equal(saved, copy)
        ]


@contextmanager
def watched() -> Iterator[SavedTensors]:
    """Collects everything that autograd saves within."""
    guard = SavedTensors()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        guard.entries.append((tensor, tensor.detach().clone(), tensor._version))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield guard


def bytes_saved(compute: Callable[[], Any]) -> int:
    """Bytes that autograd saves while `compute` runs, each tensor once."""
    seen = dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(seen.values())


def gradients(result: torch.Tensor, upstream: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of `inputs`; the graph is kept."""
    return list(torch.autograd.grad(result, inputs, upstream, retain_graph=True))
