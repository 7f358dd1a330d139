"""A driver for Triton on a machine without a card: kernels are compiled for a card that is named, and never run.

Tensors are on PyTorch's device "meta": they have shapes and types, no values. Their addresses are 0 and thus aligned,
as those of allocations on a card are.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch

SHARED_MEMORY: Final = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""Bytes that a block may have, by compute capability (CUDA's programming guide, table of technical specifications)."""


def use_cardless_driver(capability: int, cache: Path) -> "Compilations":
    """Lets this process compile for a card of a compute capability (90 is 9.0) into Triton's cache `cache`, and count.

    PyTorch and our kernels take tensors of the device "meta" for a card's from now on: for a process of its own only.
    """
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    from triton import knobs
    from triton.runtime import driver

    card = {"multi_processor_count": 100, "shared_memory_per_block_optin": SHARED_MEMORY[capability]}
    driver.set_active(_Driver(capability))
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(**card)
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)

    knobs.compilation.listener = compilations = Compilations()
    return compilations


class Compilations:
    """Counts what Triton compiled, and what it found in its cache."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.found: list[str] = []

    def __call__(self, *, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        """Takes a notice of Triton's compiler."""
        (self.found if cache_hit else self.compiled).append(metadata["name"])


class _Driver:
    """What Triton asks of a driver before a kernel starts. Nothing starts."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.utils = _Utils(capability)
        self.launcher_cls = _Launcher

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _Utils:
    def __init__(self, capability: int) -> None:
        self._properties = {"max_shared_mem": SHARED_MEMORY[capability]}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        module, function, registers, spills, threads = None, None, 0, 0, 1024
        return module, function, registers, spills, threads


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass
