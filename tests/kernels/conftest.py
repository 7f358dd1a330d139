"""The kernels' formulas in their place."""

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from finetune_kernels.ops import adapted_activation, rms_norm, rotary_embedding, softcap_attention
from finetune_kernels.primitives import adapter_dropout


def _rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: rotary_embedding.Heads, norm: object
) -> torch.Tensor:
    """As the kernel: in place without a head norm."""
    rotated = rotary_embedding.reference(qkv, cos, sin, heads, norm)  # type: ignore[arg-type]
    return rotated if norm is not None else qkv.copy_(rotated)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred elements gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Documents = Iterator[slice]


def _documents(ends: torch.Tensor) -> Documents:
    return (slice(first, last) for first, last in pairwise(ends.tolist()))


def _softcap_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, *params: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernel, without the sums that the formula's backward does not need."""
    outs = [softcap_attention.reference(q[rows], k[rows], v[rows], *params) for rows in _documents(ends)]
    return torch.cat(outs), q.new_empty(0)


def _softcap_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    ends: torch.Tensor, longest: int, *params: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    parts = [
        softcap_attention.reference_backward(dout[rows], q[rows], k[rows], v[rows], *params)
        for rows in _documents(ends)
    ]
    return tuple(torch.cat(several) for several in zip(*parts, strict=True))


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of a kernel is replaced by its formula, in whatever type it is called with."""
    formulas = {
        rms_norm.forward: rms_norm.reference_forward,
        rms_norm.backward: rms_norm.reference_backward,
        rotary_embedding.rotate: _rotate,
        rotary_embedding.rotate_back: rotary_embedding.reference_backward,
        softcap_attention.forward: _softcap_forward,
        softcap_attention.backward: _softcap_backward,
        adapter_dropout.drop: adapter_dropout.reference,
        adapter_dropout.add_lora_dx: adapter_dropout.reference_add_lora_dx,
        adapted_activation.forward: adapted_activation.reference,
        adapted_activation.backward: adapted_activation.reference_backward,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("finetune_kernels."):
            for attribute, value in list(vars(module).items()):
                formula = formulas.get(value) if callable(value) and hasattr(value, "__code__") else None
                if formula is not None:
                    monkeypatch.setattr(module, attribute, formula)
