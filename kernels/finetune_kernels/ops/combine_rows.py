"""What a mixture of experts adds up for each token, from rows that are sorted by expert.

    out[t] = sum over c of  w[t, c] z[places[t, c]]                 z [S, H], places and w [T, k] -> [T, H]

Sums are in fp32. Without weights, w is 1. One launch takes the place of a copy of z in the tokens' order and of k
products and sums.
"""

import torch
import triton
import triton.language as tl

MAX_BLOCK = 2048
"""Elements of a row that one program sums."""


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


def combine_rows(z: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """z [S, H] contiguous, places int64 [T, k] and weights [T, k] or None -> [T, H] in the type of `z`."""
    tokens, chosen = places.shape
    out = z.new_empty(tokens, z.shape[1])
    block = min(MAX_BLOCK, triton.next_power_of_2(z.shape[1]))
    _combine[(tokens, triton.cdiv(z.shape[1], block))](
        z, places.contiguous(), places if weights is None else weights.contiguous(), out, z.shape[1],
        CHOSEN=chosen, WEIGHTED=weights is not None, BLOCK_N=block,
    )  # fmt: skip
    return out
