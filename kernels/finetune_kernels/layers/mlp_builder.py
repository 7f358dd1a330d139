"""Builds what stands behind attention in a `DecoderLayer`: the MLP or experts, and the third block; and the groups of
linear layers and the norms that all blocks are made of."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.blocks.layer_input_block import LayerInputBlock
from finetune_kernels.layers.blocks.mixture_block import MixtureBlock
from finetune_kernels.layers.blocks.mlp_beside_experts import MlpBesideExperts
from finetune_kernels.layers.blocks.mlp_block import MlpBlock
from finetune_kernels.layers.layer_check import has_mixture
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.ops.plain_activation import PlainKind
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.family_parts import BranchNorms, LayerInput, Mixture
from finetune_kernels.planning.fused_support import (
    ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    BlockFactors,
    activation_name,
    block_factors,
    residual_factor,
)

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "dense",
    "fc1", "fc2", "c_fc", "c_proj", "input_linear", "output_linear", "w1", "w3", "w2", "out_proj", "shared_expert_gate",
    "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "per_layer_input_gate", "per_layer_projection",
)  # fmt: skip
"""Linear layers of a decoder layer. A linear's index here is also the stream of its dropout mask."""


@dataclass(frozen=True, kw_only=True)
class MlpBuilder:
    """Settings that all layers of a model share, as far as every block needs them."""

    family: Family
    config: Any
    dtype: torch.dtype
    keep_dequantized: bool

    def second_block(self, layer: Any) -> MlpBlock | MixtureBlock | MlpBesideExperts:
        """Builds the MLP, the mixture or both, with the layer's norms."""
        family, mixture = self.family, self.family.mixture
        # In a parallel layer it is the attention's.
        norm = self.norm_at(layer, family.pre_norms, -1)
        multiplier = residual_factor(self.config, family) * self.factors.mlp
        if mixture is None or not has_mixture(layer, family):
            block = self._mlp(getattr(layer, family.mlp_name))
            return replace(block, norm=norm, post_norm=self.norm_at(layer, family.post_norms, 1), multiplier=multiplier)
        if mixture.branch_norms is None:
            return replace(self._mixture(layer, mixture), norm=norm, multiplier=multiplier)
        return self._mlp_beside_experts(layer, norm, mixture, mixture.branch_norms)

    def _mlp(self, mlp: Any) -> MlpBlock:
        """The MLP without the layer's norms and factor."""
        family = self.family
        return MlpBlock(
            norm=None,
            gate_up=self.group(mlp, family.mlp_inputs, (self.factors.gate, 1.0)[: len(family.mlp_inputs)]),
            down=self.group(mlp, (family.mlp_output,)),
            post_norm=None,
            activation=self._activation(mlp),
        )

    def third_block(self, layer: Any, third: LayerInput) -> LayerInputBlock:
        """Builds the block that reads the layer's own input."""
        return LayerInputBlock(
            gate=self.group(layer, (third.gate,)),
            projection=self.group(layer, (third.projection,)),
            post_norm=self.norm(getattr(layer, third.norm)),
            activation=ACTIVATIONS[str(activation_name(self.config, self.family))],
        )

    def _mixture(self, layer: Any, mixture: Mixture) -> MixtureBlock:
        """Experts, router and what all tokens share, without the layer's norm and factor."""
        parent, _, gate = (mixture.shared_gate or "").rpartition(".")
        return MixtureBlock(
            norm=None,
            router=self._router(layer, mixture),
            experts=layer.get_submodule(mixture.experts),
            shared=self._mlp(layer.get_submodule(mixture.shared)) if mixture.shared else None,
            shared_gate=self.group(layer.get_submodule(parent), (gate,)) if gate else None,
        )

    def _mlp_beside_experts(
        self, layer: Any, norm: Norm | None, mixture: Mixture, norms: BranchNorms
    ) -> MlpBesideExperts:
        """`norm`: the MLP's own."""
        after_mlp, before_experts, after_experts = (self.norm(getattr(layer, name)) for name in norms)
        post_norm = self.norm_at(layer, self.family.post_norms, 1)
        assert post_norm is not None
        return MlpBesideExperts(
            mlp=replace(self._mlp(getattr(layer, self.family.mlp_name)), norm=norm, post_norm=after_mlp),
            router=self._router(layer, mixture),
            experts=layer.get_submodule(mixture.experts),
            expert_norm=before_experts,
            expert_post_norm=after_experts,
            post_norm=post_norm,
        )

    def _router(self, layer: Any, mixture: Mixture) -> Callable[[torch.Tensor], Any]:
        """transformers' router; with the buffer of its block that it takes, if there is one."""
        router, experts = layer.get_submodule(mixture.router), expert_family_of_type(self.family.model_type)
        block = layer.get_submodule(mixture.block)
        name = None if experts is None else experts.block_bias
        bias = None if name is None else getattr(block, name, None)
        return router if bias is None else partial(router, **{str(name): bias})

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

    @property
    def factors(self) -> BlockFactors:
        """The factors of a layer's blocks."""
        return block_factors(self.config, self.family)

    def group(self, parent: Any, names: tuple[str, ...], factors: tuple[float, ...] = ()) -> LinearGroup:
        """Builds the group of these linear layers of `parent`, each with its factor."""
        # A stream for each projection, so that no two dropout masks of a layer are alike.
        linears, stream = [getattr(parent, name) for name in names], PROJECTIONS.index(names[0])
        return LinearGroup(
            linears, self.dtype, keep_dequantized=self.keep_dequantized, philox_stream=stream, factors=factors
        )

    def norm_at(self, layer: Any, names: tuple[str, ...], index: int) -> Norm | None:
        """Reads the norm of that index; None for a family without norms in this place."""
        return self.norm(attrgetter(names[index])(layer)) if names else None

    def norm(self, module: Any) -> Norm:
        """Reads a norm, with the family's offset in its weight."""
        weight, offset, bias = module.weight.detach(), self.family.norm_offset, getattr(module, "bias", None)
        weight = weight.float() + offset if offset else weight
        centered = self.family.norm_kind != "rms"
        return Norm(weight, norm_eps(module), centered=centered, bias=None if bias is None else bias.detach())


def norm_eps(module: Any) -> float:
    """The number that is added to the mean square; Gemma's norms have their own name for it."""
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
