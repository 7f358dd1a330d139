"""Causal attention with capped scores (Gemma 2) over packed sequences, windows included, in Triton.

    s  = c tanh(scale q k / c),   p = exp(s - lse),   out = p v      over keys of the sequence, i - window < j <= i
    ds = p * (dout v - delta) * (1 - (s / c)^2),      delta = sum(dout * out)
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T dout

Shapes: q, out and dout [T, H, D], k and v [T, H_kv, D], all of one dtype; lse and delta [T, H] in fp32.

FlashAttention as PyTorch ships it and cuDNN do not cap scores, and with an eager softmax the scores of one head alone
are T x T. Backward recomputes the scores; the kernel for dq leaves delta for that of dk and dv. Grouped heads share a
program there, so their gradients are added in registers. Blocks of all sequences are one axis of the grid, as CUDA's
others end at 65,535 programs.

Source: Gemma Team, "Gemma 2", 2024, section 2 (the cap); Dao, "FlashAttention-2", 2023 (the loops over blocks).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.attention import reference as attention_reference
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.precision import before_ampere

UNSEEN = tl.constexpr(-1.0e30)
"""Score of a key that is not seen: finite, so that a block without a key to see makes no NaN."""


def reference(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> torch.Tensor:
    """Returns out [T, H, D] by the formula, in the dtype of q."""
    return attention_reference.reference(qkv, sequences, params)


def reference_backward(dout: torch.Tensor, qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> Qkv:
    """Returns the gradients of q, k and v by the formula."""
    return attention_reference.reference_backward(dout, qkv, sequences, params)


@triton.jit
def _scores(a, b_t, rows, columns, length, scale, softcap, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Capped scores of a b^T, and the mask of those that are seen. `rows` are of queries, `columns` of keys, and they
    broadcast to the scores."""
    x = tl.dot(a, b_t, input_precision="ieee") * (scale / softcap)
    s = softcap * (2.0 * tl.sigmoid(2.0 * x) - 1.0)  # tanh(x) = 2 sigmoid(2 x) - 1

    seen = (columns <= rows) & (rows < length)
    if WINDOW:
        seen = seen & (rows - columns < WINDOW)
    return s, seen


