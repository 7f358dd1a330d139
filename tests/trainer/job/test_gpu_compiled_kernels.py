"""Kernels that were compiled without a card are those that a card looks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # a GPU's image has other versions than the lock, which warn of other things
]
IMAGE_BUILD = Path(__file__).resolve().parents[3] / "trainer_image/image_build"
SIZES = {"hidden": 256, "mlp": 512, "heads": 4, "kv": 2, "head": 64, "vocab": 512}
KINDS = ("llama", "qwen3", "gemma3_text")
PROGRAM = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import compile_kernels
from cardless_driver import Compilations

capability, sizes = int(sys.argv[2]), json.loads(sys.argv[3])
models = {kind: (kind, sizes) for kind in sys.argv[5:]}
if sys.argv[4] == "without a card":
    import os
    done = compile_kernels.compile_for(capability, Path(os.environ["TRITON_CACHE_DIR"]), models)
    compile_kernels.keep_binaries(Path(os.environ["TRITON_CACHE_DIR"]))
else:
    from triton import knobs
    knobs.compilation.listener = done = Compilations()
    begun = time.monotonic()
    for kind, sizes in models.values():
        dtype = compile_kernels.compute_dtype(capability)
        compile_kernels.run_layers(kind, sizes, dtype, fp8=capability >= compile_kernels.FP8_FROM, device="cuda")
    print(f"{time.monotonic() - begun:.1f} s", file=sys.stderr)
print(json.dumps([sorted(done.compiled), len(done.found)]))
"""


def run(cache: Path, where: str) -> tuple[list[str], int]:
    """Names of the kernels that were compiled, and the number of those found."""
    major, minor = torch.cuda.get_device_capability()
    arguments = [str(IMAGE_BUILD), str(10 * major + minor), json.dumps(SIZES), where, *KINDS]
    command = ["env", f"TRITON_CACHE_DIR={cache}", sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(where, done.stderr[-200:])
    compiled, found = json.loads(done.stdout.splitlines()[-1])
    return compiled, found


def test_a_card_finds_what_was_compiled_without_one(tmp_path: Path) -> None:
    made, _ = run(tmp_path / "image", "without a card")
    assert len(made) > 20
    compiled, found = run(tmp_path / "image", "on the card")
    assert (compiled, found) == ([], len(made))
    compiled, _ = run(tmp_path / "empty", "on the card")
    assert compiled == made, "the control: without the image's cache all of them are compiled"
