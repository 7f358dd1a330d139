"""The sizes of a mixture's experts that memory depends on, from its configuration. Pure."""

from dataclasses import dataclass
from typing import Any

BYTES = 2
"""Bytes of one element in 16 bits."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k")
_WIDTHS = ("moe_intermediate_size", "intermediate_size")


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

    def working_bytes(self, tokens: int) -> int:
        """Bytes that one layer's backward needs beside what is saved."""
        rows = tokens * self.chosen
        # gate and up, their gradient, an activation; rows going in, their gradient, the same by token
        elements = rows * (5 * self.wide + 3 * self.hidden)
        decoded = self.experts * 2 * self.wide * self.hidden if self.quantized else 0
        return (elements + decoded) * BYTES


def expert_shape(config: Any, *, quantized: bool) -> ExpertShape | None:
    """The experts of a transformers text configuration; None if it has none."""
    experts, chosen, wide = (_first(config, names) for names in (_EXPERTS, _CHOSEN, _WIDTHS))
    if not experts or not chosen or not wide:
        return None
    shared = getattr(config, "shared_expert_intermediate_size", None)
    shared = shared if isinstance(shared, int) else wide * (getattr(config, "n_shared_experts", None) or 0)
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