@triton.jit
def _block(cu_seqlens_ptr, blocks, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's head, where its block begins within its sequence, the sequence's first row and its length."""
    sequence_ptr, start = cu_seqlens_ptr + tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    first = tl.load(sequence_ptr)
    return tl.program_id(1), start, first, tl.load(sequence_ptr + 1) - first


@triton.jit
def _load(ptr, first, rows, length, stride, head, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of one sequence and head, [rows, BLOCK_D]; zero beyond the end of the sequence."""
    d = tl.arange(0, BLOCK_D)
    offsets = (first + rows).to(tl.int64)[:, None] * stride + head * D + d[None, :]
    mask = (rows < length)[:, None] & (d < D)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _store(ptr, value, first, rows, length, stride, head, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes rows of one sequence and head; nothing beyond the end of the sequence."""
    d = tl.arange(0, BLOCK_D)
    offsets = (first + rows).to(tl.int64)[:, None] * stride + head * D + d[None, :]
    mask = (rows < length)[:, None] & (d < D)[None, :]
    tl.store(ptr + offsets, value, mask=mask)


@triton.jit
def _first_key(start, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """First key of the first block that a query at `start` or later sees."""
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(start - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return lowest


@triton.jit(do_not_specialize=["blocks"])
def _forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, stride_q, stride_k, stride_v, scale, softcap,
    blocks, H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, start, first, length = _block(cu_seqlens_ptr, blocks, BLOCK_M)  # of queries
    if start >= length:
        return

    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, first, rows, length, stride_q, head, D, BLOCK_D)  # [M, D]

    # online softmax: the largest score so far, and sums that are rescaled where a block has a larger one
    largest = tl.full([BLOCK_M], UNSEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(_first_key(start, WINDOW, BLOCK_N), tl.minimum(start + BLOCK_M, length), BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, first, columns, length, stride_k, head // GROUPS, D, BLOCK_D)
        v = _load(v_ptr, first, columns, length, stride_v, head // GROUPS, D, BLOCK_D)

        s, seen = _scores(q, tl.trans(k), rows[:, None], columns[None, :], length, scale, softcap, WINDOW)
        s = tl.where(seen, s, UNSEEN)  # [M, N]
        bigger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp(s - bigger[:, None])

        less = tl.exp(largest - bigger)
        total = total * less + tl.sum(p, axis=1)
        sums = sums * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        largest = bigger

    _store(out_ptr, sums / total[:, None], first, rows, length, H * D, head, D, BLOCK_D)
    tl.store(lse_ptr + (first + rows) * H + head, largest + tl.log(total), mask=rows < length)


@triton.jit(do_not_specialize=["blocks"])
def _backward_q(  # type: ignore[no-untyped-def]
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, cu_seqlens_ptr, stride_q, stride_k, stride_v,
    scale, softcap, blocks, H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, start, first, length = _block(cu_seqlens_ptr, blocks, BLOCK_M)  # of queries
    if start >= length:
        return

    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, first, rows, length, stride_q, head, D, BLOCK_D)
    dout = _load(dout_ptr, first, rows, length, H * D, head, D, BLOCK_D)
    out = _load(out_ptr, first, rows, length, H * D, head, D, BLOCK_D)  # [M, D]

    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + (first + rows) * H + head, delta, mask=rows < length)  # for dk and dv
    lse = tl.load(lse_ptr + (first + rows) * H + head, mask=rows < length, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(_first_key(start, WINDOW, BLOCK_N), tl.minimum(start + BLOCK_M, length), BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, first, columns, length, stride_k, head // GROUPS, D, BLOCK_D)
        v = _load(v_ptr, first, columns, length, stride_v, head // GROUPS, D, BLOCK_D)

        s, seen = _scores(q, tl.trans(k), rows[:, None], columns[None, :], length, scale, softcap, WINDOW)
        p = tl.exp(tl.where(seen, s - lse[:, None], UNSEEN))
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")  # [M, N]
        ds = p * (dp - delta[:, None]) * (1.0 - (s / softcap) * (s / softcap))
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")

    _store(dq_ptr, dq * scale, first, rows, length, H * D, head, D, BLOCK_D)


@triton.jit(do_not_specialize=["blocks"])
def _backward_kv(  # type: ignore[no-untyped-def]
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr, stride_q, stride_k, stride_v,
    scale, softcap, blocks, H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head_kv, start, first, length = _block(cu_seqlens_ptr, blocks, BLOCK_N)  # of keys
    if start >= length:
        return

    columns = start + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, first, columns, length, stride_k, head_kv, D, BLOCK_D)
    v = _load(v_ptr, first, columns, length, stride_v, head_kv, D, BLOCK_D)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    last = length  # the query after the last that sees a key of the block
    if WINDOW:
        last = tl.minimum(length, start + BLOCK_N - 1 + WINDOW)

    for member in range(GROUPS):
        head = head_kv * GROUPS + member
        for query in range(start // BLOCK_M * BLOCK_M, last, BLOCK_M):
            rows = query + tl.arange(0, BLOCK_M)
            q = _load(q_ptr, first, rows, length, stride_q, head, D, BLOCK_D)
            dout = _load(dout_ptr, first, rows, length, H * D, head, D, BLOCK_D)
            lse = tl.load(lse_ptr + (first + rows) * H + head, mask=rows < length, other=0.0)
            delta = tl.load(delta_ptr + (first + rows) * H + head, mask=rows < length, other=0.0)

            # scores transposed, [N, M]: keys by queries
            s, seen = _scores(k, tl.trans(q), rows[None, :], columns[:, None], length, scale, softcap, WINDOW)
            p = tl.exp(tl.where(seen, s - lse[None, :], UNSEEN))
            dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")

            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :]) * (1.0 - (s / softcap) * (s / softcap))
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")

    _store(dk_ptr, dk * scale, first, columns, length, H // GROUPS * D, head_kv, D, BLOCK_D)
    _store(dv_ptr, dv, first, columns, length, H // GROUPS * D, head_kv, D, BLOCK_D)


class _Tiles(NamedTuple):
    """Rows per program, rows per turn of its loop, warps and stages."""

    outer: int
    inner: int
    warps: int
    stages: int


SMALL_SHARED_MEMORY = 160 * 1024
"""Bytes of shared memory below which tiles are the smaller ones (A100 and H100 have 163 and 227 KiB)."""


def _tiles(q: torch.Tensor, *, backward: bool) -> _Tiles:
    """Returns tiles for the head size and the device's shared memory, which holds both operands of both loops."""
    if not q.is_cuda or before_ampere(q):
        return _Tiles(16, 16, 8, 1) if q.is_cuda else _Tiles(16, 32, 4, 1)
    wide = q.shape[2] > 128
    properties: Any = torch.cuda.get_device_properties(q.device)
    if properties.shared_memory_per_block_optin < SMALL_SHARED_MEMORY:
        return _Tiles(32 if wide and backward else 64, 32, 4, 1)
    if backward:
        return _Tiles(64, 32, 8, 2) if wide else _Tiles(128, 64, 8, 2)
    return _Tiles(128, 32, 8, 2) if wide else _Tiles(128, 64, 8, 3)


def _launch(
    qkv: Qkv, sequences: PackedSequences, params: AttentionParams, tiles: _Tiles
) -> tuple[int, tuple[Any, ...], dict[str, int]]:
    """Returns the blocks of all sequences, each as many as the longest has, and arguments that all kernels take."""
    blocks, (heads, size) = triton.cdiv(sequences.max_seqlen, tiles.outer), qkv.q.shape[1:]
    sizes = {"H": heads, "GROUPS": qkv.groups, "D": size, "BLOCK_D": triton.next_power_of_2(size)}
    sizes["WINDOW"] = params.effective_window(sequences.max_seqlen) or 0
    common = sequences.cu_seqlens, *(part.stride(0) for part in qkv), params.scale, params.softcap, blocks
    return blocks * sequences.count, common, {**sizes, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _by_rows(qkv: Qkv) -> Qkv:
    """Returns q, k and v with the heads of a row side by side; rows themselves may be strided."""
    parts = (part if part.stride()[1:] == (part.shape[2], 1) else part.contiguous() for part in qkv)
    return Qkv(*parts)


def forward(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [T, H, D] and the logarithms of the softmax sums, lse [T, H] in fp32; `params.softcap` is given."""
    q, k, v = qkv = _by_rows(qkv)
    out = q.new_empty(q.shape)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

    tiles = _tiles(q, backward=False)
    blocks, common, options = _launch(qkv, sequences, params, tiles)
    _forward[(blocks, q.shape[1])](q, k, v, out, lse, *common, BLOCK_M=tiles.outer, BLOCK_N=tiles.inner, **options)
    return out, lse


def backward(
    dout: torch.Tensor, qkv: Qkv, out: torch.Tensor, lse: torch.Tensor, sequences: PackedSequences,
    params: AttentionParams,
) -> Qkv:  # fmt: skip
    """Returns the gradients of q, k and v, shaped like them; `out` and `lse` are those of `forward`."""
    q, k, v = qkv = _by_rows(qkv)
    dout = dout.contiguous()
    dq, dk, dv = (part.new_empty(part.shape) for part in qkv)
    delta = torch.empty_like(lse)  # [T, H]

    tiles = _tiles(q, backward=True)
    blocks, common, options = _launch(qkv, sequences, params, tiles)
    _backward_q[(blocks, q.shape[1])](
        dout, q, k, v, out, lse, dq, delta, *common, BLOCK_M=tiles.outer, BLOCK_N=tiles.inner, **options
    )
    _backward_kv[(blocks, k.shape[1])](
        dout, q, k, v, lse, delta, dk, dv, *common, BLOCK_M=tiles.inner, BLOCK_N=tiles.outer, **options
    )
    return Qkv(dq, dk, dv)


class SoftcapAttentionFunction(torch.autograd.Function):
    """Autograd around the kernels; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences, params: AttentionParams
    ) -> torch.Tensor:
        """See `softcap_attention`."""
        out, lse = forward(Qkv(q, k, v), sequences, params)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sequences, ctx.params = sequences, params
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        return *backward(dout, Qkv(q, k, v), out, lse, ctx.sequences, ctx.params), None, None


def softcap_attention(qkv: Qkv, sequences: PackedSequences, params: AttentionParams) -> torch.Tensor:
    """Attention with capped scores: q [T, H, D], k and v [T, H_kv, D] -> out [T, H, D]; `params.softcap` is given."""
    return SoftcapAttentionFunction.apply(*qkv, sequences, params)  # type: ignore[no-untyped-call, no-any-return]
