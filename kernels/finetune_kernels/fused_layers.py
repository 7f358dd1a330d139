"""Installs `DecoderLayer` in the layers of a transformers model with a peft adapter, or says why it cannot.

Each layer module gets a `forward` of ours; nothing else in the process is touched. What all layers of a pass share
(rotation angles, document boundaries) is made once, at the first layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune_kernels.attention import Documents
from finetune_kernels.decoder_layer import DecoderLayer, Keep
from finetune_kernels.host_memory import HostMemory
from finetune_kernels.linear_group import LinearGroup
from finetune_kernels.patching import ACTIVATIONS, why_not_adapter
from finetune_kernels.rotary_embedding import HeadNorm, Heads

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")
HEAD_SIZES = (16, 32, 64, 128, 256)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


def why_not_fused(causal: Any, longest: int) -> str | None:
    """Why the layers of this transformers model stay as they are, for documents of at most `longest` tokens."""
    config = causal.config
    if type(causal).__name__ not in FAMILIES:
        return f"the layers of {type(causal).__name__} are not known"
    window = getattr(config, "sliding_window", None)
    if window and window < longest and getattr(config, "use_sliding_window", True):
        return f"a sliding window of {window} tokens"
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return "partial rotary embedding"
    if _head_size(config) not in HEAD_SIZES:
        return f"heads of size {_head_size(config)}"
    if config.hidden_act not in ACTIVATIONS:
        return f"activation {config.hidden_act}"
    if config.attention_dropout or getattr(config, "resid_pdrop", 0):
        return "dropout in the base model"
    return next((reason for layer in causal.model.layers if (reason := _why_not_layer(layer))), None)


def _why_not_layer(layer: Any) -> str | None:
    if any(weight.requires_grad for name, weight in layer.named_parameters() if "norm" in name):
        return "norm weights that train"
    for projection in _projections(layer):
        reason = why_not_adapter(projection) if hasattr(projection, "lora_A") else _why_not_plain(projection)
        if reason is not None:
            return reason
    return None


class FusedLayers:
    """The layers of one model; make it only where `why_not_fused` gives None."""

    def __init__(self, causal: Any, keeps: Sequence[Keep], dtype: torch.dtype, *, resident: bool) -> None:
        host = HostMemory()
        self.layers = [
            _fuse(index, layer, causal.config, keep, dtype, host, resident=resident)
            for index, (layer, keep) in enumerate(zip(causal.model.layers, keeps, strict=True))
        ]
        self.resident_bytes = sum(group.resident_bytes for layer in self.layers for group in layer.groups)
        self._shared: tuple[torch.Tensor, torch.Tensor, Documents] | None = None
        for index, layer in enumerate(causal.model.layers):
            layer.forward = _Forward(self, index, layer)

    def keep(self, keeps: Sequence[Keep]) -> None:
        """Keep something else from the next forward pass on."""
        for layer, keep in zip(self.layers, keeps, strict=True):
            layer.keep = keep

    def release_weights(self) -> None:
        """Let go of decoded weights; they are decoded where they are used from now on."""
        for layer in self.layers:
            for group in layer.groups:
                group.release()
        self.resident_bytes = 0

    def run(self, index: int, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], options: Any) -> Any:
        """One layer: hidden [B, T, hidden] -> the same."""
        if index == 0 or self._shared is None:
            batch, length, _ = hidden.shape
            cos, sin = (angle.expand(batch, -1, -1).flatten(0, 1).contiguous() for angle in angles)
            self._shared = cos, sin, _documents(batch, length, hidden.device, options)
        cos, sin, documents = self._shared
        return self.layers[index](hidden.flatten(0, 1), cos, sin, documents).view(hidden.shape)


class _Forward:
    """What a layer module calls instead of its own forward."""

    def __init__(self, fused: FusedLayers, index: int, layer: Any) -> None:
        self._fused, self._index, self._original = fused, index, layer.forward

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, position_embeddings: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """See transformers' decoder layers; with a cache the layer's own forward answers."""
        if past_key_values is not None:
            return self._original(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, position_embeddings=position_embeddings, **options,
            )  # fmt: skip
        return self._fused.run(self._index, hidden_states, position_embeddings, options)


def _documents(batch: int, length: int, device: torch.device, options: Any) -> Documents:
    ends = options.get("cu_seq_lens_q")
    if ends is None:
        return Documents.of_length(length, batch, device)
    return Documents(ends.to(torch.int32), int(options["max_length_q"]), batch * length)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _projections(layer: Any) -> list[Any]:
    modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    return [module for name, module in modules.items() if name in PROJECTIONS]


def _why_not_plain(projection: Any) -> str | None:
    if not isinstance(projection, nn.Linear):
        return f"layer {type(projection).__name__}"
    return "base weights that train" if projection.weight.requires_grad else None


def _fuse(
    index: int, layer: Any, config: Any, keep: Keep, dtype: torch.dtype, host: HostMemory, *, resident: bool
) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp

    def group(parent: Any, merged: str, *names: str) -> LinearGroup:
        found = [getattr(parent, merged)] if hasattr(parent, merged) else [getattr(parent, name) for name in names]
        return LinearGroup(found, dtype, resident=resident)

    norm, head_norm = layer.input_layernorm, None
    if hasattr(attention, "q_norm"):
        eps = attention.q_norm.variance_epsilon
        head_norm = HeadNorm(attention.q_norm.weight.detach(), attention.k_norm.weight.detach(), eps)
    return DecoderLayer(
        index=index,
        qkv=group(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
        o=group(attention, "o_proj"),
        gate_up=group(mlp, "gate_up_proj", "gate_proj", "up_proj"),
        down=group(mlp, "down_proj"),
        norm1=norm.weight.detach(),
        norm2=layer.post_attention_layernorm.weight.detach(),
        eps=norm.variance_epsilon,
        heads=Heads(config.num_attention_heads, config.num_key_value_heads, _head_size(config)),
        head_norm=head_norm,
        scale=attention.scaling,
        activation=ACTIVATIONS[config.hidden_act],
        keep=keep,
        host=host,
    )
