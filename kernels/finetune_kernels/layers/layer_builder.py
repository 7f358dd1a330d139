"""Builds the `DecoderLayer`s of a transformers model.

Only models of a `Family` are built, whose row says which modules a layer has; `layer_check` compares each layer with it
before. Sizes, scales and windows are read from the modules and the configuration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.blocks.attention_block import AttentionBlock
from finetune_kernels.layers.blocks.latent_attention import LatentAttention, LatentHeads, LatentProjection
from finetune_kernels.layers.blocks.layer_input_block import LayerInputBlock
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.blocks.mlp_block import MlpBlock
from finetune_kernels.layers.blocks.module_mixer import ModuleMixer, ParallelMixers
from finetune_kernels.layers.blocks.projected_heads import ProjectedHeads
from finetune_kernels.layers.decoder_layer import DecoderLayer
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.layer_check import has_mixer, has_mixture
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.ops.plain_activation import PlainKind
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.family_parts import Latent, LayerInput, Mixture
from finetune_kernels.planning.fused_support import (
    ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    BlockFactors,
    activation_name,
    block_factors,
    head_size,
    residual_factor,
)
from finetune_kernels.planning.parts.layer_sizes import LayerSizes, layer_sizes, row_of_layer
from finetune_kernels.primitives.attention.inputs import AttentionParams
from finetune_kernels.primitives.head_norm import HeadNorm

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "dense",
    "fc1", "fc2", "c_fc", "c_proj", "input_linear", "output_linear", "w1", "w3", "w2", "out_proj", "shared_expert_gate",
    "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "per_layer_input_gate", "per_layer_projection",
)  # fmt: skip
"""Linear layers of a decoder layer. A linear's index here is also the stream of its dropout mask."""


def build_layers(
    causal: Any, policies: Sequence[ActivationPolicy], dtype: torch.dtype, *, keep_dequantized: bool
) -> list[DecoderLayer]:
    """Returns a `DecoderLayer` for each layer of the model, with one policy each.

    Raises ValueError for models that `why_not_fused` refuses as unknown; other refused models must not come here.
    """
    family = family_of(causal)
    if family is None:
        raise ValueError(f"{type(causal).__name__} is not one of the families that the kernels know")

    shared = _Builder(family, causal.config, dtype, HostMemory(), BatchesOfPass(), keep_dequantized)
    sizes = layer_sizes(causal.config, family) or (None,) * len(policies)
    return [
        shared.of_sizes(sizes[index]).layer(index, layer, policy)
        for index, (layer, policy) in enumerate(zip(causal.model.layers, policies, strict=True))
    ]


