"""Random adapters on a model's experts: ours, and the same added by hand to the weights of transformers' own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.func import functional_call

from finetune_kernels.experts.replacing import expert_modules, stacked_experts
from finetune_kernels.planning.expert_families import ExpertFamily
from finetune_test_kernels.tensor_checks import normal

RANK, SCALE = 4, 2.0


def parts_of(family: ExpertFamily) -> list[str]:
    """The parts of the family's experts that get an adapter."""
    if family.is_interleaved:
        return ["gate_up", "down"]
    return ["gate", "up", "down"] if family.is_gated else ["up", "down"]


def adapt(model: Any, family: ExpertFamily) -> dict[str, torch.Tensor]:
    """Adds our adapters with random factors; returns these by their names."""
    for _, experts in stacked_experts(model):
        experts.add_adapters(parts_of(family), RANK, SCALE)
    found = {name: value for name, value in model.named_parameters() if ".adapters." in name}
    for number, value in enumerate(found.values()):
        value.data = normal(*value.shape, seed=number, dtype=value.dtype, device=str(value.device)) / 8
    return found


def draw_router_biases(model: Any) -> Any:
    """Returns the model, with random numbers for what routers add to the scores by which they choose."""
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("score_correction_bias", "expert_bias")):  # which begin at zero
            value.data = normal(*value.shape, seed=7, device=str(value.device)) / 4
    return model


def by_hand(
    model: Any, factors: Mapping[str, torch.Tensor], family: ExpertFamily, inputs: dict[str, Any]
) -> torch.Tensor:
    """Logits of transformers' own model, whose experts' weights are W + s B A, for its `inputs`."""
    changed = {}
    for path, module in expert_modules(model):
        for weight in family.weights:
            whole = getattr(module, weight).detach()
            whole = whole.transpose(1, 2) if family.is_transposed else whole
            for part in parts_of(family):
                if (part == "down") != (weight == "down_proj"):
                    continue
                a, b = (factors[f"{path}.adapters.{part}.lora_{side}.default.weight"] for side in "AB")
                change = SCALE * b @ a
                if part in ("gate", "up") and family.is_gated:
                    nothing = torch.zeros_like(change)
                    change = torch.cat([change, nothing] if part == "gate" else [nothing, change], dim=1)
                assert change.shape == whole.shape
                whole = whole + change.to(whole.dtype)
            changed[f"{path}.{weight}"] = whole.transpose(1, 2) if family.is_transposed else whole
    logits: torch.Tensor = functional_call(model, changed, (), inputs).logits
    return logits
