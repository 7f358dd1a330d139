"""Preflight does without PyTorch: tokenizers and configurations need none of it, and importing it with bitsandbytes
takes 10 s and 670 MiB, more than everything else together."""

import os
import sys


def leave_out_torch() -> None:
    """Make PyTorch absent from this process (None in sys.modules is Python's way to say so), before transformers is
    imported: it then offers tokenizers and configurations only."""
    if "torch" not in sys.modules:
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that models cannot be used is what is wanted
        sys.modules["torch"] = None  # type: ignore[assignment]
