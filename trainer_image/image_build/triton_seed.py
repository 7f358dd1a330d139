"""Fills a Triton cache with what Triton would compile by gcc at its first kernel: the module that calls CUDA's driver.

Runs in the builder stage, under the image's environment, without a driver: `libcuda.so.1` is an empty stand-in, which
the linker is content with. The image has no compiler. Its pods copy the cache into their own (job/triton_cache.py of
the trainer).

    python triton_seed.py FOLDER
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def compile_driver_module(folder: Path) -> Path:
    """Lets Triton compile its driver module into the cache `folder`; returns the module."""
    # Triton's cache key has the answer of the program `file`, which the image has not.
    assert shutil.which("file") is None, "the module would be kept under another key than the image looks for"

    with tempfile.TemporaryDirectory() as libraries:
        stand_in = Path(libraries) / "libcuda.so.1"
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", stand_in, "-x", "c", os.devnull]
        subprocess.run(command, check=True)
        os.environ |= {"TRITON_LIBCUDA_PATH": libraries, "TRITON_CACHE_DIR": str(folder)}

        from triton.backends.nvidia.driver import CudaUtils

        with suppress(ImportError):  # it is compiled and kept, then loaded: the stand-in has none of CUDA's functions
            CudaUtils()

    modules = list(folder.glob("*/cuda_utils.*.so"))
    if len(modules) != 1:
        raise RuntimeError(f"Triton has left {len(modules)} modules in {folder}, not one: has it another cache now?")
    return modules[0]


if __name__ == "__main__":
    print(compile_driver_module(Path(sys.argv[1])))
