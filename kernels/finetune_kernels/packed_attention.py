"""Causal attention over packed documents by PyTorch's variable-length flash attention: no mask of T x T, no work
across documents.

transformers' own path for packed rows builds a dense block-diagonal mask, and with a mask PyTorch has no flash
kernel. Here the boundaries come as cumulative lengths, which TRL's padding-free collator provides with every batch.

    out[i] = softmax(scale * q[i] . k[j], j in the same document, j <= i) v[j]

A call without boundaries is not packed (generation: rows of a batch, left-padded, with a cache), and goes to
transformers' own attention.
"""

import inspect
from typing import Any

import torch

NAME = "finetune_packed"
DENSE = "sdpa"  # transformers' name of what serves calls that are not packed
# Families whose attention is plain: no logit cap, no sinks, one window at most.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")


def is_available() -> bool:
    """Whether this PyTorch has the kernel."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen.varlen_attn).parameters or _takes_causal(varlen)


def _takes_causal(varlen: Any) -> bool:
    return "is_causal" in inspect.signature(varlen.varlen_attn).parameters


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """query [T, H, D], key and value [T, H_kv, D], boundaries [N + 1] (int32, cumulative lengths) -> [T, H, D]."""
    from torch.nn.attention import varlen

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    options |= {"is_causal": True} if _takes_causal(varlen) else {"window_size": (-1, 0)}
    if groups > 1:
        if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    attended: Any = varlen.varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
    result: torch.Tensor = attended
    return result


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D]; B is 1
    where rows are packed."""
    if options.get("cu_seq_lens_q") is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        dense: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[DENSE](
            module, query, key, value, mask, scaling=scaling, **options
        )
        return dense
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    attended = packed_attention(q, k, v, options["cu_seq_lens_q"], options["max_length_q"], scaling)
    return attended.unsqueeze(0), None


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
    if getattr(causal.config, "sliding_window", None):
        return "a sliding window"
    if not is_available():
        return "this PyTorch has no variable-length attention"
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    causal.set_attn_implementation(NAME)
    return None
