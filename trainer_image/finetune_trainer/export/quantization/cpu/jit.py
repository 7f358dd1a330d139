"""The decorator of everything that numba compiles, and the number types of that code."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, error_model="numpy", boundscheck=False)
"""Compiles to machine code that runs without the interpreter's lock, with IEEE arithmetic in the order written."""

f4, u4, u2, u1 = np.float32, np.uint32, np.uint16, np.uint8
