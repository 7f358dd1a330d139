"""Sizes that few models have and people train all the same: heads of 80 to 192 elements, every number of query heads
for a key-value head, ranks from 1 to 512, odd vocabularies, and more documents in a pack than CUDA's grid has rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_kernels.ops import adapted_activation, attention, softcap_attention
from finetune_kernels.ops import blocked_cross_entropy as blocked
from finetune_kernels.ops import linear_cross_entropy as whole
from finetune_kernels.ops import rotary_embedding as rotary
from finetune_kernels.primitives import adapter_dropout
from finetune_kernels.primitives.adapter_dropout import DropoutSeed, Mask
from finetune_kernels.primitives.attention import flash, halves
from finetune_kernels.primitives.attention import reference as attention_reference
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.head_norm import HeadNorm
from finetune_kernels.primitives.lora_delta import LoraDelta
from finetune_test_kernels.tensor_checks import DEVICE, normal, relative_error

TOLERANCE = 2e-5 if DEVICE == "cpu" else 5e-3  # fp32; 2e-6 was measured; a GPU multiplies fp32 tiles in TF32
HEADS = [(80, 5, 1), (96, 7, 1), (112, 2, 2), (192, 12, 2), (64, 16, 1), (128, 3, 1)]
"""Elements of a head, query heads, key-value heads: Phi-2 and StableLM, Phi-3 small, Qwen's 7, Mistral Large's 12."""
GEMMA4 = [(512, 4, 1), (512, 3, 0)]
"""Full layers of Gemma 4, which norm v as well, and those that reuse another layer's keys and values."""
in_the_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU in bfloat16: test_packed_attention.py")


def packed(*lengths: int) -> PackedSequences:
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return PackedSequences(ends, max(lengths), sum(lengths))


def inputs_of(size: int, heads: int, key_value: int, tokens: int) -> Qkv:
    """Strided views of a merged projection, as the layers have them."""
    merged = normal(tokens, heads + 2 * key_value, size, seed=size)
    return Qkv(*torch.split(merged, [heads, key_value, key_value], dim=1))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("size", "query", "key_value"), HEADS + GEMMA4)
