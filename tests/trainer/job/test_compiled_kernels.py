"""Kernels that an image compiled without a card are found by a pod in its own cache."""

import json
import subprocess
import sys

import pytest

from finetune_devcluster.platform import CHECKOUT

IMAGE_BUILD = CHECKOUT / "trainer_image/image_build"
SIZES = {"hidden": 64, "mlp": 128, "heads": 4, "kv": 2, "head": 16, "vocab": 256}
PROGRAM = """
import json, sys
from pathlib import Path
import compile_kernels
from finetune_trainer.job.triton_cache import seed_triton_cache
from triton.runtime.jit import _triton_jit_function_registry as kernels

image, pod, sizes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
compile_kernels.TOKENS = (32,)


def compile_anew(cache):
    for kernel in kernels.values():
        kernel.device_caches.clear()
    done = compile_kernels.compile_for(75, cache, {"small": ("llama", sizes)})
    return len(done.compiled), len(done.found)


first = compile_anew(image)
compile_kernels.keep_binaries(image)
seed_triton_cache(image, pod)
print(json.dumps({"image": first, "pod": compile_anew(pod)}))
"""


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    image, pod = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("pod")
    command = [sys.executable, "-c", PROGRAM, str(image), str(pod), json.dumps(SIZES)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(image), "PYTHONPATH": str(IMAGE_BUILD), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return counted


def test_what_the_image_compiled_the_pod_finds(counts: dict[str, list[int]]) -> None:
    compiled, found = counts["image"]
    assert compiled >= 10, "norms, RoPE, activations and the loss, forward and backward"
    assert found == 0
    assert counts["pod"] == [0, compiled]
