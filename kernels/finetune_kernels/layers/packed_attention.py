"""`attention` as one of transformers' attention functions, over packed sequences: no mask of T x T, no work across
sequences.

transformers' own path for packed rows builds a dense block-diagonal mask, and with a mask PyTorch has no flash
kernel. Here the bounds come as cumulative lengths, which TRL's padding-free collator gives with every batch.

A call without bounds is not packed (generation: rows of a batch, left-padded, with a cache). It goes to transformers'
own attention: to the family's eager one for models with a softcap or sinks, which no other of its kernels applies.
"""

import sys
from typing import Any

import torch
from torch.nn.functional import pad

from finetune_kernels.ops.attention import attention
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.fused_support import sees_both_directions
from finetune_kernels.primitives.attention.inputs import AttentionParams, PackedSequences, Qkv
from finetune_kernels.primitives.attention.pass_counts import PassesByEnds

NAME = "finetune_packed"
DENSE = "sdpa"
"""transformers' name of the attention that serves calls that are not packed."""
_passes = PassesByEnds()


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D]. B is 1 if
    rows are packed."""
    if options.get("cu_seq_lens_q") is None:
        return _attend_dense(module, (query, key, value), mask, scaling, options)

    qkv = Qkv(*(part[0].transpose(0, 1) for part in (query, key, value)))  # [T, H or H_kv, D]
    ends = options["cu_seq_lens_q"]  # the tensor itself is that of all layers, also where they run again for backward
    sequences = PackedSequences(ends.to(torch.int32), int(options["max_length_q"]), query.shape[2])
    sequences = _passes.of(ends, sequences)
    params = AttentionParams(scaling, _window(module, options), options.get("softcap"), options.get("s_aux"))
    # Latent attention's values are smaller than its keys, and kernels take one size: zeros add nothing.
    size = qkv.v.shape[2]
    qkv = qkv._replace(v=pad(qkv.v, (0, qkv.q.shape[2] - size)))
    return attention(qkv, sequences, params)[..., :size].unsqueeze(0), None


def _attend_dense(
    module: Any, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mask: Any, scaling: float, options: Any
) -> tuple[torch.Tensor, None]:
    """Attention over the rows of a batch, by transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Any = ALL_ATTENTION_FUNCTIONS[DENSE]
    query, key, _ = qkv
    window, capped = _window(module, options), any(options.get(name) is not None for name in ("softcap", "s_aux"))
    if mask is None and (capped or (window is not None and window < key.shape[2])):
        mask = _visible(query.shape[2], key.shape[2], window, query.device)  # [T, T_kv], True: seen

    # Eager attention adds its mask to the scores: 0 or the lowest number in place of True or False.
    if capped:
        attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, lowest)

    out: torch.Tensor = attend(module, *qkv, mask, scaling=scaling, **options)[0]
    return out, None


def _window(module: Any, options: dict[str, Any]) -> int | None:
    """The window of a layer's attention: said with the call, or left to masks (Qwen 2 MoE)."""
    found: int | None = options.get("sliding_window", getattr(module, "sliding_window", None))
    return found


def _visible(rows: int, columns: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Mask [rows, columns]: True if one of the last `rows` queries sees one of `columns` keys."""
    back = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return (back >= 0) & (back < (window or columns))


def _mask(**options: Any) -> torch.Tensor | None:
    """transformers' mask interface. Packed rows have no padding, so they come without a mask of it and need none."""
    if options.get("attention_mask") is None:
        return None
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[DENSE](**options)
    return mask


def use_packed_attention(causal: Any, *, fused: bool = False) -> str | None:
    """Switches a transformers model to packed attention; returns why not if it cannot be used. `fused`: its layers are
    fused, and know by themselves where documents end."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    family = family_of(causal)
    if family is None:
        return f"the kernels do not know {type(causal).__name__}"
    if sees_both_directions(causal.config):
        return "attention in both directions"
    if not fused and not family.passes_bounds:
        return f"layers of {family.prefix} do not tell attention where documents end"
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    causal.set_attn_implementation(NAME)
    return None
