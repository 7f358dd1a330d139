"""Encoding of weights as any tensor type: in torch on a GPU and for small tensors, compiled for large ones on a CPU."""

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from finetune_trainer.export.quantization.floats import FLOAT_DTYPES
from finetune_trainer.export.quantization.quantizer import as_bytes
from finetune_trainer.export.quantization.quantizers import QUANTIZERS

# Quantising makes up to a dozen fp32 temporaries of a chunk's size: 1 MiB each stays in a CPU's cache, 128 MiB each
# keeps a GPU busy.
CPU_CHUNK_WEIGHTS, GPU_CHUNK_WEIGHTS = 1 << 18, 1 << 25
# Compiling takes a CPU some seconds, and torch takes 20 to 50 ms for this many weights of a type: fewer are left to
# torch. It converts this many to a float type in 50 to 100 ms, which is less than importing numba takes.
MIN_COMPILED_WEIGHTS, MIN_COMPILED_FLOATS = 1 << 20, 1 << 26


def encoded_size(shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> int:
    """Bytes of a tensor of `shape` in `tensor_type`."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    return torch.Size(shape).numel() // block_size * block_bytes


def is_worth_compiling(weights: int, tensor_type: GGMLQuantizationType) -> bool:
    """True if compiling an encoder for a CPU pays for this many weights in all."""
    return weights >= (MIN_COMPILED_FLOATS if tensor_type in FLOAT_DTYPES else MIN_COMPILED_WEIGHTS)


def quantize(weights: torch.Tensor, tensor_type: GGMLQuantizationType) -> torch.Tensor:
    """Encode `weights` [..., columns] of 16 or 32 bits as `tensor_type`; columns are a multiple of its block size.

    Returns uint8 [encoded bytes] on the same device.
    """
    is_compiled = weights.device.type == "cpu" and is_worth_compiling(weights.numel(), tensor_type)
    if tensor_type in FLOAT_DTYPES and not is_compiled:
        return as_bytes(weights.flatten(), FLOAT_DTYPES[tensor_type])  # in one call: on busy cores each call waits

    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks = weights.reshape(-1, block_size)  # [n, block size]
    encoded = torch.empty((blocks.shape[0], block_bytes), dtype=torch.uint8, device=weights.device)

    if is_compiled:
        from finetune_trainer.export.quantization.cpu.encode import encode_compiled  # numba takes a second to import

        encode_compiled(blocks.contiguous(), encoded, tensor_type)
        return encoded.flatten()

    quantizer = QUANTIZERS[tensor_type]
    step = (GPU_CHUNK_WEIGHTS if weights.is_cuda else CPU_CHUNK_WEIGHTS) // block_size
    for start in range(0, blocks.shape[0], step):
        encoded[start : start + step] = quantizer.encode(blocks[start : start + step].to(torch.float32))
    return encoded.flatten()
