"""Keeps preflight's process small: no PyTorch, and freed memory goes back to the system."""

import ctypes
import os
import sys


def block_torch_import() -> None:
    """Makes PyTorch look absent to this process; call it before transformers is imported.

    transformers then offers tokenizers and configurations only, which is all that preflight needs. Importing PyTorch
    with bitsandbytes takes 10 s and 670 MiB, more than everything else together.
    """
    if "torch" not in sys.modules:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would warn that models cannot be used
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say "not there"


def release_freed_memory() -> None:
    """Gives freed heap memory back to the system, where the C library can.

    glibc keeps 75 MiB after a tokenizer of 128,000 tokens was read from JSON; large rows never use them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
