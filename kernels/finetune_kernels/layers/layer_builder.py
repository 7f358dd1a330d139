"""Builds the `DecoderLayer`s of a transformers model, or says why it cannot.

Only models of a `Family` are built. The family's row says which modules a layer has, and `why_not_fused` compares each
layer with it, so that what it lets through can be built. Sizes, scales and windows are read from the modules and the
configuration.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.attention_block import AttentionBlock
from finetune_kernels.layers.decoder_layer import DecoderLayer
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.mlp_block import MlpBlock
from finetune_kernels.layers.patching import why_not_adapter
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.ops.rotary_embedding import HeadNorm, Heads
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import ACTIVATIONS, Family, family_of, foreign_factor
from finetune_kernels.primitives.attention_inputs import AttentionParams

MAX_HEAD_SIZE = 256
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Linear layers of a decoder layer. A linear's index here is also the stream of its dropout mask."""


def why_not_fused(causal: Any) -> str | None:
    """Returns why the layers of this transformers model cannot be built; None if they can."""
    config, family = causal.config, family_of(causal)
    if family is None:
        return f"the kernels do not know {type(causal).__name__}"
    if (factor := foreign_factor(config)) is not None:
        return f"{factor} = {getattr(config, factor)} in the configuration, a factor that fused layers do not apply"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention in both directions"
    if head_size(config) > MAX_HEAD_SIZE or head_size(config) % 8:
        return f"heads of {head_size(config)} elements, not of a multiple of 8 up to {MAX_HEAD_SIZE}"

    activation = getattr(config, family.activation_field)
    if activation not in ACTIVATIONS:
        return f"activation {activation}, not {' or '.join(ACTIVATIONS)}"
    if config.attention_dropout or getattr(config, "resid_pdrop", 0):
        return "dropout in the base model"
    return next((reason for layer in causal.model.layers if (reason := _why_not_layer(layer, family))), None)


def head_size(config: Any) -> int:
    """Elements of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _why_not_layer(layer: Any, family: Family) -> str | None:
    """Compares one layer with its family's row."""
    modules, expected = dict(layer.named_modules()), _expected_modules(family)

    # Every module that the builder will ask for, and no norm that it would leave out.
    for name, kind in expected.items():
        if name not in modules:
            return f"{type(layer).__name__} has no {name}"
        if kind is not None and type(modules[name]).__name__ != kind:
            return f"{name} is {type(modules[name]).__name__}, not {kind}"

    norms = [name for name, module in modules.items() if "Norm" in type(module).__name__]
    if strange := [name for name in norms if name not in expected]:
        return f"{strange[0]} is a norm that other {family.prefix} models do not have"

    # Only the adapters may train.
    if any(weight.requires_grad for name, weight in layer.named_parameters() if "norm" in name):
        return "norm weights that train"

    for projection in _projections(layer):
        reason = why_not_adapter(projection) if hasattr(projection, "lora_A") else _why_not_plain(projection)
        if reason is not None:
            return reason
    return None


def _expected_modules(family: Family) -> dict[str, str | None]:
    """Name of each module that the builder takes from a layer -> its class; None for linear layers, which are peft's
    or PyTorch's."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if family.second_norms else []
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if family.head_norms else []
    inputs = ["self_attn.qkv_proj", "mlp.gate_up_proj"]
    if not family.merged_projections:
        inputs = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]

    return {
        "self_attn": family.attention,
        "mlp": family.mlp,
        **dict.fromkeys(norms, family.norm),
        **dict.fromkeys([*inputs, "self_attn.o_proj", "mlp.down_proj"]),
    }


def _projections(layer: Any) -> Iterator[Any]:
    modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    return (module for name, module in modules.items() if name in PROJECTIONS)


def _why_not_plain(projection: Any) -> str | None:
    if not isinstance(projection, nn.Linear):
        return f"a projection is {type(projection).__name__}, not a linear layer"
    return "base weights that train" if projection.weight.requires_grad else None


def build_layers(
    causal: Any, policies: Sequence[ActivationPolicy], dtype: torch.dtype, *, keep_dequantized: bool
) -> list[DecoderLayer]:
    """Returns a `DecoderLayer` for each layer of the model, with one policy each.

    Raises ValueError for models that `why_not_fused` refuses as unknown; other refused models must not come here.
    """
    family = family_of(causal)
    if family is None:
        raise ValueError(f"{type(causal).__name__} is not one of the families that the kernels know")

    builder = _Builder(family, causal.config, dtype, HostMemory(), keep_dequantized)
    return [
        builder.layer(index, layer, policy)
        for index, (layer, policy) in enumerate(zip(causal.model.layers, policies, strict=True))
    ]


@dataclass(frozen=True)
class _Builder:
    """Settings that all layers of a model share."""

    family: Family
    config: Any
    dtype: torch.dtype
    host: HostMemory
    keep_dequantized: bool

    def layer(self, index: int, layer: Any, policy: ActivationPolicy) -> DecoderLayer:
        """Builds one layer."""
        attention, mlp, config = layer.self_attn, layer.mlp, self.config
        # Gemma's names are shifted by its two more norms: what others call post-attention stands before the MLP.
        sandwich = self.family.second_norms
        before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm

        return DecoderLayer(
            index=index,
            attention=AttentionBlock(
                norm=self._norm(layer.input_layernorm),
                qkv=self._group(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
                o=self._group(attention, "o_proj"),
                post_norm=self._norm(layer.post_attention_layernorm) if sandwich else None,
                heads=Heads(config.num_attention_heads, config.num_key_value_heads, head_size(config)),
                head_norm=self._head_norm(attention),
                params=self._attention_params(attention),
            ),
            mlp=MlpBlock(
                norm=self._norm(before_mlp),
                gate_up=self._group(mlp, "gate_up_proj", "gate_proj", "up_proj"),
                down=self._group(mlp, "down_proj"),
                post_norm=self._norm(layer.post_feedforward_layernorm) if sandwich else None,
                activation=ACTIVATIONS[getattr(config, self.family.activation_field)],
            ),
            policy=policy,
            host=self.host,
        )

    def _group(self, parent: Any, merged: str, *names: str) -> LinearGroup:
        """The linear layers `names`, or the one that the family has merged them into."""
        found = names if names and not self.family.merged_projections else (merged,)
        linears = [getattr(parent, name) for name in found]

        # A stream for each projection, so that no two dropout masks of a layer are alike.
        stream = PROJECTIONS.index(found[0])
        return LinearGroup(linears, self.dtype, keep_dequantized=self.keep_dequantized, philox_stream=stream)

    def _norm(self, module: Any) -> Norm:
        weight, offset = module.weight.detach(), self.family.norm_offset
        return Norm(weight.float() + offset if offset else weight, norm_eps(module))

    def _head_norm(self, attention: Any) -> HeadNorm | None:
        if not self.family.head_norms:
            return None

        query, key = self._norm(attention.q_norm), self._norm(attention.k_norm)
        return HeadNorm(query.weight, key.weight, query.eps)

    def _attention_params(self, attention: Any) -> AttentionParams:
        """Scale, window and softcap of one layer's attention."""
        holder = {"none": None, "model": self.config, "layer": attention}[self.family.window]
        window = None if holder is None else holder.sliding_window

        # Gemma 3 has a field for a softcap, and no softcap.
        softcap = attention.attn_logit_softcapping if self.family.caps_scores else None
        return AttentionParams(attention.scaling, window, softcap)


def norm_eps(module: Any) -> float:
    """The number that is added to the mean square; Gemma's norms have their own name for it."""
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
