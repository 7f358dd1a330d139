"""The compiled encoders by type, on as many threads as torch uses.

numba compiles a kernel when it is first used (seconds each), so small tensors are left to torch, which gives the same
bytes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType

from finetune_trainer.gguf import k_quant_forms
from finetune_trainer.gguf.compiled import affine, blocks, symmetric
from finetune_trainer.gguf.k_quant_forms import AffineForm, SymmetricForm

Kernel = Callable[[Any, Any], None]
"""(blocks, encoded): numpy fp32 [n, block size], uint8 [n, block bytes]."""
TASK_WEIGHTS = 1 << 18


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
    """Fill uint8 `encoded` [n, block bytes] from fp32 `weights` [n, block size], both contiguous on the CPU."""
    kernel, step = KERNELS[tensor_type], max(1, TASK_WEIGHTS // weights.shape[1])
    source, target = weights.numpy(), encoded.numpy()
    tasks = [(source[at : at + step], target[at : at + step]) for at in range(0, len(source), step)]
    for _ in _threads().map(lambda task: kernel(*task), tasks):
        pass


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="encode")