def test_rotation(size: int, query: int, key_value: int, with_norm: bool) -> None:
    heads, t = rotary.Heads(query, key_value, size), 13
    norm = HeadNorm(normal(size, seed=8), normal(size, seed=9), 1e-5, value=size == 512) if with_norm else None
    exact = None if norm is None else replace(norm, query=norm.query.double(), key=norm.key.double())
    qkv, dy, half = normal(t, heads.width), normal(t, heads.width, seed=1), normal(t, size // 2, seed=7)
    cos, sin = (torch.cat((part, part), dim=1) for part in (half.cos(), half.sin()))
    wide = cos.double(), sin.double(), heads, exact

    backward = rotary.backward(heads.split(dy), qkv, cos, sin, heads, norm)
    assert (
        relative_error(backward, rotary.reference_backward(heads.split(dy.double()), qkv.double(), *wide)) < TOLERANCE
    )
    expected = rotary.reference(qkv.double(), *wide)
    forward = rotary.forward(qkv, cos, sin, heads, norm)
    assert relative_error(forward, expected) < TOLERANCE
    assert relative_error(forward.roll(1, 1), expected) > 0.1


@in_the_interpreter
@pytest.mark.parametrize(
    ("size", "query", "key_value", "softcap"),
    [(*heads, None) for heads in [*HEADS, GEMMA4[0]]]
    + [(80, 2, 1, 1.5), (96, 3, 1, 1.5), (112, 2, 2, 1.5), (192, 4, 2, 1.5)],
)
def test_attention(size: int, query: int, key_value: int, softcap: float | None) -> None:
    sequences, params = packed(1, 19), AttentionParams(size**-0.5, 7, softcap)
    qkv, dout = inputs_of(size, query, key_value, 20), normal(20, query, size, seed=3)
    out, saved = attention.forward(qkv, sequences, params)
    found = out, *attention.backward(dout, qkv, out, saved, sequences, params)

    exact = Qkv(*(part.double() for part in qkv))
    expected = attention_reference.reference(exact, sequences, params)
    gradients = attention_reference.reference_backward(dout.double(), exact, sequences, params)
    assert max(relative_error(*pair) for pair in zip(found, (expected, *gradients), strict=True)) < TOLERANCE
    if key_value < query:  # k of another head
        other = exact._replace(k=exact.k.roll(1, 0))
        assert relative_error(attention_reference.reference(other, sequences, params), expected) > 1e-2


@pytest.mark.parametrize("rank", [1, 2, 5, 8, 33, 64])
def test_ranks_inside_the_activation(rank: int) -> None:
    t, f = 13, 40
    gate_up, dy = normal(t, 2 * f), normal(t, f, seed=1)
    deltas = tuple(LoraDelta(normal(t, rank, seed=s) / 4, normal(f, rank, seed=s + 1) / 4, 0.5) for s in (2, 4))
    follows = normal(t, rank, seed=6), normal(rank, f, seed=7)
    exact = tuple(LoraDelta(delta.xa.double(), delta.b.double(), delta.scale) for delta in deltas)
    wide = gate_up.double(), "silu", exact, tuple(part.double() for part in follows)

    y = adapted_activation.forward(gate_up, "silu", deltas)  # type: ignore[arg-type]
    found = adapted_activation.backward(dy.clone(), gate_up, "silu", deltas, follows)  # type: ignore[arg-type]
    assert relative_error(y, adapted_activation.reference(*wide[:3])) < TOLERANCE  # type: ignore[arg-type]
    expected = adapted_activation.reference_backward(dy.double(), *wide)  # type: ignore[arg-type]
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("rank", [1, 3, 65, 200, 512])
def test_ranks_beside_dropout(rank: int) -> None:
    mask = Mask(DropoutSeed(5), 3, 0.25)
    dx, d, a = normal(13, 130), normal(13, rank, seed=1), normal(rank, 130, seed=2)
    expected = adapter_dropout.reference_add_lora_dx(dx.double(), d.double(), a.double(), mask)
    without = adapter_dropout.reference_add_lora_dx(dx.double(), d[:, 1:].double(), a[1:].double(), mask)
    found = adapter_dropout.add_lora_dx(dx, d, a, mask)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(found, without) > 1e-2, "one rank less is noticed"


@pytest.mark.parametrize("vocabulary", [32_000, 32_001, 32_007, 50_257])
@pytest.mark.parametrize("operation", [whole.LinearCrossEntropyFunction, blocked.BlockedCrossEntropyFunction])
def test_odd_vocabularies(operation: Any, vocabulary: int) -> None:
    """The last block of 8,192 rows, and the last turn over 16,384 logits, are of an odd size."""
    hidden, weight = normal(3, 8), normal(vocabulary, 8, seed=1)
    weight[-1] = 2 * hidden[0]  # a likely token, so that a loss without it is another one
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2], device=DEVICE)
    exact = hidden.double(), weight.double(), targets

    leaf = hidden.clone().requires_grad_()
    loss = operation.apply(leaf, weight, targets, None)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert relative_error(loss.detach(), whole.reference(*exact)) < TOLERANCE
    assert relative_error(gradient, whole.reference_gradient(*exact)) < TOLERANCE

    without = whole.reference_gradient(exact[0][::2], exact[1][:-1], targets[::2])
    assert relative_error(gradient[::2], without) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 33, 32_000, 32_001])
def test_rows_of_logits_are_aligned(vocabulary: int, dtype: torch.dtype) -> None:
    hidden, weight = normal(5, 8, dtype=dtype), normal(vocabulary, 8, seed=1, dtype=dtype)
    logits = whole.aligned_logits(hidden, weight)
    assert logits.shape == (5, vocabulary)
    assert all(row.data_ptr() % whole.ROW_BYTES == 0 for row in logits)
    assert relative_error(logits, hidden @ weight.T) <= torch.finfo(dtype).eps
    assert logits.untyped_storage().nbytes() < 5 * (vocabulary * dtype.itemsize + whole.ROW_BYTES)


