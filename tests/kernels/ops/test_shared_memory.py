"""Kernels fit into a GPU's shared memory and registers, as the compiler counts them. The interpreter, which the other
tests use, has no such limits: ranks that a GPU refuses pass there."""

import json
import os
import subprocess
import sys

import pytest

from finetune_kernels.ops.adapted_activation import MAX_RANK

SHARED = {75: 64, 80: 163, 89: 99, 90: 227}
"""KiB that one program may have, by compute capability (CUDA's programming guide)."""
TURING = 75

Resources = dict[str, tuple[int, int]]
"""Bytes of shared memory and of the stack frame, by kernel."""


def resources(capability: int, *arguments: object) -> Resources:
    """By kernel and rank."""
    command = [sys.executable, "-m", "finetune_test_kernels.compiled_kernels", str(capability), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return {name: (shared, frame) for name, (shared, frame) in json.loads(found.stdout).items()}


@pytest.mark.parametrize("capability", SHARED)
def test_adapted_activation(capability: int) -> None:
    found = resources(capability, 16, MAX_RANK // 2, MAX_RANK)
    assert len(found) == 6
    shared = [shared for shared, _ in found.values()]
    assert min(shared) > 0
    assert max(shared) <= SHARED[capability] * 1024, found
    assert capability != TURING or not any(frame for _, frame in found.values()), f"registers spill: {found}"


def test_a_kernel_that_spills_is_found() -> None:
    """The control: the tiles of Ampere. The layers of whole models take minutes: `make images` compiles them
    (tests/images/test_turing_kernels.py)."""
    found = resources(TURING, MAX_RANK, "--large-tiles")
    assert all(0 < frame < 1000 for _, frame in found.values()), found
