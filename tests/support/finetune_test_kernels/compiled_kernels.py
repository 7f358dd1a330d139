"""Compiles `adapted_activation` for a GPU that need not be there: `compiled_kernels 89 16 128`.

Prints a JSON object: bytes of shared memory and of the stack frame, by kernel and rank, for the compute capability 8.9
and ranks 16 and 128; with `--large-tiles`, in the tiles of Ampere. A process of its own, as
Triton decides at its import whether kernels are interpreted.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finetune_kernels.ops import adapted_activation
from finetune_test_kernels.compiled_models import frame_bytes

LARGE_TILES = "--large-tiles"
ADAPTERS = {"_forward": ("RG", "RU"), "_backward": ("RG", "RU", "RD")}


class _Compiled:
    """Stands where a kernel is launched; compiles it, for pointers and sizes that are multiples of 16."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self._kernel, self._target = kernel, target
        self._pointer = "*bf16" if target.arch >= 80 else "*fp16"
        self.shared = self.frame = 0

    def __getitem__(self, grid: tuple[int, ...]) -> "_Compiled":
        return self

    def __call__(self, *, num_warps: int, **constants: Any) -> None:
        types = {name: "constexpr" if name in constants else self._type(name) for name in self._kernel.arg_names}
        of_16 = (self._pointer, "i32")
        aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(types.values()) if kind in of_16}
        source = ASTSource(self._kernel, types, constants, aligned)
        compiled = triton.compile(source, self._target, {"num_warps": num_warps})
        self.shared = compiled.metadata.shared
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            self.frame = frame_bytes(Path(file.name))

    def _type(self, name: str) -> str:
        return self._pointer if name.endswith("_ptr") else "fp32" if name.startswith("scale") else "i32"


def main() -> None:
    """See the module."""
    numbers = [argument for argument in sys.argv[1:] if argument != LARGE_TILES]
    capability, *ranks = map(int, numbers)
    small = capability < 80 and LARGE_TILES not in sys.argv
    found = {}
    for name, adapters in ADAPTERS.items():
        for rank in ranks:
            compiled = _Compiled(getattr(adapted_activation, name), GPUTarget("cuda", capability, 32))
            adapted_activation.launch(compiled, (4096, 14336), (), dict.fromkeys(adapters, rank), "silu", small=small)
            found[f"{name} {rank}"] = compiled.shared, compiled.frame
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
