"""Makes a `DecoderLayer` of one of transformers' layer modules, or says why it cannot.

Read from the modules, not from a table of families: norms by their names, the second norms and head norms where they
exist, window and cap from the attention module, rotation from the cos_sin that the model computes.
"""

from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.attention_block import AttentionBlock, Norm
from finetune_kernels.layers.decoder_layer import DecoderLayer
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.mlp_block import MlpBlock
from finetune_kernels.layers.patching import ACTIVATIONS, NORMS, why_not_adapter
from finetune_kernels.ops.attention import AttentionParams
from finetune_kernels.ops.rotary_embedding import HeadNorm, Heads
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import FAMILIES

MAX_HEAD_SIZE = 256
# A linear's place tile_ctx is its masks' stream, too.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def why_not_fused(causal: Any) -> str | None:
    """Why the layers of this transformers model cannot be built; None where they can."""
    config = causal.config
    if type(causal).__name__ not in FAMILIES:
        return f"the layers of {type(causal).__name__} are not known"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    if head_size(config) > MAX_HEAD_SIZE or head_size(config) % 8:
        return f"heads of size {head_size(config)}"
    if activation_name(config) not in ACTIVATIONS:
        return f"activation {activation_name(config)}"
    if config.attention_dropout or getattr(config, "resid_pdrop", 0):
        return "dropout in the base model"
    return next((reason for layer in causal.model.layers if (reason := _why_not_layer(layer))), None)


def head_size(config: Any) -> int:
    """Elements of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def activation_name(config: Any) -> str:
    """transformers' name of the MLP's activation."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _why_not_layer(layer: Any) -> str | None:
    if any(weight.requires_grad for name, weight in layer.named_parameters() if "norm" in name):
        return "norm weights that train"
    for projection in _projections(layer):
        reason = why_not_adapter(projection) if hasattr(projection, "lora_A") else _why_not_plain(projection)
        if reason is not None:
            return reason
    return None


def _projections(layer: Any) -> list[Any]:
    modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    return [module for name, module in modules.items() if name in PROJECTIONS]


def _why_not_plain(projection: Any) -> str | None:
    if not isinstance(projection, nn.Linear):
        return f"layer {type(projection).__name__}"
    return "base weights that train" if projection.weight.requires_grad else None


def build_layer(
    index: int,
    layer: Any,
    config: Any,
    policy: ActivationPolicy,
    dtype: torch.dtype,
    host: HostMemory,
    *,
    keep_dequantized: bool,
) -> DecoderLayer:
    """The layer module as one function; only for models that `why_not_fused` lets through."""
    attention, mlp = layer.self_attn, layer.mlp
    # Gemma has two more norms, and its names are shifted: what others call post-attention stands before the MLP.
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm

    def group(parent: Any, merged: str, *names: str) -> LinearGroup:
        found = (merged,) if hasattr(parent, merged) else names
        linears = [getattr(parent, name) for name in found]
        return LinearGroup(linears, dtype, keep_dequantized=keep_dequantized, philox_stream=PROJECTIONS.index(found[0]))

    return DecoderLayer(
        index=index,
        attention=AttentionBlock(
            norm=_norm(layer.input_layernorm),
            qkv=group(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
            o=group(attention, "o_proj"),
            post_norm=_norm(layer.post_attention_layernorm) if sandwich else None,
            heads=Heads(config.num_attention_heads, config.num_key_value_heads, head_size(config)),
            head_norm=_head_norm(attention),
            params=_attention_params(attention, config),
        ),
        mlp=MlpBlock(
            norm=_norm(before_mlp),
            gate_up=group(mlp, "gate_up_proj", "gate_proj", "up_proj"),
            down=group(mlp, "down_proj"),
            post_norm=_norm(layer.post_feedforward_layernorm) if sandwich else None,
            activation=ACTIVATIONS[activation_name(config)],
        ),
        policy=policy,
        host=host,
    )


def _norm(module: Any) -> Norm:
    weight, offset = module.weight.detach(), NORMS[type(module).__name__]
    return Norm(weight.float() + offset if offset else weight, norm_eps(module))


def norm_eps(module: Any) -> float:
    """What is added to the mean square; Gemma's norms have their own name for it."""
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _head_norm(attention: Any) -> HeadNorm | None:
    if not hasattr(attention, "q_norm"):
        return None
    query, key = _norm(attention.q_norm), _norm(attention.k_norm)
    return HeadNorm(query.weight, key.weight, query.eps)


def _attention_params(attention: Any, config: Any) -> AttentionParams:
    """Qwen and Gemma say the window per layer, Mistral and Phi for the model. Gemma 3 has a field for a cap, and no
    cap."""
    kind = type(attention).__name__
    window = config.sliding_window if kind in ("MistralAttention", "Phi3Attention") else None
    window = getattr(attention, "sliding_window", window)
    return AttentionParams(
        attention.scaling, window, attention.attn_logit_softcapping if kind == "Gemma2Attention" else None
    )
