"""FlashAttention 4 on a Hopper: out and gradients against the formula, as a share of the error of the FlashAttention
that PyTorch ships. Needs the package flash-attn-4."""

import pytest
import torch

from finetune_kernels.ops import attention, softcap_attention
from finetune_kernels.primitives.attention import flash, flash4
from finetune_kernels.primitives.attention import reference as attention_reference
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_kernels.tensor_checks import root_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability()[0] != flash4.HOPPER
        or not flash4.is_installed(),
        reason="FlashAttention 4 is for Hopper, with the package flash-attn-4",
    ),
]
RATIO = 1.3
"""Both round P and dS to 16 bits; they differ in the order of sums."""
LENGTHS = [(700, 1, 300, 129, 64), (1000, 0, 24, 0), (3,) * 40, (1024,)]
HEADS = [(8, 2, 128), (4, 4, 64), (6, 2, 96), (4, 1, 256), (4, 2, 192)]


def pack(lengths: tuple[int, ...]) -> PackedSequences:
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return PackedSequences(ends, max(lengths), sum(lengths))


def projection(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> tuple[Qkv, torch.Tensor]:
    """Views of one projection, and the gradient of out."""
    torch.manual_seed(0)
    whole = torch.randn(tokens, heads + 2 * kv_heads, size, device="cuda", dtype=dtype)
    return Qkv(*whole.split([heads, kv_heads, kv_heads], dim=1)), torch.randn_like(whole[:, :heads])


def check(qkv: Qkv, dout: torch.Tensor, sequences: PackedSequences, params: AttentionParams) -> None:
    """Compares both kernels with the formula in fp32."""
    exact = Qkv(*(part.float() for part in qkv))
    expected = [
        attention_reference.reference(exact, sequences, params),
        *attention_reference.reference_backward(dout.float(), exact, sequences, params),
    ]
    found = []
    for kernel in (flash4, flash):
        out, saved = kernel.forward(qkv, sequences, params)
        out, lse = params.add_sinks(out, saved[0])
        found.append([out, *kernel.backward(dout, qkv, out, (lse, *saved[1:]), sequences, params)])

    for name, ours, other, right in zip(("out", "dq", "dk", "dv"), *found, expected, strict=True):
        assert ours.shape == right.shape
        assert root_error(ours, right) <= RATIO * root_error(other, right), name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_and_gradients(lengths: tuple[int, ...], heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    qkv, dout = projection(sum(lengths), heads, kv_heads, size, dtype)
    assert flash4.takes(qkv, pack(lengths), AttentionParams(size**-0.5))
    check(qkv, dout.contiguous(), pack(lengths), AttentionParams(size**-0.5))


@pytest.mark.parametrize("window", [None, 100])
def test_capped_scores(window: int | None) -> None:
    qkv, dout = projection(1193, 8, 4, 256, torch.bfloat16)
    sequences, params = pack((700, 300, 129, 64)), AttentionParams(1 / 16, window, softcap=5.0)
    exact = Qkv(*(part.float() for part in qkv))
    expected = [
        attention_reference.reference(exact, sequences, params),
        *attention_reference.reference_backward(dout.float(), exact, sequences, params),
    ]

    found = []
    for kernel in (flash4, softcap_attention):
        out, saved = kernel.forward(qkv, sequences, params)
        gradients = kernel.backward(dout, qkv, out, saved, sequences, params)
        found.append([out, *gradients])
    for name, ours, other, right in zip(("out", "dq", "dk", "dv"), *found, expected, strict=True):
        assert root_error(ours, right) <= RATIO * root_error(other, right), name


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 100, 128])
def test_windows_and_sinks(size: int, window: int) -> None:
    qkv, dout = projection(1193, 8, 2, size, torch.bfloat16)
    sinks = torch.linspace(-2, 3, 8, device="cuda")
    for params in (AttentionParams(size**-0.5, window), AttentionParams(size**-0.5, window, sinks=sinks)):
        check(qkv, dout.contiguous(), pack((700, 300, 129, 64)), params)


def test_a_bound_of_the_longest_changes_nothing() -> None:
    qkv, _ = projection(1000, 8, 2, 128, torch.bfloat16)
    sequences, params = pack((600, 400)), AttentionParams(128**-0.5)
    bounded = PackedSequences(sequences.cu_seqlens, 1000, 1000, is_bounded=True)
    (out, _), (other, _) = (flash4.forward(qkv, one, params) for one in (sequences, bounded))
    assert torch.equal(out, other)


@pytest.mark.parametrize("lengths", [(600, 400), (500, 500)])
def test_sequences_go_there_by_themselves(lengths: tuple[int, ...]) -> None:
    qkv, _ = projection(1000, 8, 2, 128, torch.bfloat16)
    assert attention._backend(qkv, pack(lengths), AttentionParams(1.0)) is flash4
