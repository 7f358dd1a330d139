"""The same bytes from every encoder: llama.cpp's (where its algorithm is followed), ours in torch, ours compiled."""

import dataclasses
import math

import pytest
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType

from finetune_test_programs.reference_quantizer import quantize_rows
from finetune_trainer.export.quantization import quantize as quantize_module
from finetune_trainer.export.quantization import tensor_types
from finetune_trainer.export.quantization.cpu import encode
from finetune_trainer.export.quantization.cpu.encode import KERNELS, encode_compiled
from finetune_trainer.export.quantization.cpu.float16 import round_to_float16
from finetune_trainer.export.quantization.file_types import FILE_TYPES
from finetune_trainer.export.quantization.floats import FLOAT_DTYPES
from finetune_trainer.export.quantization.quantize import quantize
from finetune_trainer.export.quantization.quantizers import QUANTIZERS
from finetune_trainer.export.quantization.tensor_types import TensorTypeInputs

FOLLOWED_NAMES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4")
FOLLOWED = [GGMLQuantizationType[name] for name in FOLLOWED_NAMES]
COLUMNS = 2048


def make() -> torch.Tensor:
    """Every kind of block: usual ones, ties, signed zeros, equal values, very small and very large ones."""
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(64, COLUMNS, generator=generator) * 0.02
    sparse = usual * (torch.rand(64, COLUMNS, generator=generator) < 0.02)
    whole = torch.randint(-3, 4, (64, COLUMNS), generator=generator).float()
    constant = torch.ones(1, COLUMNS) * 0.3
    return torch.cat([usual, sparse, whole, constant, -usual.abs(), usual.abs(), usual * 1e-6, usual * 1e5])


def encode_in_torch(x: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    return QUANTIZERS[kind].encode(x.reshape(-1, GGML_QUANT_SIZES[kind][0]))


@pytest.mark.parametrize("kind", FOLLOWED)
def test_simple_types_have_llama_cpps_bytes(kind: GGMLQuantizationType) -> None:
    x = make()
    reference = torch.from_numpy(quantize_rows(x.numpy(), kind)).flatten()
    assert torch.equal(encode_in_torch(x, kind).flatten(), reference)
    nudged = torch.from_numpy(quantize_rows((x * 1.01).numpy(), kind)).flatten()
    assert not torch.equal(reference, nudged)


def test_every_type_that_a_file_may_hold_has_a_quantizer_and_its_compiled_twin() -> None:
    matrices = {file_type.matrices for file_type in FILE_TYPES.values()}
    chosen = set(tensor_types._SMALLER_BLOCKS.values())
    for rule in tensor_types._RULES.values():
        model = TensorTypeInputs(MODEL_ARCH.LLAMA, 32, 8, 8)
        found = (rule(tensor_types._TensorPosition(index, 32, model)) for index in range(32))
        chosen |= {kind for kind in found if kind is not None}
    assert matrices | chosen <= QUANTIZERS.keys()
    assert KERNELS.keys() == QUANTIZERS.keys()
    assert all(encode.TWINS[type(quantizer)] for quantizer in QUANTIZERS.values())


@pytest.mark.parametrize("kind", KERNELS)
def test_compiled_code_gives_the_bytes_of_torch(kind: GGMLQuantizationType) -> None:
    """Also for a number of blocks that fills no tile: 4711 is prime."""
    x = make()
    blocks = x.reshape(-1, GGML_QUANT_SIZES[kind][0])[:4711]
    assert len(blocks) >= 3200
    encoded = torch.zeros(len(blocks), GGML_QUANT_SIZES[kind][1], dtype=torch.uint8)
    encode_compiled(blocks, encoded, kind)
    assert torch.equal(encoded, QUANTIZERS[kind].encode(blocks))


def test_many_weights_are_compiled_for_and_few_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    form = GGMLQuantizationType.Q4_K
    x = make()
    expected = encode_in_torch(x, form).flatten()
    with monkeypatch.context() as patched:
        patched.setattr(quantize_module, "MIN_COMPILED_WEIGHTS", x.numel() + 1)
        patched.setattr(encode, "encode_compiled", lambda *_: pytest.fail("few weights were compiled for"))
        assert torch.equal(quantize(x, form), expected)
    monkeypatch.setattr(quantize_module, "MIN_COMPILED_WEIGHTS", x.numel())
    in_torch = dataclasses.replace(QUANTIZERS[form], pack=lambda parts: pytest.fail("many weights went through torch"))
    monkeypatch.setitem(QUANTIZERS, form, in_torch)
    assert torch.equal(quantize(x, form), expected)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 of a 16-bit type: zeros, subnormal numbers, infinities and what is no number among them."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_widened_exactly(dtype: torch.dtype) -> None:
    values = every_number(dtype)
    found = encode.encode_piece(values, GGMLQuantizationType.F32).clone().view(torch.float32)
    assert torch.equal(found.isnan(), values.isnan())
    usual = ~values.isnan()
    assert torch.equal(found[usual].view(torch.int32), values[usual].float().view(torch.int32))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_compiled_rounding_to_16_bits_is_torchs(kind: GGMLQuantizationType) -> None:
    """Every number of the type, every midpoint between two, the numbers beside those; what is no number stays so
    (torch itself has several ways to write it)."""
    dtype = FLOAT_DTYPES[kind]
    numbers = every_number(dtype).double()
    finite = numbers[numbers.isfinite()].sort().values
    middles = ((finite[1:] + finite[:-1]) / 2).float()
    beside = [torch.nextafter(middles, torch.tensor(bound)) for bound in (0.0, math.inf, -math.inf)]
    largest = torch.finfo(torch.float32).max
    values = torch.cat([finite.float(), middles, *beside, torch.tensor([65519.0, 65520.0, largest, math.inf])])
    values = torch.cat([values, -values])
    found = torch.cat([encode.encode_piece(piece, kind).clone() for piece in values.split(encode.TASK_WEIGHTS)])
    assert torch.equal(found, values.to(dtype).view(torch.uint8))
    assert encode.encode_piece(torch.tensor([math.nan, -math.nan]), kind).view(dtype).isnan().all()


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_give_the_bytes_of_their_values(kind: GGMLQuantizationType, dtype: torch.dtype) -> None:
    x = make()[:128].to(dtype)
    expected = encode_in_torch(x.float(), kind).flatten()
    assert torch.equal(quantize(x, kind), expected)
    assert torch.equal(encode.encode_piece(x, kind), expected)


def test_rounding_to_float16_is_torchs() -> None:
    """Every float16, every midpoint between two, and the numbers beside those."""
    numbers = torch.arange(0, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(bound)) for bound in (0.0, math.inf)]
    values = torch.cat([numbers, middles, *beside, torch.tensor([65519.0, 65520.0, 1e9])])
    values = torch.cat([values, -values]).contiguous()
    found, bits = values.clone().numpy(), torch.zeros(len(values), dtype=torch.uint16).numpy()
    round_to_float16(found, bits, len(values))
    assert torch.equal(torch.from_numpy(bits).view(torch.int16), values.half().view(torch.int16))
    assert torch.equal(torch.from_numpy(found), values.half().float())
