"""The sizes of a mixture's experts that memory depends on, from its configuration. Pure."""

from dataclasses import dataclass
from typing import Any

BYTES = 2
"""Bytes of one element in 16 bits."""
ROUTE_BYTES = 4 + 3 * 8
"""Bytes that a fused layer saves of where one token goes to one expert: its weight, and three numbers of rows."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k")
_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size")


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of the experts of one layer."""

    experts: int
    chosen: int
    """Experts of one token."""
    hidden: int
    wide: int
    """Elements of an expert's gate."""
    shared: int
    """Elements of the shared experts' gate; 0 if there are none."""
    quantized: bool
    """True if the experts are in NF4 and decoded where they are used."""

    @property
    def saved_elements(self) -> int:
        """Elements of a token and layer that stay until backward: gate and up of its experts, and their input."""
        return self.chosen * 2 * self.wide + self.hidden

    @property
    def fused_bytes(self) -> int:
        """Bytes of a token and layer that a fused layer saves of its experts: gate and up, and the way to them."""
        return self.chosen * (2 * self.wide * BYTES + ROUTE_BYTES)

    @property
    def gate_up_parameters(self) -> int:
        """Parameters of gate and up of all experts of a layer."""
        return self.experts * 2 * self.wide * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of all experts of a layer."""
        return self.experts * 3 * self.wide * self.hidden

    @property
    def active_parameters(self) -> int:
        """Parameters of a token's experts in one layer."""
        return self.chosen * 3 * self.wide * self.hidden

    def working_bytes(self, tokens: int) -> int:
        """Bytes that one layer's backward needs beside what is saved."""
        rows = tokens * self.chosen
        # gate and up, their gradient, an activation; rows going in, their gradient, the same by token
        elements = rows * (5 * self.wide + 3 * self.hidden)
        decoded = self.gate_up_parameters if self.quantized else 0
        return (elements + decoded) * BYTES


def expert_shape(config: Any, *, quantized: bool) -> ExpertShape | None:
    """The experts of a transformers text configuration; None if it has none."""
    experts, chosen, wide = (_first(config, names) for names in (_EXPERTS, _CHOSEN, _WIDTHS))
    if not experts or not chosen or not wide:
        return None
    shared = _first(config, _SHARED) or wide * (getattr(config, "n_shared_experts", None) or 0)
    return ExpertShape(experts, chosen, config.hidden_size, wide, shared, quantized)


def chosen_experts(config: Any) -> int:
    """Experts that a token goes through; 0 if a configuration does not say."""
    return _first(config, _CHOSEN)


def has_experts(config: Any) -> bool:
    """True if a configuration names a number of experts."""
    return _first(config, _EXPERTS) > 0


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first of these fields that is a number."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)
