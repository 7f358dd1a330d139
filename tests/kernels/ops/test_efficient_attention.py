"""Attention on cards before Ampere: what goes to PyTorch's memory-efficient kernel and comes from it. Here formulas
play the kernel, which is CUDA's; on a GPU, test_gpu_fp16.py runs it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_kernels.primitives.attention import efficient
from finetune_kernels.primitives.attention import reference as attention_reference
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_kernels.tensor_checks import normal, relative_error

LENGTHS = (3, 40, 1, 9)
PARAMS = AttentionParams(0.3)
WINDOWED = AttentionParams(0.3, window=5)


class PlayedKernel:
    """Takes and returns what the kernel does; heads are equal in number, and sums padded with infinity."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def forward(self, q: Any, k: Any, v: Any, bias: None, ends: Any, *rest: Any, **options: Any) -> Any:
        _, longest, *rest_of = rest
        assert q.shape == k.shape == v.shape
        assert rest_of == [longest, 0.0, 1, True]
        sequences = PackedSequences(ends, longest, q.shape[1])
        params = AttentionParams(options["scale"], options.get("window_size"))
        out = attention_reference.reference(Qkv(q[0], k[0], v[0]), sequences, params)
        self.sums = torch.full((len(LENGTHS), q.shape[2], 64), torch.inf)
        for number, length in enumerate(LENGTHS):
            self.sums[number, :, :length] = normal(q.shape[2], length, seed=number)
        return out.unsqueeze(0), self.sums.clone(), torch.empty(()), torch.empty(()), longest, longest

    def backward(self, dout: Any, q: Any, k: Any, v: Any, bias: None, out: Any, *rest: Any, **options: Any) -> Any:
        ends, _, longest, _, sums, *_ = rest
        assert self.sums is not None
        assert torch.equal(sums, self.sums), "those of forward, infinity where no row is"
        sequences = PackedSequences(ends, longest, q.shape[1])
        params = AttentionParams(options["scale"], options.get("window_size"))
        found = attention_reference.reference_backward(dout[0], Qkv(q[0], k[0], v[0]), sequences, params)
        return *(gradient.unsqueeze(0) for gradient in found), None


@pytest.mark.parametrize("params", [PARAMS, WINDOWED], ids=["whole", "a window"])
def test_packed_sequences_and_grouped_heads(params: AttentionParams, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = PlayedKernel()
    played = SimpleNamespace(_efficient_attention_forward=kernel.forward, _efficient_attention_backward=kernel.backward)
    monkeypatch.setattr(efficient, "aten", played)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    rows = int(ends[-1])
    sequences = PackedSequences(ends, max(LENGTHS), rows)
    heads = (4, 2, 2)
    qkv = Qkv(*(normal(rows, count, 8, seed=seed, device="cpu") for seed, count in enumerate(heads)))
    dout = normal(rows, 4, 8, seed=9, device="cpu")

    out, saved = efficient.forward(qkv, sequences, params)
    assert relative_error(out, attention_reference.reference(qkv, sequences, params)) < 1e-5
    assert saved[0].shape == (4, rows), "a sum for each row"
    found = efficient.backward(dout, qkv, out, saved, sequences, params)
    exact = attention_reference.reference_backward(dout, qkv, sequences, params)
    assert max(relative_error(one, other) for one, other in zip(found, exact, strict=True)) < 1e-5
