"""The kernels' formulas in their place."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from finetune_kernels.ops import (
    adapted_activation,
    gated_activation,
    plain_activation,
    rms_norm,
    rotary_embedding,
    softcap_attention,
)
from finetune_kernels.primitives import adapter_dropout, dora
from finetune_kernels.primitives.attention import pass_counts
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_test_kernels.quick_interpreter import hasten_interpreter
from finetune_test_kernels.rounding_interpreter import round_e4m3_in_interpreter

hasten_interpreter()
round_e4m3_in_interpreter()


def _rotary_forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: rotary_embedding.Heads, norm: object
) -> torch.Tensor:
    """Rotates as the kernel does: in place without a head norm."""
    rotated = rotary_embedding.reference(qkv, cos, sin, heads, norm)  # type: ignore[arg-type]
    return rotated if norm is not None else qkv.copy_(rotated)


@pytest.fixture
def cudnn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches for cuDNN's kernel go there in their first pass, so that all passes of a shape take the same kernel."""
    monkeypatch.setattr(pass_counts, "PASSES", 1)


@pytest.fixture
def constant_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's norms of rows are those of the first call: its gradients take them as constants."""
    found: dict[int, torch.Tensor] = {}

    def norms(w: torch.Tensor, *others: Any) -> torch.Tensor:
        return found.setdefault(w.data_ptr(), row_norms(w, *others))

    row_norms = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", norms)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred elements gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _softcap_forward(
    qkv: Qkv, sequences: PackedSequences, params: AttentionParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the kernel returns, without the sums, which the formula's backward does not need."""
    return softcap_attention.reference(qkv, sequences, params), qkv.q.new_empty(0)


def _softcap_backward(
    dout: torch.Tensor,
    qkv: Qkv,
    out: torch.Tensor,
    lse: torch.Tensor,
    sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:
    return softcap_attention.reference_backward(dout, qkv, sequences, params)


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of a kernel is replaced by its formula, in whatever type it is called with."""
    formulas = {
        rms_norm.forward: rms_norm.reference_forward,
        rms_norm.backward: rms_norm.reference_backward,
        rotary_embedding.forward: _rotary_forward,
        rotary_embedding.backward: rotary_embedding.reference_backward,
        softcap_attention.forward: _softcap_forward,
        softcap_attention.backward: _softcap_backward,
        adapter_dropout.drop: adapter_dropout.reference,
        adapter_dropout.add_lora_dx: adapter_dropout.reference_add_lora_dx,
        adapted_activation.forward: adapted_activation.reference,
        adapted_activation.backward: adapted_activation.reference_backward,
        gated_activation.forward: gated_activation.reference,
        gated_activation.backward: gated_activation.reference_backward,
        plain_activation.forward: plain_activation.reference,
        plain_activation.backward: plain_activation.reference_backward,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("finetune_kernels."):
            for attribute, value in list(vars(module).items()):
                formula = formulas.get(value) if callable(value) and hasattr(value, "__code__") else None
                if formula is not None:
                    monkeypatch.setattr(module, attribute, formula)
