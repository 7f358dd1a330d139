"""Causal attention with capped scores (Gemma 2), over documents laid end to end, windows included, in Triton.

    s = c tanh(scale q k / c),   p = exp(s - lse),   out = p v      over keys of the document, i - window < j <= i
    ds = p * (dout v - sum(dout * out)) * (1 - (s / c)^2),   dq = scale ds k,   dk = scale ds^T q,   dv = p^T dout

FlashAttention as PyTorch ships it and cuDNN cap nothing, and with an eager softmax the scores of one head alone are
T x T. Scores are made again in backward; the kernel for dq leaves sum(dout * out) for that of dk and dv. Grouped heads
share a program there, so their gradients are added in registers. (Dao, "FlashAttention-2", 2023.)
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)
"""Score of a key that is not seen: finite, so that a block without a key to see makes no NaN."""


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float, window: int | None
) -> torch.Tensor:
    """The formula for one document: q [L, H, D], k and v [L, H_kv, D] -> [L, H, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    s = softcap * torch.tanh(torch.einsum("ihd,jhd->hij", q, k) * scale / softcap)
    back = torch.arange(q.shape[0], device=q.device)[:, None] - torch.arange(q.shape[0], device=q.device)
    seen = (back >= 0) & (back < (window or q.shape[0]))
    return torch.einsum("hij,jhd->ihd", s.masked_fill(~seen, -torch.inf).softmax(-1), v)


def reference_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of one document's q, k and v by the formula."""
    groups, shape = q.shape[1] // k.shape[1], (k.shape[0], k.shape[1], -1, k.shape[2])
    wide_k, wide_v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    s = softcap * torch.tanh(torch.einsum("ihd,jhd->hij", q, wide_k) * scale / softcap)
    back = torch.arange(q.shape[0], device=q.device)[:, None] - torch.arange(q.shape[0], device=q.device)
    p = s.masked_fill((back < 0) | (back >= (window or q.shape[0])), -torch.inf).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", p, wide_v)
    delta = (dout * out).sum(-1).T.unsqueeze(-1)  # [H, L, 1]
    ds = p * (torch.einsum("ihd,jhd->hij", dout, wide_v) - delta) * (1 - (s / softcap) ** 2)
    dq = scale * torch.einsum("hij,jhd->ihd", ds, wide_k)
    dk = scale * torch.einsum("hij,ihd->jhd", ds, q)
    dv = torch.einsum("hij,ihd->jhd", p, dout)
    return dq, dk.reshape(shape).sum(2), dv.reshape(shape).sum(2)


@triton.jit
def _scores(a, b_t, rows, columns, length, scale, softcap, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Capped scores of a b^T, and which are seen: `rows` and `columns` are those of queries and keys, shaped so that
    they broadcast."""
    x = tl.dot(a, b_t, input_precision="ieee") * (scale / softcap)
    s = softcap * (2.0 * tl.sigmoid(2.0 * x) - 1.0)
    seen = (columns <= rows) & (rows < length)
    if WINDOW:
        seen = seen & (rows - columns < WINDOW)
    return s, seen


@triton.jit
def _load(ptr, first, rows, length, stride, head, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of one document and head [rows, D]; zero beyond its end."""
    d = tl.arange(0, BLOCK_D)
    at = (first + rows).to(tl.int64)[:, None] * stride + head * D + d[None, :]
    return tl.load(ptr + at, mask=(rows < length)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, value, first, rows, length, stride, head, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, BLOCK_D)
    at = (first + rows).to(tl.int64)[:, None] * stride + head * D + d[None, :]
    tl.store(ptr + at, value, mask=(rows < length)[:, None] & (d < D)[None, :])


@triton.jit
def _first_key(start, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block of keys that the query at `start` sees first."""
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(start - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return lowest


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ends_ptr, stride_q, stride_k, stride_v, scale, softcap, H: tl.constexpr,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first = tl.load(ends_ptr + tl.program_id(2))
    length = tl.load(ends_ptr + tl.program_id(2) + 1) - first
    if start >= length:
        return
    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, first, rows, length, stride_q, head, D, BLOCK_D)
    largest = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(_first_key(start, WINDOW, BLOCK_N), tl.minimum(start + BLOCK_M, length), BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, first, columns, length, stride_k, head // GROUPS, D, BLOCK_D)
        v = _load(v_ptr, first, columns, length, stride_v, head // GROUPS, D, BLOCK_D)
        s, seen = _scores(q, tl.trans(k), rows[:, None], columns[None, :], length, scale, softcap, WINDOW)
        s = tl.where(seen, s, NEVER)
        bigger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp(s - bigger[:, None])
        less = tl.exp(largest - bigger)
        total = total * less + tl.sum(p, axis=1)
        sums = sums * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        largest = bigger
    _store(out_ptr, sums / total[:, None], first, rows, length, H * D, head, D, BLOCK_D)
    tl.store(lse_ptr + (first + rows) * H + head, largest + tl.log(total), mask=rows < length)


@triton.jit
def _backward_q(  # type: ignore[no-untyped-def]
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, ends_ptr, stride_q, stride_k, stride_v, scale,
    softcap, H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first = tl.load(ends_ptr + tl.program_id(2))
    length = tl.load(ends_ptr + tl.program_id(2) + 1) - first
    if start >= length:
        return
    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, first, rows, length, stride_q, head, D, BLOCK_D)
    dout = _load(dout_ptr, first, rows, length, H * D, head, D, BLOCK_D)
    out = _load(out_ptr, first, rows, length, H * D, head, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + (first + rows) * H + head, delta, mask=rows < length)
    lse = tl.load(lse_ptr + (first + rows) * H + head, mask=rows < length, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(_first_key(start, WINDOW, BLOCK_N), tl.minimum(start + BLOCK_M, length), BLOCK_N):
        columns = key + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, first, columns, length, stride_k, head // GROUPS, D, BLOCK_D)
        v = _load(v_ptr, first, columns, length, stride_v, head // GROUPS, D, BLOCK_D)
        s, seen = _scores(q, tl.trans(k), rows[:, None], columns[None, :], length, scale, softcap, WINDOW)
        p = tl.exp(tl.where(seen, s - lse[:, None], NEVER))
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * (1.0 - (s / softcap) * (s / softcap))
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    _store(dq_ptr, dq * scale, first, rows, length, H * D, head, D, BLOCK_D)


@triton.jit
def _backward_kv(  # type: ignore[no-untyped-def]
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, ends_ptr, stride_q, stride_k, stride_v, scale,
    softcap, H: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start, head_kv = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    first = tl.load(ends_ptr + tl.program_id(2))
    length = tl.load(ends_ptr + tl.program_id(2) + 1) - first
    if start >= length:
        return
    columns = start + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, first, columns, length, stride_k, head_kv, D, BLOCK_D)
    v = _load(v_ptr, first, columns, length, stride_v, head_kv, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    last = length
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
            s, seen = _scores(k, tl.trans(q), rows[None, :], columns[:, None], length, scale, softcap, WINDOW)
            p = tl.exp(tl.where(seen, s - lse[None, :], NEVER))
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


SMALL_MEMORY = 160 * 1024
"""Bytes of shared memory below which tiles are the smaller ones (A100 and H100 have 163 and 227 KiB)."""


def _tiles(q: torch.Tensor, *, backward: bool) -> _Tiles:
    """By head size and the shared memory of the device: both operands' tiles of both loops lie there."""
    if not q.is_cuda:
        return _Tiles(16, 32, 4, 1)
    wide = q.shape[2] > 128
    properties: Any = torch.cuda.get_device_properties(q.device)
    if properties.shared_memory_per_block_optin < SMALL_MEMORY:
        return _Tiles(32 if wide and backward else 64, 32, 4, 1)
    if backward:
        return _Tiles(64, 32, 8, 2) if wide else _Tiles(128, 64, 8, 2)
    return _Tiles(128, 32, 8, 2) if wide else _Tiles(128, 64, 8, 3)


def _sizes(q: torch.Tensor, k: torch.Tensor, window: int | None) -> dict[str, int]:
    heads, size = q.shape[1:]
    return {
        "H": heads, "GROUPS": heads // k.shape[1], "D": size, "BLOCK_D": triton.next_power_of_2(size),
        "WINDOW": window or 0,
    }  # fmt: skip


def _by_rows(*parts: torch.Tensor) -> list[torch.Tensor]:
    """[T, H, D] each, with heads side by side in a row."""
    return [part if part.stride()[1:] == (part.shape[2], 1) else part.contiguous() for part in parts]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, scale: float, softcap: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q [T, H, D], k and v [T, H_kv, D], ends [N + 1] (int32, cumulative lengths) -> out [T, H, D] and the logarithms
    of the softmax sums [T, H], fp32."""
    q, k, v = _by_rows(q, k, v)
    out = q.new_empty(q.shape)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tiles = _tiles(q, backward=False)
    _forward[(triton.cdiv(longest, tiles.outer), q.shape[1], ends.numel() - 1)](
        q, k, v, out, lse, ends, q.stride(0), k.stride(0), v.stride(0), scale, softcap, **_sizes(q, k, window),
        BLOCK_M=tiles.outer, BLOCK_N=tiles.inner, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    ends: torch.Tensor, longest: int, scale: float, softcap: float, window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v, shaped like them."""
    q, k, v = _by_rows(q, k, v)
    dout = dout.contiguous()
    dq, dk, dv = (part.new_empty(part.shape) for part in (q, k, v))
    delta = torch.empty_like(lse)
    tiles, count = _tiles(q, backward=True), ends.numel() - 1
    strides: tuple[Any, ...] = q.stride(0), k.stride(0), v.stride(0), scale, softcap
    options = {**_sizes(q, k, window), "num_warps": tiles.warps, "num_stages": tiles.stages}
    blocks = triton.cdiv(longest, tiles.outer)
    _backward_q[(blocks, q.shape[1], count)](
        dout, q, k, v, out, lse, dq, delta, ends, *strides, BLOCK_M=tiles.outer, BLOCK_N=tiles.inner, **options
    )
    _backward_kv[(blocks, k.shape[1], count)](
        dout, q, k, v, lse, delta, dk, dv, ends, *strides, BLOCK_M=tiles.inner, BLOCK_N=tiles.outer, **options
    )
    return dq, dk, dv
