"""Compiles what the layers of models start on a GPU that need not be there: `compiled_models 75 CACHE "Llama 3.2 1B"`.

Without a model: the kernels that no layer of a plain run starts.

Prints a JSON object: for each kernel that was compiled, bytes of shared memory and of the stack frame, into which a
kernel spills registers that it is short of. A process of its own, as Triton decides at its import whether kernels are
interpreted.
"""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import triton

IMAGE_BUILD = Path(__file__).resolve().parents[3] / "trainer_image/image_build"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OTHERS: dict[str, tuple[str, dict[str, int]]] = {
    "Gemma 2 2B": ("gemma2", {"hidden": 2304, "mlp": 9216, "heads": 8, "kv": 4, "head": 256, "vocab": 256000}),
    "Gemma 2 27B": ("gemma2", {"hidden": 4608, "mlp": 36864, "heads": 32, "kv": 16, "head": 128, "vocab": 256000}),
    "Phi 2": ("phi", {"hidden": 2560, "mlp": 10240, "heads": 32, "kv": 32, "head": 80, "vocab": 51200}),
    "Command R 7B": ("cohere2", {"hidden": 4096, "mlp": 14336, "heads": 32, "kv": 8, "head": 128, "vocab": 256000}),
    "OLMo 2 7B": ("olmo2", {"hidden": 4096, "mlp": 11008, "heads": 32, "kv": 32, "head": 128, "vocab": 100352}),
    "GLM 4 9B": ("glm4", {"hidden": 4096, "mlp": 13696, "heads": 32, "kv": 2, "head": 128, "vocab": 151552}),
    "AFM 4.5B": ("arcee", {"hidden": 2560, "mlp": 18432, "heads": 20, "kv": 4, "head": 128, "vocab": 128000}),
    "Granite 3.3 8B": ("granite", {"hidden": 4096, "mlp": 12800, "heads": 32, "kv": 8, "head": 128, "vocab": 49155}),
}
"""Models beside the image's, whose layers start kernels that those of the image do not."""


def frame_bytes(binary: Path) -> int:
    """Bytes of the stack frame of the kernel in a cubin."""
    command = [str(CUOBJDUMP), "-res-usage", str(binary)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (frame,) = re.findall(r"STACK:(\d+)", found)
    return int(frame)


def resources(cache: Path) -> dict[str, tuple[int, int]]:
    """Bytes of shared memory and of the stack frame, by kernel, of all that Triton's cache holds."""
    found = {}
    for binary in sorted(cache.glob("*/*.cubin")):
        shared = json.loads(binary.with_suffix(".json").read_text())["shared"]
        found[f"{binary.stem} {binary.parent.name[:6]}"] = shared, frame_bytes(binary)
    return found


def compile_others(dtype: Any) -> None:
    """Starts the kernels that no layer of a plain run starts: dropout, and the vocabulary in host memory."""
    import torch

    from finetune_kernels.ops.blocked_cross_entropy import blocked_cross_entropy
    from finetune_kernels.primitives import adapter_dropout
    from finetune_kernels.primitives.gather_rows import gather_rows

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    hidden, mask = new(1024, 4096), adapter_dropout.Mask(adapter_dropout.new_dropout_seed(), 0, 0.1)
    adapter_dropout.add_lora_dx(hidden, new(1024, 128), new(128, 4096), mask)
    adapter_dropout.drop(hidden, mask)
    head, ids = new(128256, 4096), torch.zeros(1024, dtype=torch.long, device="meta")
    gather_rows(head, ids)
    for softcap in (None, 30.0):
        blocked_cross_entropy(hidden, head, ids, softcap)


def main() -> None:
    """See the module."""
    capability, cache, *names = sys.argv[1:]
    sys.path.insert(0, str(IMAGE_BUILD))
    compile_kernels: Any = import_module("compile_kernels")

    models = compile_kernels.MODELS | OTHERS
    compile_kernels.compile_for(int(capability), Path(cache), {name: models[name] for name in names})
    if not names:
        compile_others(compile_kernels.compute_dtype(int(capability)))
    sys.stdout.write(json.dumps(resources(Path(cache))) + "\n")


if __name__ == "__main__":
    main()
