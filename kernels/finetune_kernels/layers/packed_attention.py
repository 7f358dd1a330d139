"""`attention` as one of transformers' attention functions, over packed documents: no mask of T x T, no work across
documents.

transformers' own path for packed rows builds a dense block-diagonal mask, and with a mask PyTorch has no flash
kernel. Here the boundaries come as cumulative lengths, which TRL's padding-free collator provides with every batch.

A call without boundaries is not packed (generation: rows of a batch, left-padded, with a cache), and goes to
transformers' own attention: to the family's eager one where scores are capped, which no other of its kernels does.
"""

import sys
from typing import Any

import torch

from finetune_kernels.ops import attention
from finetune_kernels.ops.attention import AttentionParams, PackedSequences
from finetune_kernels.planning.families import FAMILIES

NAME = "finetune_packed"
DENSE = "sdpa"  # transformers' name of what serves calls that are not packed


class PackedAttentionFunction(torch.autograd.Function):
    """Autograd around `attention`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: PackedSequences, params: AttentionParams
    ) -> torch.Tensor:
        """See `packed_attention`."""
        out, saved = attention.forward(q, k, v, documents, params)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.documents, ctx.params = documents, params
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, *saved = ctx.saved_tensors
        three = attention.backward(dout.contiguous(), q, k, v, out, tuple(saved), ctx.documents, ctx.params)
        return *three, None, None


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedSequences, params: AttentionParams
) -> torch.Tensor:
    """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""
    return PackedAttentionFunction.apply(query, key, value, documents, params)  # type: ignore[no-untyped-call, no-any-return]


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D]; B is 1
    where rows are packed."""
    if options.get("cu_seq_lens_q") is None:
        return _attend_dense(module, query, key, value, mask, scaling, options)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    ends = options["cu_seq_lens_q"].to(torch.int32)
    documents = PackedSequences(ends, int(options["max_length_q"]), q.shape[0])
    params = AttentionParams(scaling, options.get("sliding_window"), options.get("softcap"))
    return packed_attention(q, k, v, documents, params).unsqueeze(0), None


def _attend_dense(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, options: Any
) -> tuple[torch.Tensor, None]:
    """Rows of a batch, by transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Any = ALL_ATTENTION_FUNCTIONS[DENSE]
    window, capped = options.get("sliding_window"), options.get("softcap") is not None
    if mask is None and (capped or (window is not None and window < key.shape[2])):
        mask = _seen(query.shape[2], key.shape[2], window, query.device)
    if capped:
        attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, lowest)
    out: torch.Tensor = attend(module, query, key, value, mask, scaling=scaling, **options)[0]
    return out, None


def _seen(rows: int, columns: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Whether each of the last `rows` queries sees each of `columns` keys."""
    back = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return (back >= 0) & (back < (window or columns))


def _mask(**options: Any) -> torch.Tensor | None:
    """transformers' mask interface. Packed rows come without a mask of their padding, as they have none."""
    if options.get("attention_mask") is None:
        return None
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[DENSE](**options)
    return mask


def use_packed_attention(causal: Any) -> str | None:
    """Switch a transformers model to it; returns why not, where it cannot be used."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if type(causal).__name__ not in FAMILIES:
        return "attention of another kind"
    if getattr(causal.config, "use_bidirectional_attention", False):
        return "attention in both directions"
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    causal.set_attn_implementation(NAME)
    return None
