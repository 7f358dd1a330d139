"""Compiles `adapted_activation` for a GPU that need not be there: `compiled_kernels 89 16 128`.

Prints a JSON object: bytes of shared memory by kernel and rank, for the compute capability 8.9 and ranks 16 and 128.
A process of its own, as Triton decides at its import whether kernels are interpreted.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finetune_kernels.ops import adapted_activation

ADAPTERS = {"_forward": ("RG", "RU"), "_backward": ("RG", "RU", "RD")}


class _Compiled:
    """Stands where a kernel is launched; compiles it, for pointers and sizes that are multiples of 16."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self._kernel, self._target = kernel, target
        self.shared = 0

    def __getitem__(self, grid: tuple[int, ...]) -> "_Compiled":
        return self

    def __call__(self, *, num_warps: int, **constants: Any) -> None:
        types = {name: "constexpr" if name in constants else _type(name) for name in self._kernel.arg_names}
        aligned = {
            (at,): [["tt.divisibility", 16]] for at, kind in enumerate(types.values()) if kind in ("*bf16", "i32")
        }
        source = ASTSource(self._kernel, types, constants, aligned)
        self.shared = triton.compile(source, self._target, {"num_warps": num_warps}).metadata.shared


def _type(name: str) -> str:
    return "*bf16" if name.endswith("_ptr") else "fp32" if name.startswith("scale") else "i32"


def main() -> None:
    """See the module."""
    capability, *ranks = map(int, sys.argv[1:])
    found = {}
    for name, adapters in ADAPTERS.items():
        for rank in ranks:
            compiled = _Compiled(getattr(adapted_activation, name), GPUTarget("cuda", capability, 32))
            adapted_activation.launch(compiled, (4096, 14336), (), dict.fromkeys(adapters, rank), "silu")
            found[f"{name} {rank}"] = compiled.shared
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
