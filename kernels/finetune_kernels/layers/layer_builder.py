"""Builds the layers of a transformers model: `DecoderLayer`s, or `OneBlockLayer`s.

Only models of a `Family` are built, whose row says which modules a layer has; `layer_check` compares each layer with it
before. Sizes, scales and windows are read from the modules and the configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune_kernels.layers.blocks.attention_block import AttentionBlock
from finetune_kernels.layers.blocks.latent_attention import LatentAttention, LatentHeads, LatentProjection
from finetune_kernels.layers.blocks.mlp_beside_experts import MlpBesideExperts
from finetune_kernels.layers.blocks.module_mixer import ModuleMixer, ParallelMixers
from finetune_kernels.layers.blocks.projected_heads import ProjectedHeads
from finetune_kernels.layers.decoder_layer import DecoderLayer
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.layer_check import has_mixer
from finetune_kernels.layers.mlp_builder import MlpBuilder
from finetune_kernels.layers.one_block_layer import OneBlockLayer
from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.family_parts import Latent
from finetune_kernels.planning.fused_support import (
    head_size,
    residual_factor,
)
from finetune_kernels.planning.parts.layer_sizes import LayerSizes, layer_sizes, row_of_layer
from finetune_kernels.primitives.attention.inputs import AttentionParams
from finetune_kernels.primitives.head_norm import HeadNorm


def build_layers(
    causal: Any, policies: Sequence[ActivationPolicy], dtype: torch.dtype, *, keep_dequantized: bool
) -> list[DecoderLayer | OneBlockLayer]:
    """Returns one of ours for each layer of the model, with one policy each.

    Raises ValueError for models that `why_not_fused` refuses as unknown; other refused models must not come here.
    """
    family = family_of(causal)
    if family is None:
        raise ValueError(f"{type(causal).__name__} is not one of the families that the kernels know")

    shared = _Builder(
        family=family, config=causal.config, dtype=dtype, keep_dequantized=keep_dequantized,
        host=HostMemory(), batches=BatchesOfPass(),
    )  # fmt: skip
    sizes = layer_sizes(causal.config, family) or (None,) * len(policies)
    return [
        shared.of_sizes(sizes[index]).layer(index, layer, policy)
        for index, (layer, policy) in enumerate(zip(causal.model.layers, policies, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class _Builder(MlpBuilder):
    """Settings that all layers of a model share."""

    host: HostMemory
    batches: BatchesOfPass
    sizes: LayerSizes | None = None
    """Sizes of the layer that is built, if they differ from others'."""

    def of_sizes(self, sizes: LayerSizes | None) -> "_Builder":
        """The same for layers of these sizes, whose row may lack what others have."""
        return replace(self, family=row_of_layer(self.family, sizes), sizes=sizes)

    def layer(self, index: int, layer: Any, policy: ActivationPolicy) -> DecoderLayer | OneBlockLayer:
        """Builds one layer."""
        if self.family.block is not None:
            is_second = self.family.block in ("mlp", "experts")
            block = self.second_block(layer) if is_second else self._first_block(index, layer)
            assert not isinstance(block, MlpBesideExperts)  # such a row is refused
            return OneBlockLayer(index, block, policy, self.host)
        return DecoderLayer(
            index=index,
            mixer=self._first_block(index, layer),
            mlp=self.second_block(layer),
            policy=policy,
            host=self.host,
            parallel=self.family.parallel,
            third=self.third_block(layer, self.family.layer_input) if self.family.layer_input else None,
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
        attention, config, family = getattr(layer, self.family.attention_name), self.config, self.family
        window = self._window(index, attention)
        # Gemma 3 has a field for a softcap, and no softcap.
        softcap = attention.attn_logit_softcapping if family.caps_scores else None
        sinks = attention.sinks.detach() if family.has_sinks else None

        return AttentionBlock(
            norm=self.norm_at(layer, family.pre_norms, 0),
            qkv=self.group(attention, family.attention_inputs),
            o=self.group(attention, (family.attention_output,)),
            post_norm=self.norm_at(layer, family.post_norms, 0),
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
        attention, config, family = getattr(layer, self.family.attention_name), self.config, self.family
        projections = [
            LatentProjection(self.norm(getattr(attention, norm)), self.group(attention, (wide,)))
            for norm, wide in zip(latent.norms, latent.widening, strict=True)
        ]

        # Keys and values are widened for each query head.
        heads = Heads(config.num_attention_heads, config.num_attention_heads, head_size(config), family.rope == "pairs")
        return LatentAttention(
            norm=self.norm_at(layer, family.pre_norms, 0),
            narrow=self.group(attention, family.attention_inputs),
            query=projections[0] if latent.has_query_latent else None,
            key_value=projections[-1],
            o=self.group(attention, (family.attention_output,)),
            heads=LatentHeads(heads, config.qk_rope_head_dim, config.v_head_dim),
            params=AttentionParams(attention.scaling),
        )

    def _mixer(self, layer: Any) -> ModuleMixer:
        family = self.family
        assert family.mixer is not None
        return ModuleMixer(
            norm=self.norm_at(layer, family.pre_norms, 0),
            module=getattr(layer, family.mixer.name),
            batches=self.batches,
            multiplier=residual_factor(self.config, family) * self.factors.mixer,
        )

    def _head_norm(self, attention: Any) -> HeadNorm | None:
        if not self.family.head_norms:
            return None

        # A layer that reuses keys norms q alone.
        norms = [self.norm(getattr(attention, name)) for name in self.family.head_norms]
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
