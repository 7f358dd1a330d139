"""Tiles fit into a GPU's shared memory, as the compiler counts it. The interpreter, which the other tests use, has no
such limit: ranks that a GPU refuses pass there."""

import json
import os
import subprocess
import sys

import pytest

from finetune_kernels.ops.adapted_activation import MAX_RANK

SHARED = {80: 163, 89: 99, 90: 227}
"""KiB that one program may have, by compute capability (CUDA's programming guide)."""


def shared_memory(capability: int, *ranks: int) -> dict[str, int]:
    """Bytes by kernel and rank."""
    command = [sys.executable, "-m", "finetune_test_kernels.compiled_kernels", str(capability), *map(str, ranks)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return dict(json.loads(found.stdout))


@pytest.mark.parametrize("capability", SHARED)
def test_adapted_activation(capability: int) -> None:
    found = shared_memory(capability, 16, MAX_RANK // 2, MAX_RANK)
    assert len(found) == 6
    assert min(found.values()) > 0
    assert max(found.values()) <= SHARED[capability] * 1024, found
