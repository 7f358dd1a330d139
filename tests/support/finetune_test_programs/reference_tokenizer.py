"""llama.cpp's own tokenizer as a judge: `llama_tokenize` on a GGUF file, through ctypes in a process of its own.

The library is the quantiser's (`reference_quantizer`).
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune_test_programs.reference_quantizer import load_library

MAX_TOKENS = 4096


class _ModelParameters(ctypes.Structure):
    """`llama_model_params`, from llama.h, which is smaller; it is only passed on."""

    _fields_ = (("content", ctypes.c_byte * 512),)


def tokenize(files: Sequence[Path], texts: Sequence[str]) -> list[list[list[int]]]:
    """Ids of every text, for every GGUF file; special tokens are neither added nor parsed.

    Raises RuntimeError with llama.cpp's log.
    """
    done = subprocess.run(
        [sys.executable, "-m", "finetune_test_programs.reference_tokenizer"],
        input=json.dumps({"files": [str(path) for path in files], "texts": list(texts)}),
        capture_output=True,
        text=True,
        errors="replace",  # a log may break a character off
        timeout=280,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp could not read {', '.join(path.name for path in files)}: {done.stderr[-2000:]}")
    found: list[list[list[int]]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Child process: reads a request from standard input, writes the ids as JSON to standard output."""
    request = json.load(sys.stdin)
    ggml, library = load_library("libggml.so.0"), load_library("libllama.so.0")
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load(str(Path(library._name).parents[1] / "bin/libggml-cpu.so").encode())
    library.llama_model_default_params.restype = _ModelParameters
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParameters]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip

    answers = []
    for path in request["files"]:
        model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
        if not model:
            sys.exit(1)
        vocabulary = library.llama_model_get_vocab(model)
        answers.append([_ids(library, vocabulary, text.encode()) for text in request["texts"]])
    print(json.dumps(answers))


def _ids(library: ctypes.CDLL, vocabulary: int, text: bytes) -> list[int]:
    tokens = (ctypes.c_int32 * MAX_TOKENS)()
    count = library.llama_tokenize(vocabulary, text, len(text), tokens, MAX_TOKENS, False, False)
    if count < 0:
        raise RuntimeError(f"a text has {-count} tokens, more than {MAX_TOKENS}")
    return list(tokens[:count])


if __name__ == "__main__":
    main()
