"""Fills a Triton cache with what Triton would compile by gcc at its first kernel: the module that calls CUDA's driver.

Runs in the builder stage, under the image's environment, without a driver: `libcuda.so.1` is a stand-in with the
functions that the module calls. Without them the linker would not note that the module needs that library, and it could
not be loaded beside a real driver. The image has no compiler; its pods copy the cache into their own
(job/triton_cache.py of the trainer).

    python triton_seed.py FOLDER
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


def compile_driver_module(folder: Path) -> Path:
    """Lets Triton compile its driver module into the cache `folder`; returns the module."""
    # Triton's cache key has the answer of the program `file`, which the image has not.
    assert shutil.which("file") is None, "the module would be kept under another key than the image looks for"

    with tempfile.TemporaryDirectory() as libraries:
        _make_stand_in(Path(libraries) / "libcuda.so.1")
        os.environ |= {"TRITON_LIBCUDA_PATH": libraries, "TRITON_CACHE_DIR": str(folder)}

        os.environ |= {"LD_LIBRARY_PATH": libraries, "CC": str(_make_compiler(Path(libraries) / "cc"))}
        load = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"
        subprocess.run([sys.executable, "-c", load], check=True)  # the loader reads LD_LIBRARY_PATH when it starts

    modules = list(folder.glob("*/cuda_utils.*.so"))
    if len(modules) != 1:
        raise RuntimeError(f"Triton has left {len(modules)} modules in {folder}, not one: has it another cache now?")
    return modules[0]


def _make_compiler(program: Path) -> Path:
    """Makes a gcc that forgets the folder of its source, Triton's first argument: it has another name each time, and
    assertions would carry it into the module, so that no two images were equal."""
    program.write_text('#!/bin/sh\nexec gcc "-fmacro-prefix-map=${1%/*}=." "$@"\n')
    program.chmod(0o755)
    return program


def _make_stand_in(library: Path) -> None:
    source = Path(find_spec("triton").submodule_search_locations[0], "backends/nvidia/driver.c").read_text()
    functions = sorted(set(re.findall(r"\b(cu[A-Z]\w*)\(", source)))
    stand_in = "".join(f"int {name}() {{ return 0; }}\n" for name in functions)
    command = ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, "-x", "c", "-"]
    subprocess.run(command, input=stand_in, text=True, check=True)


if __name__ == "__main__":
    print(compile_driver_module(Path(sys.argv[1])))
