"""Triton's interpreter, without what it finds out again at every step and always finds the same.

A quarter of the time of our kernels' tests on a CPU went into it: at each call of a device function, which members of
`triton.language` are builtins (`inspect.getmembers` of 400 names, sorted); for each tensor, the numpy type of its
elements (a table of 18 entries, made anew) and its block type (made anew, with its shape checked). What a kernel
computes stays the interpreter's own work.
"""

import functools
import inspect
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtin_names(package: Any) -> tuple[str, ...]:
    """Names of the builtins of a module or class, which must not be replaced yet."""
    return tuple(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtin_names(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # one that is replaced already is none
            interpreter._patch_attr(package, name, member, builder, scope)


_numpy_type_of_scalar = functools.cache(interpreter._get_np_dtype)


def _get_np_dtype(of: Any) -> Any:
    scalar = of.element_ty if isinstance(of, tl.block_type) else of
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _numpy_type_of_scalar(scalar)


@functools.cache
def _block_of_scalars(scalar: Any, *shape: int) -> Any:
    return tl.block_type(scalar, list(shape))


def _with_element_ty(block: Any, scalar: Any) -> Any:
    return tl.block_type(scalar, block.shape) if scalar.is_ptr() else _block_of_scalars(scalar, *block.shape)


def hasten_interpreter() -> None:
    """Replace the searches for the rest of the process, before any kernel has run; where kernels are compiled, change
    nothing."""
    if not triton.knobs.runtime.interpret:
        return
    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtin_names(package)
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _get_np_dtype
    tl.block_type.with_element_ty = _with_element_ty
    tl.block_type.to_ir = lambda block, builder: block  # the interpreter's own types are those of the language
