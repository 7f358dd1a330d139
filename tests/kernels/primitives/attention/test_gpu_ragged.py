"""cuDNN's ragged attention on a GPU: out and gradients against the formula, as a share of FlashAttention's own error;
one plan for many passes. Needs nvidia-cudnn-frontend and a card on which it is used."""

import pytest
import torch

from finetune_kernels.primitives.attention import cudnn_cards, flash, ragged, ragged_plan
from finetune_kernels.primitives.attention import reference as attention_reference
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_kernels.tensor_checks import root_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or ragged_plan.backend() is None
        or not cudnn_cards.is_faster(torch.device("cuda")),
        reason="cuDNN's ragged attention is for Hopper and Blackwell, with the package nvidia-cudnn-frontend",
    ),
]
RATIO = 1.3
"""Both round P and dS to 16 bits; they differ in the order of sums."""
LENGTHS = [(700, 1, 300, 129, 64), (1000, 24), (3,) * 40, (1024,)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (4, 4, 64), (6, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_and_gradients(lengths: tuple[int, ...], heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    sequences, params = PackedSequences(ends, max(lengths), sum(lengths)), AttentionParams(size**-0.5)
    whole = torch.randn(sum(lengths), heads + 2 * kv_heads, size, device="cuda", dtype=dtype)
    qkv = Qkv(*whole.split([heads, kv_heads, kv_heads], dim=1))
    dout = torch.randn(sum(lengths), heads, size, device="cuda", dtype=dtype)

    exact = Qkv(*(part.float() for part in qkv))
    expected = [
        attention_reference.reference(exact, sequences, params),
        *attention_reference.reference_backward(dout.float(), exact, sequences, params),
    ]
    assert ragged.takes(qkv, sequences, params)
    out, saved = ragged.forward(qkv, sequences, params)
    found = [out, *ragged.backward(dout, qkv, out, saved, sequences, params)]
    their_out, their_saved = flash.forward(qkv, sequences, params)
    theirs = [their_out, *flash.backward(dout, qkv, their_out, their_saved, sequences, params)]

    for name, ours, other, right in zip(("out", "dq", "dk", "dv"), found, theirs, expected, strict=True):
        assert ours.shape == right.shape
        assert root_error(ours, right) <= RATIO * root_error(other, right), name


def test_a_plan_serves_every_pass_of_about_its_size() -> None:
    ragged_plan.plans.cache_clear()
    for lengths in ((700, 1, 300), (20, 900, 4, 4, 4), (513,), (1000, 1000, 1000)):
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        whole = torch.randn(sum(lengths), 8, 64, device="cuda", dtype=torch.bfloat16)
        qkv = Qkv(*whole.split([4, 2, 2], dim=1))
        sequences = PackedSequences(ends, max(lengths), sum(lengths))
        assert ragged.takes(qkv, sequences, AttentionParams(0.125))
        out, _ = ragged.forward(qkv, sequences, AttentionParams(0.125))
        exact = attention_reference.reference(Qkv(*(part.float() for part in qkv)), sequences, AttentionParams(0.125))
        assert root_error(out, exact) < 5e-3, lengths
    assert ragged_plan.plans.cache_info().misses == 1
