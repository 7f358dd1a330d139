"""Compiles the kernels of products of bytes for a GPU that need not be there: `compiled_bytes 90 CACHE`;
with `--large-tiles`, in tiles of 1,024 rows.

Prints a JSON object: for each kernel and type, instructions a weight or value, bytes of shared memory and of the stack
frame. A process of its own, as Triton decides at its import whether kernels are interpreted.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune_test_kernels.compiled_models import CUOBJDUMP, IMAGE_BUILD, resources

LARGE_TILES = "--large-tiles"
THREADS = 128
BF16_FROM, FP8_FROM = 80, 89
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)


def instructions(cubin: Path) -> int:
    """Instructions of the kernel in a cubin."""
    command = [str(CUOBJDUMP.with_name("nvdisasm")), "-c", str(cubin)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(name != "NOP" for name in INSTRUCTION.findall(code))


class _Compiler:
    """Compiles into `cache` what launches start, and tells what came of it."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.found: dict[str, tuple[float, int, int]] = {}

    def __call__(self, name: str, values: int, launch: Callable[[], object]) -> None:
        """Notes the kernel that `launch` compiles, of which a program computes so many `values`."""
        known = set(self._cache.glob("*/*.cubin"))
        launch()
        (cubin,) = set(self._cache.glob("*/*.cubin")) - known
        shared, frame = resources(self._cache)[f"{cubin.stem} {cubin.parent.name[:6]}"]
        self.found[name] = instructions(cubin) * THREADS / values, shared, frame


def compile_all(capability: int, compiler: _Compiler, *, large_tiles: bool) -> None:
    """Compiles every kernel, on tensors without values."""
    import torch

    from finetune_kernels.primitives.byte_products import int8, nf4_bytes

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    second = SimpleNamespace(code=new(256), absmax=new(1024), blocksize=256)
    state = SimpleNamespace(
        shape=torch.Size((4096, 4096)), blocksize=64, nested=True, absmax=new(262_144, dtype=torch.uint8),
        code=new(16), state2=second, offset=new(1),
    )  # fmt: skip
    packed, inverses = new(8_388_608, 1, dtype=torch.uint8), new(4096, 1)
    if large_tiles:
        nf4_bytes.COLUMN_ROWS = 1024

    tiles = {"rows": (nf4_bytes.ROWS, nf4_bytes.WORDS), "columns": (nf4_bytes.COLUMN_ROWS, nf4_bytes.COLUMN_WORDS)}
    types = {"int8": torch.int8} | ({"E4M3": torch.float8_e4m3fn} if capability >= FP8_FROM else {})
    for kind, dtype in types.items():
        for order, (rows, words) in tiles.items():
            out, transposed = new(4096, 4096, dtype=dtype), order == "columns"
            decode = partial(nf4_bytes.decode, packed, state, inverses, out, transposed=transposed)
            compiler(f"{kind} {order}", 8 * rows * words, decode)

    wide = torch.bfloat16 if capability >= BF16_FROM else torch.float16
    whole, bias = new(64, 4096, dtype=torch.int32), new(4096, dtype=wide)
    compiler("rescale", int8.BLOCK_N, lambda: int8.rescale(whole, new(64, 1), new(4096, 1), bias, wide))


def main() -> None:
    """See the module."""
    capability, cache = int(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(IMAGE_BUILD))
    cardless: Any = import_module("cardless_driver")
    cardless.use_cardless_driver(capability, cache)

    compiler = _Compiler(cache)
    compile_all(capability, compiler, large_tiles=LARGE_TILES in sys.argv)
    sys.stdout.write(json.dumps(compiler.found) + "\n")


if __name__ == "__main__":
    main()
