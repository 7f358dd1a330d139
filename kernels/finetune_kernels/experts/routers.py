"""Routers in fp32: a choice between experts that differ in the last bits of bfloat16 is not left to rounding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.planning.expert_families import expert_family_of_type


def keep_routers_in_fp32(causal: Any) -> int:
    """Makes the routers beside our experts compute in fp32, within autocast as well, and takes their gradients away;
    returns how many there are."""
    family = expert_family_of_type(causal.config.get_text_config().model_type)
    if family is None:
        return 0

    found = 0
    blocks = {path.rpartition(".")[0] for path, _ in stacked_experts(causal)}
    for block in blocks:
        for router in causal.get_submodule(block).children():
            if type(router).__name__ == (family.router_class if family.router else "Llama4Router"):
                router.float().requires_grad_(False)
                router.forward = partial(_in_fp32, router.forward)
                found += 1
    if found != len(blocks):
        raise RuntimeError(f"{len(blocks)} layers have experts, but {found} a {family.router_class}")
    return found


def router_paths(causal: Any) -> tuple[str, ...]:
    """Paths of the routers of a model whose experts the kernels know, replaced or not."""
    family = expert_family_of_type(causal.config.get_text_config().model_type)
    kind = None if family is None else family.router_class
    return tuple(path for path, module in causal.named_modules() if type(module).__name__ == kind)


def choose(router: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights [T, k] and the numbers [T, k] of the experts that each of `rows` [T, hidden] goes to.

    Routers return logits, weights and numbers; those of Granite in older versions of transformers the other way round.
    """
    first, weights, last = router(rows)
    return weights, first if last.is_floating_point() else last


def choose_backward(router: Any, rows: torch.Tensor, d_weights: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of `rows` [T, hidden] for that of their weights [T, k]. The router runs again, under
    autograd: it makes two small products, and from the same rows the same choice."""
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        weights, _ = choose(router, leaf)
    (gradient,) = torch.autograd.grad(weights, leaf, d_weights.to(weights.dtype))
    return gradient


def _in_fp32(forward: Callable[..., Any], states: torch.Tensor, *others: torch.Tensor | None, **options: Any) -> Any:
    # Autocast would take the product's inputs back to 16 bits.
    with torch.autocast(states.device.type, enabled=False):
        return forward(*(None if value is None else value.float() for value in (states, *others)), **options)
