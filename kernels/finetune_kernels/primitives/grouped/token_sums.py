"""Sums over single rows in a mixture of experts: those of each token, and the gradient of the router's weights.

    combine   out[t] = sum over c of w[t, c] z[places[t, c]]           z [S, H], places and w [T, k] -> [T, H]
    weigh     d_w[order[s]] = <d[s], a[s]> + <dz[s], bias_e>,  then d[s] = w[order[s]] d[s]      d and a [S, F]

Sums are fp32; without weights, w is 1. `combine` takes the place of a copy of z in the tokens' order and of k products
and sums. `weigh` reads the gradient d of the experts' inner activations a once, for both: backward goes on with w d,
and as the output is w (a D^T + bias), the gradient of w is <d, a> with the d of before, and <dz, bias>.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 2048
"""Elements of a row that one program takes at a time."""


def reference(z: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns the formula's sums, in fp32 or wider and rounded to the type of `z`."""
    total = z.new_zeros(places.shape[0], z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    for choice in range(places.shape[1]):
        part = z[places[:, choice]]
        total += part if weights is None else part * weights[:, choice].unsqueeze(1).to(total.dtype)
    return total.to(z.dtype)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    z_ptr, places_ptr, weights_ptr, out_ptr, n_cols, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n_cols

    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for choice in range(CHOSEN):
        row = tl.load(places_ptr + token * CHOSEN + choice).to(tl.int64)
        part = tl.load(z_ptr + row * n_cols + columns, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weights_ptr + token * CHOSEN + choice).to(tl.float32)
        total += part
    tl.store(out_ptr + token * n_cols + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(z: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """z [S, H] contiguous, places int64 [T, k] and weights [T, k] or None -> [T, H] in the type of `z`."""
    tokens, chosen = places.shape
    out = z.new_empty(tokens, z.shape[1])
    block = min(MAX_BLOCK, triton.next_power_of_2(z.shape[1]))
    _combine[(tokens, triton.cdiv(z.shape[1], block))](
        z, places.contiguous(), places if weights is None else weights.contiguous(), out, z.shape[1],
        CHOSEN=chosen, WEIGHTED=weights is not None, BLOCK_N=block,
    )  # fmt: skip
    return out


def reference_weigh(
    d: torch.Tensor, a: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, bias: tuple[torch.Tensor, ...] = ()
) -> torch.Tensor:
    """Returns and overwrites what `weigh` does, by PyTorch."""
    wide = torch.promote_types(d.dtype, torch.float32)
    products = (d.to(wide) * a).sum(1)
    if bias:
        dz, shift, experts = bias
        products += (dz.to(wide) * shift[experts]).sum(1)

    d.mul_(weights.flatten()[order].unsqueeze(1))
    found = torch.empty_like(weights, memory_format=torch.contiguous_format)
    return found.view(-1).index_copy_(0, order, products.to(weights.dtype)).view(weights.shape)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    d_ptr, a_ptr, weights_ptr, order_ptr, dw_ptr, dz_ptr, bias_ptr, experts_ptr, n_cols, n_out,
    BIASED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + place).to(tl.float32)

    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for begin in range(0, n_cols, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        mask = columns < n_cols
        d = tl.load(d_ptr + row * n_cols + columns, mask=mask, other=0.0).to(tl.float32)
        total += d * tl.load(a_ptr + row * n_cols + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_ptr + row * n_cols + columns, (d * weight).to(d_ptr.dtype.element_ty), mask=mask)

    if BIASED:
        expert = tl.load(experts_ptr + row)
        for begin in range(0, n_out, BLOCK_N):
            columns = begin + tl.arange(0, BLOCK_N)
            mask = columns < n_out
            dz = tl.load(dz_ptr + row * n_out + columns, mask=mask, other=0.0).to(tl.float32)
            total += dz * tl.load(bias_ptr + expert * n_out + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw_ptr + place, tl.sum(total, 0).to(dw_ptr.dtype.element_ty))


def weigh(
    d: torch.Tensor, a: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, bias: tuple[torch.Tensor, ...] = ()
) -> torch.Tensor:
    """d and a [S, F] contiguous, weights [T, k], order int64 [S] -> the gradient of the weights [T, k]; multiplies d by
    the weights. `bias`: dz [S, H], the bias of the experts' outputs [E, H], and the expert of each row [S]."""
    weights, found = weights.contiguous(), torch.empty_like(weights, memory_format=torch.contiguous_format)
    dz, shift, experts = bias or (d, d, order)
    block = min(MAX_BLOCK, triton.next_power_of_2(d.shape[1]))
    _weigh[(d.shape[0],)](
        d, a, weights, order, found, dz, shift.contiguous(), experts, d.shape[1], dz.shape[1],
        BIASED=bool(bias), BLOCK_N=block,
    )  # fmt: skip
    return found
