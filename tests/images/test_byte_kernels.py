"""Kernels of products of bytes keep weights in registers on each generation of cards. The compiler counts, no card is
needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.images, pytest.mark.timeout(600)]
MOST_SHARED = 4096
"""Bytes of shared memory, of 64 KiB on the smallest card."""
MOST_INSTRUCTIONS = 13.5
"""A weight; 10.6 to 12.5 were counted, where single bytes with a scale each took 22."""


def compiled(capability: int, cache: Path, *options: str) -> dict[str, tuple[float, int, int]]:
    """Instructions a value, bytes of shared memory and of the stack frame, by kernel and type."""
    command = [sys.executable, "-m", "finetune_test_kernels.compiled_bytes", str(capability), str(cache), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (count, shared, frame) for name, (count, shared, frame) in json.loads(done.stdout).items()}


@pytest.mark.parametrize(
    ("capability", "kinds"), [(75, {"int8"}), (80, {"int8"}), (89, {"int8", "E4M3"}), (90, {"int8", "E4M3"})]
)
def test_nothing_spills(capability: int, kinds: set[str], tmp_path: Path) -> None:
    found = compiled(capability, tmp_path)
    assert found.keys() == {"rescale", *(f"{kind} {order}" for kind in kinds for order in ("rows", "columns"))}
    assert max(count for count, _, _ in found.values()) < MOST_INSTRUCTIONS, found
    assert max(shared for _, shared, _ in found.values()) <= MOST_SHARED, found
    assert not any(frame for _, _, frame in found.values()), found


def test_large_tiles_spill(tmp_path: Path) -> None:
    """The control."""
    found = compiled(75, tmp_path, "--large-tiles")
    assert found["int8 columns"][2] > 0, found
