"""Triton's interpreter, with E4M3 rounded as GPUs do: to the nearest, ties to even. The interpreter's own cast loses
the carry into the exponent (127 becomes 64) and rounds every tie up."""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_own_cast = interpreter.InterpreterBuilder.create_fp_to_fp


def _cast(builder: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source.dtype.scalar != tl.float32 or target.scalar != tl.float8e4nv:
        return _own_cast(builder, source, target, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
    return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), target.scalar)


def round_e4m3_in_interpreter() -> None:
    """Replace the cast from fp32 for the rest of the process; where kernels are compiled, change nothing."""
    if triton.knobs.runtime.interpret:
        interpreter.InterpreterBuilder.create_fp_to_fp = _cast
