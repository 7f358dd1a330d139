"""FlashAttention 4 by cumulative lengths, where the package flash-attn-4 is: written for Hopper's asynchronous products
and copies, which the FlashAttention that PyTorch ships does not use.

It takes sequences of any lengths, windows, capped scores and heads of `HEAD_SIZES`. Its kernels are compiled when
a size of heads, a grouping or a kind of window is first met, not for each length (on two CPU cores: 6 s forward, 8 s
backward).

Source: Shah et al., "FlashAttention-3", 2024, for the algorithm on Hopper; the package flash-attn-4 (BSD-3).
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from finetune_kernels.primitives.attention.halves import MAX_SEQUENCES, Saved
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv

VERSION = "4.0.0b36"
"""The one version that is used: what is called of it is not public, and may be another in the next."""
HOPPER = 9
"""Compute capability's first number. The package has kernels for other cards, which nobody has measured here."""
HEAD_SIZES = (64, 96, 128, 192, 256)
"""Sizes of heads whose results were compared with the formula on a GPU. With 80, dq was wrong."""


def takes(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> bool:
    """True if the kernel computes this attention: on a Hopper, in 16 bits, where the package is installed."""
    q = qkv.q
    fits = q.shape[2] in HEAD_SIZES and sequences.count <= MAX_SEQUENCES
    fits = fits and q.dtype in (torch.bfloat16, torch.float16)
    return fits and is_installed() and is_hopper(q.device)


def is_hopper(device: torch.device) -> bool:
    """True for the cards that its kernels were measured on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


@cache
def is_installed() -> bool:
    """True if the version of the package that is known here can be imported."""
    try:
        return version("flash-attn-4") == VERSION
    except PackageNotFoundError:
        return False


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, Saved]:
    """Returns out [T, H, D] and, for `backward`, the log-sum-exp [H, T]."""
    out, lse, *_ = _interface()._flash_attn_fwd(*qkv, return_lse=True, **_options(sequences, params))
    return out, (lse,)


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, saved: Saved, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v."""
    options = _options(sequences, params)
    dq, dk, dv, *_ = _interface()._flash_attn_bwd(*qkv, out, dout, saved[0], **options)
    return Qkv(dq, dk, dv)


def _options(sequences: PackedSequences, params: AttentionParams) -> dict[str, Any]:
    """The package's names for where sequences are and which keys a query sees."""
    ends, longest = sequences.cu_seqlens, sequences.max_seqlen
    window = params.effective_window(longest)
    return {
        "cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest,
        "softmax_scale": params.scale, "causal": True, "window_size_left": None if window is None else window - 1,
        "softcap": params.softcap or 0.0,
    }  # fmt: skip


@cache
def _interface() -> Any:
    """The package's module; its import takes seconds, so it waits for the first use."""
    warnings.filterwarnings(
        "ignore", message="Argument aux_data", category=UserWarning
    )  # of its own, on each compiling
    return import_module("flash_attn.cute.interface")
