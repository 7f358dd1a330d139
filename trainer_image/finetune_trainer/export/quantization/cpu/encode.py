"""The compiled encoders by type, on as many threads as torch uses.

numba compiles a kernel when it is first used (seconds each), so small tensors are left to torch, which gives the same
bytes.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from finetune_trainer.export.quantization import k_quant_forms
from finetune_trainer.export.quantization.cpu import affine, blocks, plain, symmetric
from finetune_trainer.export.quantization.k_quant_forms import AffineForm, SymmetricForm

Kernel = Callable[[Any, Any], None]
"""(blocks, encoded): numpy fp32 [n, block size], uint8 [n, block bytes]."""
TASK_WEIGHTS = 1 << 18  # 1 MiB of fp32, which fits a core's cache


def _affine(form: AffineForm) -> Kernel:
    def encode(held: Any, encoded: Any) -> None:
        steps = np.array(form.steps(), dtype=np.float32)
        affine.encode_affine(held, encoded, form.bits, form.group, form.scale_top, steps, form.rounds, form.mean_weight)

    return encode


def _symmetric(form: SymmetricForm) -> Kernel:
    def encode(held: Any, encoded: Any) -> None:
        steps = np.array(form.steps(), dtype=np.float32)
        symmetric.encode_symmetric(
            held, encoded, form.bits, form.group, form.scale_half, steps, form.rounds, form.scale_offset
        )

    return encode


KERNELS: dict[GGMLQuantizationType, Kernel] = {
    GGMLQuantizationType.F32: plain.encode_f32,
    GGMLQuantizationType.F16: plain.encode_f16,
    GGMLQuantizationType.BF16: plain.encode_bf16,
    GGMLQuantizationType.Q8_0: blocks.encode_q8_0,
    GGMLQuantizationType.Q4_0: partial(blocks.encode_symmetric_blocks, bits=4),
    GGMLQuantizationType.Q5_0: partial(blocks.encode_symmetric_blocks, bits=5),
    GGMLQuantizationType.Q4_1: partial(blocks.encode_affine_blocks, bits=4),
    GGMLQuantizationType.Q5_1: partial(blocks.encode_affine_blocks, bits=5),
    GGMLQuantizationType.Q2_K: _affine(k_quant_forms.Q2_K),
    GGMLQuantizationType.Q4_K: _affine(k_quant_forms.Q4_K),
    GGMLQuantizationType.Q5_K: _affine(k_quant_forms.Q5_K),
    GGMLQuantizationType.Q3_K: _symmetric(k_quant_forms.Q3_K),
    GGMLQuantizationType.Q6_K: _symmetric(k_quant_forms.Q6_K),
}


def encode_compiled(weights: torch.Tensor, encoded: torch.Tensor, tensor_type: GGMLQuantizationType) -> None:
    """Fill uint8 `encoded` [n, block bytes] from `weights` [n, block size] of 16 or 32 bits, both contiguous on the
    CPU."""
    step = max(1, TASK_WEIGHTS // weights.shape[1])
    tasks = zip(weights.split(step), encoded.split(step), strict=True)
    for _ in _threads().map(lambda task: KERNELS[tensor_type](_widen(task[0]), task[1].numpy()), tasks):
        pass


def encode_piece(weights: torch.Tensor, tensor_type: GGMLQuantizationType) -> torch.Tensor:
    """Encode at most TASK_WEIGHTS contiguous `weights` of 16 or 32 bits on this thread; returns uint8 [encoded bytes]
    in memory that the thread's next piece overwrites."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks = weights.view(-1, block_size)
    encoded = _own.encoded[: len(blocks) * block_bytes]
    KERNELS[tensor_type](_widen(blocks), encoded.reshape(-1, block_bytes))
    return torch.from_numpy(encoded)


def holds_infinity(halves: torch.Tensor) -> bool:
    """Whether float16s, given as uint8 [bytes], overflowed; torch takes ten times as long."""
    return bool(plain.count_infinite(halves.view(torch.uint16).numpy()))


class _Own(threading.local):
    """Each thread's memory for one piece, which stays in its core's cache."""

    def __init__(self) -> None:
        self.wide = np.empty(TASK_WEIGHTS, np.float32)
        self.encoded = np.empty(4 * TASK_WEIGHTS, np.uint8)


_own = _Own()


def _widen(weights: torch.Tensor) -> Any:
    """numpy fp32 of the same shape."""
    if weights.dtype is torch.float32:
        return weights.numpy()
    wide = _own.wide[: weights.numel()]
    widen = plain.widen_bf16 if weights.dtype is torch.bfloat16 else plain.widen_f16
    widen(weights.view(torch.uint16).flatten().numpy(), wide)
    return wide.reshape(weights.shape)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="encode")
