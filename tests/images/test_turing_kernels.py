"""What the layers of models start on Turing (compute capability 7.5, fp16) fits its shared memory and its registers.

The compiler says so, no card is needed; a sample is in tests/kernels/ops/test_shared_memory.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_test_kernels.compiled_models import IMAGE_BUILD, OTHERS

pytestmark = [pytest.mark.images, pytest.mark.timeout(600)]
SHARED = 64 * 1024
LARGEST_FRAMES = {"_backward_q": 328, "_backward_kv": 832}
"""Bytes a thread that the backward kernels of capped scores spill with heads of 256 elements (Gemma 2): a loop's
operands stay in registers there, whatever the tile."""


def image_models() -> list[str]:
    sys.path.insert(0, str(IMAGE_BUILD))
    try:
        from compile_kernels import MODELS
    finally:
        sys.path.remove(str(IMAGE_BUILD))
    return list(MODELS)


def compiled(folder: Path, *names: str) -> list[tuple[str, int, int]]:
    """Kernels, and the bytes of their shared memory and stack frame."""
    command = [sys.executable, "-m", "finetune_test_kernels.compiled_models", "75", str(folder), *names]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(name.split()[0], shared, frame) for name, (shared, frame) in json.loads(done.stdout).items()]


@pytest.mark.parametrize("name", [*image_models(), *OTHERS])
def test_layers_fit_turing(name: str, tmp_path: Path) -> None:
    found = compiled(tmp_path, name)
    assert len(found) >= 9
    assert max(shared for _, shared, _ in found) <= SHARED, found
    spilled = {kernel: frame for kernel, _, frame in found if frame}
    assert spilled == (LARGEST_FRAMES if name == "Gemma 2 2B" else {})


def test_kernels_beside_the_layers_fit_turing(tmp_path: Path) -> None:
    found = compiled(tmp_path)
    assert {name for name, _, _ in found} == {"_add_block", "_gather", "_drop", "_add_lora_dx"}
    assert max(shared for _, shared, _ in found) <= SHARED, found
    assert not any(frame for _, _, frame in found), found
