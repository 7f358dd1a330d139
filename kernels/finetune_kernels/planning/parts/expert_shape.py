"""The sizes of a mixture's experts that memory depends on, from its configuration. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.expert_families import expert_family_of_type

BYTES = 2
"""Bytes of one element in 16 bits."""
ROUTE_BYTES = 4 + 3 * 8
"""Bytes that a fused layer saves of where one token goes to one expert: its weight, and three numbers of rows."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts")
_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
_SHARED_EXPERTS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "num_shared_expert")
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of the experts of one layer."""

    experts: int
    chosen: int
    """Experts of one token."""
    hidden: int
    """Elements of an expert's input."""
    wide: int
    """Elements of an expert's gate."""
    shared: int
    """Elements of the shared experts' gate; 0 if there are none."""
    quantized: bool
    """True if the experts are in NF4 and decoded where they are used."""
    wide_inputs: int = 2
    """Projections that widen their input: gate and up, or up."""

    @property
    def saved_elements(self) -> int:
        """Elements of a token and layer that stay until backward: gate and up of its experts, and their input."""
        return self.chosen * self.wide_inputs * self.wide + self.hidden

    @property
    def fused_bytes(self) -> int:
        """Bytes of a token and layer that a fused layer saves of its experts: gate and up, and the way to them."""
        return self.chosen * (self.wide_inputs * self.wide * BYTES + ROUTE_BYTES)

    @property
    def gate_up_parameters(self) -> int:
        """Parameters of gate and up of all experts of a layer."""
        return self.experts * self.wide_inputs * self.wide * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of all experts of a layer."""
        return self.experts * (self.wide_inputs + 1) * self.wide * self.hidden

    @property
    def active_parameters(self) -> int:
        """Parameters of a token's experts in one layer."""
        return self.chosen * (self.wide_inputs + 1) * self.wide * self.hidden

    def decoded(self, policies: Sequence[ActivationPolicy], *, normed: bool) -> int:
        """Weights that layers with these policies decode in a pass: twice, and once more what backward makes again:
        gate and up, or everything if a norm behind the experts (`normed`) reads what they make."""
        if not self.quantized:
            return 0
        again = 0
        for policy in policies:
            if policy is not ActivationPolicy.SAVE_ALL:
                is_whole = normed and policy is not ActivationPolicy.RECOMPUTE_MLP
                again += self.parameters if is_whole else self.gate_up_parameters
        return 2 * len(policies) * self.parameters + again

    def working_bytes(self, tokens: int, *, keeps: bool = False) -> int:
        """Bytes that one layer's backward needs beside what is saved; `keeps`: all weights stay decoded meanwhile, for
        one tile of `tokens` after the other."""
        rows = tokens * self.chosen
        # gate and up, their gradient, an activation; rows going in, their gradient, the same by token
        elements = rows * ((2 * self.wide_inputs + 1) * self.wide + 3 * self.hidden)
        decoded = (self.parameters if keeps else self.gate_up_parameters) if self.quantized else 0
        return (elements + decoded) * BYTES


@dataclass(frozen=True)
class DenseLayers:
    """Layers of a mixture that have an MLP in place of experts."""

    layers: tuple[int, ...]
    """Indices, in order."""
    feed_forward: int
    """Elements of the MLP's gate."""


def expert_shape(config: Any, *, quantized: bool) -> ExpertShape | None:
    """The experts of a transformers text configuration; None if it has none."""
    experts = experts_a_layer(config)
    chosen, wide = (_first(config, names) for names in (_CHOSEN, _WIDTHS))
    if not experts or not chosen or not wide:
        return None
    # Gemma 4's MLP is beside the experts, not in their place.
    beside = config.intermediate_size if getattr(config, "enable_moe_block", False) else 0
    shared = beside or _first(config, _SHARED) or wide * _shared_experts(config)
    family = expert_family_of_type(config.model_type)
    gated = family is None or family.is_gated
    hidden = getattr(config, "moe_latent_size", None) or config.hidden_size
    return ExpertShape(experts, chosen, hidden, wide, shared, quantized, 1 + gated)


def chosen_experts(config: Any) -> int:
    """Experts that a token goes through; 0 if a configuration does not say."""
    return _first(config, _CHOSEN)


def experts_a_layer(config: Any) -> int:
    """Experts of a layer, shared ones left out; 0 if a configuration names none, or has no layer with them (Gemma 4,
    Nemotron H)."""
    if _has_one_block(config) and "moe" not in config.layer_types:
        return 0
    return _first(config, _EXPERTS) if getattr(config, "enable_moe_block", True) else 0


def dense_layers(config: Any) -> DenseLayers | None:
    """The layers of a mixture's configuration that have an MLP, or no experts; None if all have experts, or if there
    are none."""
    layers = tuple(index for index in range(config.num_hidden_layers) if _is_dense(config, index))
    width = getattr(config, "intermediate_size", None)
    return DenseLayers(layers, width) if layers and experts_a_layer(config) and isinstance(width, int) else None


def _is_dense(config: Any, index: int) -> bool:
    """True if a layer has no experts, by whichever fields its family says it with."""
    if _has_one_block(config):
        return bool(config.layer_types[index] != "moe")
    if kinds := getattr(config, "mlp_layer_types", None):
        return bool(kinds[index] == "dense")

    # The first layers; single layers, and all but every n-th (Qwen).
    alone, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    if index < _first(config, _FIRST_DENSE) or index in alone or (index + 1) % step:
        return True

    # All but every n-th between two (ERNIE).
    first, last = (getattr(config, f"moe_layer_{name}_index", index) for name in ("start", "end"))
    return not first <= index <= last or (index + 1) % getattr(config, "moe_layer_interval", 1) > 0


def _has_one_block(config: Any) -> bool:
    """True if each layer is what its type says: attention, Mamba, an MLP or experts."""
    return getattr(config, "model_type", None) == "nemotron_h"


def _shared_experts(config: Any) -> int:
    """Experts that all tokens share; Hunyuan always has one, and says so in published files only."""
    default = int(getattr(config, "model_type", None) == "hunyuan_v1_moe")
    return _first(config, _SHARED_EXPERTS) or default


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first of these fields that is a number, or a list of one for each layer (Hunyuan): the largest then."""
    values = (getattr(config, name, None) for name in names)
    numbers = (max(value) if isinstance(value, list) and value else value for value in values)
    return next((number for number in numbers if isinstance(number, int)), 0)
