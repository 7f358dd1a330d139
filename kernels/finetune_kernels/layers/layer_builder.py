"""Builds the `DecoderLayer`s of a transformers model, or says why it cannot.

Only models of a `Family` are built. The family's row says which modules a layer has, and `why_not_fused` compares each
layer with it, so that what it lets through can be built: a module that is missing, of another class, or that the row
does not name is a reason, never a guess. Sizes, scales and windows are read from the modules and the configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from finetune_kernels.layers.attention_block import AttentionBlock
from finetune_kernels.layers.decoder_layer import DecoderLayer
from finetune_kernels.layers.host_memory import HostMemory
from finetune_kernels.layers.linear_group import LinearGroup
from finetune_kernels.layers.mlp_block import MlpBlock
from finetune_kernels.layers.module_mixer import ModuleMixer, ParallelMixers
from finetune_kernels.layers.patching import has_dora, why_not_adapter
from finetune_kernels.mixers.documents import BatchesOfPass
from finetune_kernels.ops.gated_activation import Activation
from finetune_kernels.ops.plain_activation import PlainKind
from finetune_kernels.ops.rms_norm import Norm
from finetune_kernels.ops.rotary_embedding import Heads
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.fused_support import (
    ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    BlockFactors,
    activation_name,
    block_factors,
    head_size,
    residual_factor,
    why_not_config,
)
from finetune_kernels.primitives.attention_inputs import AttentionParams
from finetune_kernels.primitives.head_norm import HeadNorm

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "dense",
    "fc1", "fc2", "c_fc", "c_proj", "input_linear", "output_linear", "w1", "w3", "w2", "out_proj",
)  # fmt: skip
"""Linear layers of a decoder layer. A linear's index here is also the stream of its dropout mask."""


def why_not_fused(causal: Any) -> str | None:
    """Returns why the layers of this transformers model cannot be built; None if they can."""
    config, family = causal.config, family_of(causal)
    if (reason := why_not_config(config, family)) is not None or family is None:
        return reason
    reasons = (_why_not_layer(layer, family) or _why_not_sizes(layer, family, config) for layer in causal.model.layers)
    return next((reason for reason in reasons if reason is not None), None)


def _has_mixer(layer: Any, family: Family) -> bool:
    """True if a layer has the family's other mixer in attention's place."""
    return family.mixer is not None and getattr(layer, family.mixer.name, None) is not None


def _why_not_layer(layer: Any, family: Family) -> str | None:
    """Compares one layer with its family's row."""
    modules, has_mixer = dict(layer.named_modules()), _has_mixer(layer, family)
    expected = family.modules_beside_mixer() if has_mixer else family.modules()

    # Every module that the builder will ask for.
    for name, kind in expected.items():
        if name not in modules:
            return f"{type(layer).__name__} has no {name}"
        if kind is not None and type(modules[name]).__name__ != kind:
            return f"{name} is {type(modules[name]).__name__}, not {kind}"
    if reason := _unknown_module(modules, family, own=family.mixer.name if has_mixer and family.mixer else None):
        return reason

    # Only the adapters may train.
    if any(modules[name].weight.requires_grad for name in expected if name in family.norms):
        return "norm weights that train"
    has_factors = "mlp_multipliers" in family.factors
    for name in (name for name, kind in expected.items() if kind is None):
        projection = modules[name]
        if has_factors and hasattr(projection, "lora_A") and has_dora(projection):
            return "DoRA beside factors"
        reason = why_not_adapter(projection) if hasattr(projection, "lora_A") else _why_not_plain(projection)
        if reason is not None:
            return reason
    return None


def _why_not_sizes(layer: Any, family: Family, config: Any) -> str | None:
    """Compares the sizes of one layer with the configuration: each layer with attention has the same heads."""
    if getattr(layer, "self_attn", None) is None:
        return None

    size, attention = head_size(config), layer.self_attn
    query, key = config.num_attention_heads * size, config.num_key_value_heads * size
    wanted_outputs = (2 if family.gates_heads else 1) * query + 2 * key
    found = sum(getattr(attention, name).out_features for name in family.attention_inputs)
    if found != wanted_outputs:
        return f"{found} outputs for q, k and v, not {wanted_outputs} as the configuration says"

    wanted = (query, key) if family.head_norm_place == "row" else (size, size)
    for name, width in zip(family.head_norms, wanted, strict=False):
        if (found := getattr(attention, name).weight.numel()) != width:
            return f"self_attn.{name} has {found} weights, not {width}"
    return None


def _unknown_module(modules: dict[str, Any], family: Family, own: str | None) -> str | None:
    """Returns a module with numbers of its own that the row does not name, or that drops activations; None if there is
    none. `own`: the mixer that transformers runs itself."""
    named = (*family.norms, *family.linears)
    parts = tuple(f"{name}." for name in (*family.linears, *((own,) if own else ())))
    for name, module in modules.items():
        # Parts of linear layers are peft's, those of the mixer transformers'.
        if name in named or name == own or name.startswith(parts):
            continue

        place = name or type(module).__name__
        if isinstance(module, nn.Dropout) and module.p:
            return f"{place} drops activations of the base model"
        values = [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]
        if values and name != f"{family.mlp_name}.act_fn":
            what = "norm" if "Norm" in type(module).__name__ else "module"
            return f"{place} is a {what} that other {family.prefix} models do not have"
    return None


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

    builder = _Builder(family, causal.config, dtype, HostMemory(), BatchesOfPass(), keep_dequantized)
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
    batches: BatchesOfPass
    keep_dequantized: bool

    def layer(self, index: int, layer: Any, policy: ActivationPolicy) -> DecoderLayer:
        """Builds one layer."""
        return DecoderLayer(
            index=index,
            mixer=self._first_block(index, layer),
            mlp=self._mlp(layer),
            policy=policy,
            host=self.host,
            parallel=self.family.parallel,
        )

    def _first_block(self, index: int, layer: Any) -> AttentionBlock | ModuleMixer | ParallelMixers:
        family = self.family
        if family.mixer is None or not _has_mixer(layer, family):
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

        return AttentionBlock(
            norm=self._norm_at(layer, family.pre_norms, 0),
            qkv=self._group(attention, family.attention_inputs),
            o=self._group(attention, (family.attention_output,)),
            post_norm=self._norm_at(layer, family.post_norms, 0),
            heads=Heads(
                config.num_attention_heads, config.num_key_value_heads, head_size(config), family.rope != "halves"
            ),
            head_norm=self._head_norm(attention),
            params=AttentionParams(attention.scaling * self.factors.scores, window, softcap),
            rotates=self._rotates(attention, window),
            multiplier=residual_factor(config, family) * self.factors.attention,
            gates_heads=family.gates_heads,
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

    def _mlp(self, layer: Any) -> MlpBlock:
        family = self.family
        mlp = getattr(layer, family.mlp_name)
        return MlpBlock(
            # In a parallel layer it is the attention's.
            norm=self._norm_at(layer, family.pre_norms, -1),
            gate_up=self._group(mlp, family.mlp_inputs, (self.factors.gate, 1.0)[: len(family.mlp_inputs)]),
            down=self._group(mlp, (family.mlp_output,)),
            post_norm=self._norm_at(layer, family.post_norms, 1),
            activation=self._activation(mlp),
            multiplier=residual_factor(self.config, family) * self.factors.mlp,
        )

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

        query, key = (self._norm(getattr(attention, name)) for name in self.family.head_norms)
        return HeadNorm(query.weight, key.weight, query.eps, self.family.head_norm_place)

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
