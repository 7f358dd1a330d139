"""The compiled encoders by tensor type, on as many threads as torch uses.

numba compiles a kernel when it is first used (seconds each), so small tensors are left to torch, which gives the same
bytes.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from finetune_trainer.export.quantization.affine import AffineQuantizer
from finetune_trainer.export.quantization.codebook import Float4Quantizer, NonlinearQuantizer, NonlinearSuperQuantizer
from finetune_trainer.export.quantization.cpu import affine, codebook, floats, plain, symmetric
from finetune_trainer.export.quantization.cpu.jit import Bytes, Floats
from finetune_trainer.export.quantization.floats import FloatQuantizer
from finetune_trainer.export.quantization.plain import Int8Quantizer, PlainAffineQuantizer, PlainSymmetricQuantizer
from finetune_trainer.export.quantization.quantizer import Quantizer
from finetune_trainer.export.quantization.quantizers import QUANTIZERS
from finetune_trainer.export.quantization.symmetric import SymmetricQuantizer

Kernel = Callable[[Floats, Bytes], None]
"""(blocks, encoded): numpy fp32 [n, block size], uint8 [n, block bytes]."""
TASK_WEIGHTS = 1 << 18  # 1 MiB of fp32, which fits a core's cache

TWINS: dict[type[Quantizer], Callable[..., None]] = {
    FloatQuantizer: floats.encode,
    Int8Quantizer: plain.encode_int8,
    PlainSymmetricQuantizer: plain.encode_symmetric,
    PlainAffineQuantizer: plain.encode_affine,
    AffineQuantizer: affine.encode,
    SymmetricQuantizer: symmetric.encode,
    NonlinearQuantizer: codebook.encode_nonlinear,
    NonlinearSuperQuantizer: codebook.encode_nonlinear_super,
    Float4Quantizer: codebook.encode_float4,
}
"""The compiled encoder of each class of quantizers."""

KERNELS: dict[GGMLQuantizationType, Kernel] = {
    tensor_type: partial(TWINS[type(quantizer)], quantizer=quantizer) for tensor_type, quantizer in QUANTIZERS.items()
}


def encode_compiled(weights: torch.Tensor, encoded: torch.Tensor, tensor_type: GGMLQuantizationType) -> None:
    """Fill uint8 `encoded` [n, block bytes] from `weights` [n, block size] of 16 or 32 bits.

    Both are contiguous on the CPU.
    """
    step = max(1, TASK_WEIGHTS // weights.shape[1])
    tasks = zip(weights.split(step), encoded.split(step), strict=True)
    for _ in _threads().map(lambda task: KERNELS[tensor_type](_widen(task[0]), task[1].numpy()), tasks):
        pass


def encode_piece(weights: torch.Tensor, tensor_type: GGMLQuantizationType) -> torch.Tensor:
    """Encode at most TASK_WEIGHTS contiguous `weights` of 16 or 32 bits on this thread.

    Returns uint8 [encoded bytes] in memory that the thread's next piece overwrites.
    """
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks = weights.view(-1, block_size)
    encoded = _memory.encoded[: len(blocks) * block_bytes]
    KERNELS[tensor_type](_widen(blocks), encoded.reshape(-1, block_bytes))
    return torch.from_numpy(encoded)


def holds_infinity(encoded: torch.Tensor) -> bool:
    """True if float16s, given as uint8 [bytes], overflowed; torch takes ten times as long."""
    return bool(floats.count_infinite(encoded.view(torch.uint16).numpy()))


class _ThreadMemory(threading.local):
    """Each thread's memory for one piece, which stays in its core's cache."""

    def __init__(self) -> None:
        self.wide = np.empty(TASK_WEIGHTS, np.float32)
        self.encoded = np.empty(4 * TASK_WEIGHTS, np.uint8)


_memory = _ThreadMemory()


def _widen(weights: torch.Tensor) -> Floats:
    """numpy fp32 of the same shape, in this thread's memory if `weights` have 16 bits."""
    if weights.dtype is torch.float32:
        return weights.numpy()

    wide = _memory.wide[: weights.numel()]
    widen = floats.widen_bf16 if weights.dtype is torch.bfloat16 else floats.widen_f16
    widen(weights.view(torch.uint16).flatten().numpy(), wide)
    return wide.reshape(weights.shape)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="encode")