@dataclass(frozen=True)
class _Builder:
    """Settings that all layers of a model share."""

    family: Family
    config: Any
    dtype: torch.dtype
    host: HostMemory
    batches: BatchesOfPass
    keep_dequantized: bool
    sizes: LayerSizes | None = None
    """Sizes of the layer that is built, if they differ from others'."""

    def of_sizes(self, sizes: LayerSizes | None) -> "_Builder":
        """The same for layers of these sizes, whose row may lack what others have."""
        return replace(self, family=row_of_layer(self.family, sizes), sizes=sizes)

    def layer(self, index: int, layer: Any, policy: ActivationPolicy) -> DecoderLayer:
        """Builds one layer."""
        return DecoderLayer(
            index=index,
            mixer=self._first_block(index, layer),
            mlp=self._second_block(layer),
            policy=policy,
            host=self.host,
            parallel=self.family.parallel,
            third=self._third_block(layer, self.family.layer_input) if self.family.layer_input else None,
            scalar=float(getattr(layer, self.family.layer_scalar)) if self.family.layer_scalar else 1.0,
        )

    def _first_block(self, index: int, layer: Any) -> AttentionBlock | LatentAttention | ModuleMixer | ParallelMixers:
        family = self.family
        if family.latent is not None:
            return self._latent_attention(layer, family.latent)
        if family.mixer is None or not has_mixer(layer, family):
            return self._attention(index, layer)
        if not family.mixer.beside_attention:
            return self._mixer(layer)

        # Both read the same norm's output.
        attention, mixer = self._attention(index, layer), self._mixer(layer)
        return ParallelMixers(attention.norm, replace(attention, norm=None), replace(mixer, norm=None))

    def _attention(self, index: int, layer: Any) -> AttentionBlock:
        attention, config, family = layer.self_attn, self.config, self.family
        window = self._window(index, attention)
        # Gemma 3 has a field for a softcap, and no softcap.
        softcap = attention.attn_logit_softcapping if family.caps_scores else None
        sinks = attention.sinks.detach() if family.has_sinks else None

        return AttentionBlock(
            norm=self._norm_at(layer, family.pre_norms, 0),
            qkv=self._group(attention, family.attention_inputs),
            o=self._group(attention, (family.attention_output,)),
            post_norm=self._norm_at(layer, family.post_norms, 0),
            projected=self._projected_heads(attention, rotates=self._rotates(attention, window)),
            params=AttentionParams(attention.scaling * self.factors.scores, window, softcap, sinks),
            multiplier=residual_factor(config, family) * self.factors.attention,
            sharing=None if self.sizes is None else self.sizes.sharing,
        )

    def _projected_heads(self, attention: Any, *, rotates: bool) -> ProjectedHeads:
        config, family, sizes = self.config, self.family, self.sizes
        if sizes is None:
            key_value, size = config.num_key_value_heads, head_size(config)
        else:
            key_value, size = sizes.key_value_heads if sizes.projections else 0, sizes.head_size
        return ProjectedHeads(
            heads=Heads(config.num_attention_heads, key_value, size, family.rope.startswith("pairs")),
            norm=self._head_norm(attention),
            rotates=rotates,
            gates=family.gates_heads,
            keys_are_values=sizes is not None and sizes.projections == 1,
        )

    def _latent_attention(self, layer: Any, latent: Latent) -> LatentAttention:
        attention, config, family = layer.self_attn, self.config, self.family
        projections = [
            LatentProjection(self._norm(getattr(attention, norm)), self._group(attention, (wide,)))
            for norm, wide in zip(latent.norms, latent.widening, strict=True)
        ]

        # Keys and values are widened for each query head.
        heads = Heads(config.num_attention_heads, config.num_attention_heads, head_size(config), family.rope == "pairs")
        return LatentAttention(
            norm=self._norm_at(layer, family.pre_norms, 0),
            narrow=self._group(attention, family.attention_inputs),
            query=projections[0] if latent.has_query_latent else None,
            key_value=projections[-1],
            o=self._group(attention, (family.attention_output,)),
            heads=LatentHeads(heads, config.qk_rope_head_dim, config.v_head_dim),
            params=AttentionParams(attention.scaling),
        )

    def _mixer(self, layer: Any) -> ModuleMixer:
        family = self.family
        assert family.mixer is not None
        return ModuleMixer(
            norm=self._norm_at(layer, family.pre_norms, 0),
            module=getattr(layer, family.mixer.name),
            batches=self.batches,
            multiplier=residual_factor(self.config, family) * self.factors.mixer,
        )

    def _second_block(self, layer: Any) -> MlpBlock | MixtureBlock:
        family = self.family
        block = self._mixture(layer) if has_mixture(layer, family) else self._mlp(getattr(layer, family.mlp_name))
        return replace(
            block,
            # In a parallel layer it is the attention's.
            norm=self._norm_at(layer, family.pre_norms, -1),
            post_norm=self._norm_at(layer, family.post_norms, 1),
            multiplier=residual_factor(self.config, family) * self.factors.mlp,
        )

    def _mlp(self, mlp: Any) -> MlpBlock:
        """The MLP without the layer's norms and factor."""
        family = self.family
        return MlpBlock(
            norm=None,
            gate_up=self._group(mlp, family.mlp_inputs, (self.factors.gate, 1.0)[: len(family.mlp_inputs)]),
            down=self._group(mlp, (family.mlp_output,)),
            post_norm=None,
            activation=self._activation(mlp),
        )

    def _third_block(self, layer: Any, third: LayerInput) -> LayerInputBlock:
        return LayerInputBlock(
            gate=self._group(layer, (third.gate,)),
            projection=self._group(layer, (third.projection,)),
            post_norm=self._norm(getattr(layer, third.norm)),
            activation=ACTIVATIONS[str(activation_name(self.config, self.family))],
        )

    def _mixture(self, layer: Any) -> MixtureBlock:
        """Experts, router and what all tokens share, without the layer's norm and factor."""
        mixture = self.family.mixture
        assert mixture is not None
        parent, _, gate = (mixture.shared_gate or "").rpartition(".")
        return MixtureBlock(
            norm=None,
            router=self._router(layer, mixture),
            experts=layer.get_submodule(mixture.experts),
            shared=self._mlp(layer.get_submodule(mixture.shared)) if mixture.shared else None,
            shared_gate=self._group(layer.get_submodule(parent), (gate,)) if gate else None,
        )

    def _router(self, layer: Any, mixture: Mixture) -> Callable[[torch.Tensor], Any]:
        """transformers' router; with the buffer of its block that it takes, if there is one."""
        router, experts = layer.get_submodule(mixture.router), expert_family_of_type(self.family.model_type)
        block = layer.get_submodule(mixture.block)
        name = None if experts is None else experts.block_bias
        bias = None if name is None else getattr(block, name, None)
        return router if bias is None else partial(router, **{str(name): bias})

    @property
    def factors(self) -> BlockFactors:
        """The factors of a layer's blocks."""
        return block_factors(self.config, self.family)

    def _group(self, parent: Any, names: tuple[str, ...], factors: tuple[float, ...] = ()) -> LinearGroup:
        # A stream for each projection, so that no two dropout masks of a layer are alike.
        linears, stream = [getattr(parent, name) for name in names], PROJECTIONS.index(names[0])
        return LinearGroup(
            linears, self.dtype, keep_dequantized=self.keep_dequantized, philox_stream=stream, factors=factors
        )

    def _norm_at(self, layer: Any, names: tuple[str, ...], index: int) -> Norm | None:
        """The norm of that index; None for a family without norms in this place."""
        return self._norm(attrgetter(names[index])(layer)) if names else None

    def _norm(self, module: Any) -> Norm:
        weight, offset, bias = module.weight.detach(), self.family.norm_offset, getattr(module, "bias", None)
        weight = weight.float() + offset if offset else weight
        centered = self.family.norm_kind != "rms"
        return Norm(weight, norm_eps(module), centered=centered, bias=None if bias is None else bias.detach())

    def _head_norm(self, attention: Any) -> HeadNorm | None:
        if not self.family.head_norms:
            return None

        # A layer that reuses keys norms q alone.
        norms = [self._norm(getattr(attention, name)) for name in self.family.head_norms]
        normed_value = self.family.value_norm is not None
        return HeadNorm(norms[0].weight, norms[-1].weight, norms[0].eps, self.family.head_norm_place, normed_value)

    def _window(self, index: int, attention: Any) -> int | None:
        """Keys that a query of this layer sees; None: all before it."""
        config, place = self.config, self.family.window
        if place == "layer type":
            found = config.sliding_window if config.layer_types[index] == "sliding_attention" else None
        else:
            holder = {"none": None, "model": config, "layer": attention}[place]
            found = None if holder is None else holder.sliding_window
        return None if found is None else int(found)

    def _rotates(self, attention: Any, window: int | None) -> bool:
        """True if the layer has RoPE."""
        rule = self.family.rope_layers
        if rule == "use_rope":
            return bool(attention.use_rope)
        if rule == "all" or window is not None:
            return True
        return rule == "windowed if any" and self.config.sliding_window is None

    def _activation(self, mlp: Any) -> Activation | PlainKind:
        name = str(activation_name(self.config, self.family))
        if self.family.gated:
            return ACTIVATIONS[name]
        if name != "xielu":
            return PlainKind(PLAIN_ACTIVATIONS[name])

        # Its numbers are stored before the softplus that keeps them positive.
        learnt = (mlp.act_fn.alpha_p, mlp.act_fn.alpha_n)
        positive, negative = (float(nn.functional.softplus(value.detach().float())) for value in learnt)
        return PlainKind("xielu", positive, float(mlp.act_fn.beta) + negative)


def norm_eps(module: Any) -> float:
    """The number that is added to the mean square; Gemma's norms have their own name for it."""
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
