"""Puts our module in place of the experts of a loaded transformers model, or says why not.

Only families with a row are replaced, and only modules that fit their row: shapes, layout, biases and the function
between the products are compared, never guessed.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from transformers.integrations.moe import _default_apply_gate

from finetune_kernels.experts.module import StackedExperts
from finetune_kernels.experts.stacked_weight import StackedWeight
from finetune_kernels.ops.expert_mlp import Activation
from finetune_kernels.planning.expert_families import EXPERT_FAMILIES, ExpertFamily, expert_family_of_type
from finetune_kernels.planning.fused_support import ACTIVATIONS

WEIGHTS = frozenset(name for family in EXPERT_FAMILIES for name in family.weights)
"""Parameters of experts that are matrices, in whatever family."""
_FLAGS = {"is_concatenated": True, "is_transposed": False, "has_bias": False}


def why_not_replaced(causal: Any) -> str | None:
    """Returns why the experts of this model stay as they are; None if they can be replaced, or if it has none."""
    modules = list(expert_modules(causal))
    if not modules:
        return None

    config = causal.config.get_text_config()
    family = expert_family_of_type(config.model_type)
    if family is None:
        return f"the kernels do not know the experts of {config.model_type}"
    return next((reason for _, module in modules if (reason := _why_not(module, family, config))), None)


def replace_experts(causal: Any) -> int:
    """Replaces all experts of a model for which `why_not_replaced` is None; returns the number of layers."""
    config = causal.config.get_text_config()
    family, count = expert_family_of_type(config.model_type), 0
    if family is None:
        return 0

    for path, module in list(expert_modules(causal)):
        parent = causal.get_submodule(path.rpartition(".")[0])
        gate_up, down = (
            StackedWeight.of_parameter(
                getattr(module, name), getattr(module, f"{name}_bias", None), is_transposed=family.is_transposed
            )
            for name in family.weights
        )

        experts = StackedExperts(gate_up, down, _activation(module, family, config), scales_input=family.scales_input)
        setattr(parent, path.rpartition(".")[2], experts)
        if family.scales_input:
            parent.forward = partial(_scaled_input_block, parent)
        count += 1
    return count


def expert_modules(causal: Any) -> Iterator[tuple[str, Any]]:
    """transformers' modules of stacked experts, with their paths."""
    for path, module in causal.named_modules():
        parameters = module.parameters(recurse=False)
        # Codes of quantised experts are two-dimensional.
        if path.endswith("experts") and any(each.ndim == 3 or hasattr(each, "nf4_stack") for each in parameters):
            yield path, module


def stacked_experts(model: Any) -> list[tuple[str, StackedExperts]]:
    """Our modules in a model, with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, StackedExperts)]


def _why_not(module: Any, family: ExpertFamily, config: Any) -> str | None:
    kind = type(module).__name__
    if kind != family.experts:
        return f"experts are {kind}, not {family.experts}"

    expected = _FLAGS | {
        "is_concatenated": not family.is_interleaved, "is_transposed": family.is_transposed,
        "has_bias": family.has_bias, "has_gate": family.is_gated, "has_post_expert_norm": False,
    }  # fmt: skip
    # Llama 4's are no module of transformers' common make, and have no flags.
    if not family.scales_input:
        for flag, value in expected.items():
            if bool(getattr(module, flag, None)) is not value:
                return f"{flag} of {kind} is {getattr(module, flag, None)}, not {value}"

    if family.activation != "clamped":
        name, known = _activation_name(family, config), _known_activations(family)
        if name not in known:
            return f"activation {name}, not {' or '.join(known)}"
        if family.is_gated and not family.scales_input and type(module)._apply_gate is not _default_apply_gate:
            return f"{kind} has a gate of its own"

    names = {name for name, _ in module.named_parameters(recurse=False)}
    wanted = set(family.weights) | ({f"{name}_bias" for name in family.weights} if family.has_bias else set())
    return None if names == wanted else f"{kind} has the parameters {', '.join(sorted(names))}"


def _activation(module: Any, family: ExpertFamily, config: Any) -> Activation:
    if family.activation == "clamped":
        return Activation("clamped", family.is_interleaved, float(module.alpha), float(module.limit))
    return Activation(_known_activations(family)[_activation_name(family, config)], family.is_interleaved)


def _known_activations(family: ExpertFamily) -> Mapping[str, Literal["silu", "gelu_tanh", "relu2"]]:
    """transformers' names of the activations that the kernels know in such experts -> ours."""
    return ACTIVATIONS if family.is_gated else {"relu2": "relu2"}


def _activation_name(family: ExpertFamily, config: Any) -> str:
    return str(getattr(config, family.activation_field) if family.activation_field else family.activation)


def _scaled_input_block(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama 4's block, [..., H] -> [T, H] and the router's logits, with the chosen experts only: transformers gives
    every token to every expert, with zeros in place of it where the expert was not chosen."""
    rows = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(rows)
    weights, index = torch.topk(scores, block.top_k, dim=1)
    return block.shared_expert(rows) + block.experts(rows, index, weights), logits
