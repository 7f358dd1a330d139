"""Block quantisation of weights: in torch on a GPU and for small tensors, compiled for large ones on a CPU.

Each encoder takes blocks of consecutive weights of a row and gives the bytes that llama.cpp reads. The arithmetic
follows the published reference operation by operation (fp32, one rounding each), so that the bytes are equal to the
reference's, not only close: d is the scale stored as float16, q the integers, and

    Q8_0: d = max|x| / 127, q = round_half_away(x / d)           Q4_1, Q5_1: d = (max - min) / (2^b - 1), m = min
    Q4_0, Q5_0: d = x_at_max|x| / -2^(b-1), q = trunc(x / d + 2^(b-1) + 1/2)     q = trunc((x - m) / d + 1/2)
"""

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from finetune_trainer.export.quantization import k_quants

# Quantising makes up to a dozen fp32 temporaries of a chunk's size: 1 MiB each stays in a CPU's cache, 128 MiB each
# keeps a GPU busy.
CPU_CHUNK_WEIGHTS, GPU_CHUNK_WEIGHTS = 1 << 18, 1 << 25
# Compiling takes a CPU some seconds, and torch takes 20 to 50 ms for this many weights of a type: less is left to it.
# Of the plain types torch converts this many in 50 to 100 ms, which is less than importing numba takes.
COMPILED_WEIGHTS, COMPILED_PLAIN_WEIGHTS = 1 << 20, 1 << 26
PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def encoded_size(shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> int:
    """Bytes of a tensor of `shape` in `tensor_type`."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    return torch.Size(shape).numel() // block_size * block_bytes


def is_worth_compiling(weights: int, tensor_type: GGMLQuantizationType) -> bool:
    """Whether compiling an encoder for a CPU pays for this many weights in all."""
    return weights >= (COMPILED_PLAIN_WEIGHTS if tensor_type in PLAIN_DTYPES else COMPILED_WEIGHTS)


def quantize(weights: torch.Tensor, tensor_type: GGMLQuantizationType) -> torch.Tensor:
    """Encode `weights` [..., columns] of 16 or 32 bits as `tensor_type`; columns are a multiple of its block size.

    Returns uint8 [encoded bytes] on the same device.
    """
    if tensor_type in PLAIN_DTYPES and not _is_compiled(weights, tensor_type):
        return _as_bytes(weights.flatten(), PLAIN_DTYPES[tensor_type])  # at once: on busy cores each call waits
    encode = ENCODERS[tensor_type]
    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks = weights.reshape(-1, block_size)
    encoded = torch.empty((blocks.shape[0], block_bytes), dtype=torch.uint8, device=weights.device)
    if _is_compiled(weights, tensor_type):
        from finetune_trainer.export.quantization.cpu.encode import encode_compiled  # numba takes a second to import

        encode_compiled(blocks.contiguous(), encoded, tensor_type)
        return encoded.flatten()
    step = (GPU_CHUNK_WEIGHTS if weights.is_cuda else CPU_CHUNK_WEIGHTS) // block_size
    for start in range(0, blocks.shape[0], step):
        encoded[start : start + step] = encode(blocks[start : start + step].to(torch.float32))
    return encoded.flatten()


def _is_compiled(weights: torch.Tensor, tensor_type: GGMLQuantizationType) -> bool:
    return weights.device.type == "cpu" and is_worth_compiling(weights.numel(), tensor_type)


def _as_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).contiguous().view(torch.uint8)


def _encode_plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def encode(blocks: torch.Tensor) -> torch.Tensor:
        return _as_bytes(blocks, dtype)

    return encode


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """True division: by a Python number, a GPU would multiply with the reciprocal and round twice."""
    return values / values.new_full((), divisor)


def _encode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    scale = _divide(blocks.abs().amax(dim=1, keepdim=True), 127)
    scaled = blocks * _inverse(scale)
    magnitude = scaled.abs()
    floor = magnitude.floor()
    rounded = torch.copysign(floor + (2 * (magnitude - floor)).floor(), scaled)  # half away from zero
    return torch.cat([_as_bytes(scale, torch.float16), _as_bytes(rounded, torch.int8)], dim=1)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 32] codes -> [blocks, 16]: the first half of a block in the low nibbles, the second in the high ones."""
    low, high = (codes & 0x0F).chunk(2, dim=1)
    return low | (high << 4)


def _pack_fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 32] 5-bit codes -> [blocks, 4]: bit i of the little-endian word is the high bit of code i."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) * weights).sum(dim=2, dtype=torch.uint8)


def _pack(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    nibbles = _pack_nibbles(codes)
    return [nibbles] if bits == 4 else [_pack_fifth_bits(codes), nibbles]


def _encode_symmetric(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    half = 1 << (bits - 1)

    def encode(blocks: torch.Tensor) -> torch.Tensor:
        largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) + 0.0  # signed; the first of equals
        scale = largest / -half
        codes = (blocks * _inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1).to(torch.uint8)
        return torch.cat([_as_bytes(scale, torch.float16), *_pack(codes, bits)], dim=1)

    return encode


def _encode_affine(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    top = (1 << bits) - 1

    def encode(blocks: torch.Tensor) -> torch.Tensor:
        # argmin takes the first of equals, as llama.cpp does: zeros have signs.
        minimum = blocks.gather(1, blocks.argmin(dim=1, keepdim=True))
        maximum = blocks.amax(dim=1, keepdim=True)
        scale = _divide(maximum - minimum + 0.0, top)
        codes = ((blocks - minimum) * _inverse(scale) + 0.5).trunc().clamp(0, top).to(torch.uint8)
        return torch.cat(
            [_as_bytes(scale, torch.float16), _as_bytes(minimum, torch.float16), *_pack(codes, bits)], dim=1
        )

    return encode


ENCODERS: dict[GGMLQuantizationType, Callable[[torch.Tensor], torch.Tensor]] = {
    **{tensor_type: _encode_plain(dtype) for tensor_type, dtype in PLAIN_DTYPES.items()},
    GGMLQuantizationType.Q8_0: _encode_q8_0,
    GGMLQuantizationType.Q4_0: _encode_symmetric(4),
    GGMLQuantizationType.Q4_1: _encode_affine(4),
    GGMLQuantizationType.Q5_0: _encode_symmetric(5),
    GGMLQuantizationType.Q5_1: _encode_affine(5),
    GGMLQuantizationType.Q2_K: k_quants.encode_q2_k,
    GGMLQuantizationType.Q3_K: k_quants.encode_q3_k,
    GGMLQuantizationType.Q4_K: k_quants.encode_q4_k,
    GGMLQuantizationType.Q5_K: k_quants.encode_q5_k,
    GGMLQuantizationType.Q6_K: k_quants.encode_q6_k,
}
