"""Adapters on the experts of a mixture, beside those that peft puts on linear layers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils import transformers_weight_conversion

from finetune_api.spec.training import AdapterSpec
from finetune_kernels.experts.module import StackedExperts
from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.planning.parts.expert_shape import chosen_experts
from finetune_trainer.model.layer_weights import LayerWeight

log = logging.getLogger(__name__)


def named_experts(model: Any) -> list[Any]:
    """Our experts of a loaded model, if its files name them."""
    found: list[Any] = [module for _, module in stacked_experts(model)]
    return found if all(getattr(module, "stored_experts", None) is not None for module in found) else []


@contextmanager
def peft_without_experts(*, has_ours: bool) -> Iterator[None]:
    """While this lasts, peft takes targets by their names alone if the experts are ours.

    For mixtures peft 0.21 moves gate_proj, up_proj and down_proj to transformers' stacked parameters, also those of
    shared experts and dense layers; with our experts there are no such parameters.
    """
    convert = transformers_weight_conversion.convert_peft_config_for_transformers
    if has_ours:
        transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = convert


def add_expert_adapters(model: Any, spec: AdapterSpec) -> set[str]:
    """Adds the adapters that the job wants on experts; returns the names of the weights that got one."""
    rank, names = spec.rank_of_experts(chosen_experts(model.config.get_text_config())), set()
    for path, experts in stacked_experts(model):
        stored: Any = getattr(experts, "stored_experts", None)
        parts = stored.wanted(spec.target_modules) if stored else ()
        experts.add_adapters(list(parts), rank, spec.scale(rank))
        names |= {f"{path}.{part}" for part in parts}

    if names:
        log.info("adapters on experts have rank %d, the others rank %d", rank, spec.rank)
    if names and spec.dropout:
        log.warning("spec.adapter.dropout: adapters on experts train without dropout, the others with %s", spec.dropout)
    return names


def expert_rank(model: Any) -> int | None:
    """The rank of the adapters on experts; None if they have none."""
    return next((lora.rank for lora in _loras(model)), None)


def zeros_when_published(model: Any, rank: int) -> int:
    """Zeros with which adapters on experts are filled up to `rank` in the adapter's file."""
    return sum(factor.numel() // lora.rank * (rank - lora.rank) for lora in _loras(model) for factor in lora.factors)


def _loras(model: Any) -> list[Any]:
    return [lora for _, experts in stacked_experts(model) for lora in experts.adapters.values()]


def expert_weights(model: Any) -> list[LayerWeight]:
    """The weights of our experts of a loaded model, one for each part that can have an adapter."""
    return [weight for path, experts in stacked_experts(model) for weight in _weights_of(path, experts)]


def _weights_of(path: str, experts: StackedExperts) -> Iterator[LayerWeight]:
    stored: Any = getattr(experts, "stored_experts", None)
    parts = stored.parts if stored else ("gate_up", "down")
    for part in parts:
        weight = experts.down if part == "down" else experts.gate_up
        count, rows, columns = weight.shape
        rows = rows // 2 if part in ("gate", "up") and experts.activation.is_gated else rows
        yield LayerWeight(
            f"{path}.{part}", count * rows * columns, (count, rows, columns), is_linear=False, is_stacked=False,
            is_quantized=weight.is_quantized, expert_part=part,
        )  # fmt: skip