class Products(TorchDispatchMode):
    """Takes down the sizes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = arguments[-2:]
            self.sides.append((*left.shape, right.shape[1]))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("operation", [whole.LinearCrossEntropyFunction, blocked.BlockedCrossEntropyFunction])
@pytest.mark.parametrize("vocabulary", [64, 67])
def test_products_of_an_odd_vocabulary_are_as_large_as_can_be_aligned(operation: Any, vocabulary: int) -> None:
    """49,155 tokens in one product took nine times as long on an H200."""
    hidden, weight = normal(16, 8), normal(vocabulary, 8, seed=1)
    with Products() as products:
        operation.apply(hidden, weight, torch.arange(16, device=DEVICE), None)

    step = whole.ROW_BYTES // weight.element_size()
    large = [sides for sides in products.sides if max(sides) >= 64]
    assert len(large) == 2
    assert all(side % step == 0 for sides in large for side in sides)
    assert len(products.sides) == (2 if vocabulary % step == 0 else 4)


class Flash:
    """FlashAttention's two calls by the formula, which refuse what a launch of CUDA refuses."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.counts: list[int] = []

    def _flash_attention_forward(self, q: Any, k: Any, v: Any, ends: Any, *rest: Any, scale: float) -> Any:
        sequences = self._accept(ends, q.shape[0])
        scores = [
            torch.einsum("ihd,jhd->hij", q[rows], k[rows].repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
            for rows in sequences.slices()
        ]
        unseen = [one.new_ones(one.shape[1:], dtype=torch.bool).triu(1) for one in scores]
        lse = [one.masked_fill(hidden, -torch.inf).logsumexp(-1) for one, hidden in zip(scores, unseen, strict=True)]
        out = attention_reference.reference(Qkv(q, k, v), sequences, AttentionParams(scale))
        return out, torch.cat(lse, dim=1), torch.tensor(0), torch.tensor(0), None

    def _flash_attention_backward(
        self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, ends: Any, *rest: Any, scale: float
    ) -> Any:
        sequences = self._accept(ends, q.shape[0])
        expected = self._flash_attention_forward(q, k, v, ends, scale=scale)
        assert torch.allclose(lse, expected[1]), "the sums of other rows"
        assert torch.allclose(out, expected[0])
        return attention_reference.reference_backward(dout, Qkv(q, k, v), sequences, AttentionParams(scale))

    def _accept(self, ends: torch.Tensor, tokens: int) -> PackedSequences:
        count = ends.numel() - 1
        if not 0 < count <= self._limit:
            raise RuntimeError("CUDA error: invalid configuration argument")
        self.counts.append(count)
        return PackedSequences(ends, int(ends.diff().max()), tokens)


@in_the_interpreter
@pytest.mark.parametrize("lengths", [(1, 4, 2, 3, 1, 5, 2), (3, 3, 3, 3, 1, 2, 1), (2,) * 9])
def test_more_documents_than_a_grid_has_rows_take_several_calls(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of 3 in place of 65,535. A half of equal lengths stays with the backend that began."""
    played = Flash(3)
    monkeypatch.setattr(flash, "aten", played)
    sequences, params = packed(*lengths), AttentionParams(0.3)
    qkv, dout = inputs_of(16, 4, 2, sum(lengths)), normal(sum(lengths), 4, 16, seed=3)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        flash.forward(qkv, sequences, params)

    monkeypatch.setattr(halves, "MAX_SEQUENCES", 3)
    out, saved = flash.forward(qkv, sequences, params)
    gradients = flash.backward(dout, qkv, out, saved, sequences, params)
    assert sum(played.counts[: len(played.counts) // 3]) == len(lengths)
    assert saved[0].shape == (4, sum(lengths))

    expected = attention_reference.reference(qkv, sequences, params)
    truth = attention_reference.reference_backward(dout, qkv, sequences, params)
    assert max(relative_error(*pair) for pair in zip((out, *gradients), (expected, *truth), strict=True)) < TOLERANCE


def test_capped_attention_has_its_documents_on_the_long_axis_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *arguments, **options: None

    for name in ("_forward", "_backward_q", "_backward_kv"):
        monkeypatch.setattr(softcap_attention, name, Kernel())
    sequences, params = PackedSequences.of_length(1, 70_000, torch.device(DEVICE)), AttentionParams(0.3, None, 5.0)
    qkv = inputs_of(16, 4, 2, 70_000)
    out, lse = softcap_attention.forward(qkv, sequences, params)
    softcap_attention.backward(out, qkv, out, lse, sequences, params)
    assert grids == [(70_000, 4), (70_000, 4), (70_000, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_seventy_thousand_documents(softcap: float | None) -> None:
    """The first documents, those around the middle, where calls are cut, and the last, against the formula in fp64."""
    lengths = torch.arange(70_000) % 3 + 1
    ends = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    t, params = int(ends[-1]), AttentionParams(0.125, None, softcap)
    sequences = PackedSequences(ends.to("cuda", torch.int32), 3, t)
    qkv = Qkv(*(part.bfloat16() for part in inputs_of(64, 4, 2, t)))
    dout = normal(t, 4, 64, seed=3).bfloat16()
    out, saved = attention.forward(qkv, sequences, params)
    found = out, *attention.backward(dout, qkv, out, saved, sequences, params)

    for first in (0, 34_980, 69_960):
        rows = slice(int(ends[first]), int(ends[first + 40]))
        some = packed(*lengths[first : first + 40].tolist())
        exact = Qkv(*(part[rows].double() for part in qkv))
        expected = attention_reference.reference(exact, some, params)
        truth = attention_reference.reference_backward(dout[rows].double(), exact, some, params)
        for ours, theirs in zip(found, (expected, *truth), strict=True):
            assert relative_error(ours[rows], theirs) < 2e-2  # bfloat16
            assert relative_error(ours[rows].roll(1, 0), theirs) > 0.1
