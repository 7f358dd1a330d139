"""Tiny mixtures whose experts are ours, in NF4, with adapters."""

from typing import Any

import torch

from finetune_kernels.experts.replacing import expert_modules, replace_experts
from finetune_kernels.experts.routers import keep_routers_in_fp32
from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_kernels.primitives.nf4_stack import Nf4Stack
from finetune_test_kernels.expert_adapters import adapt, draw_router_biases
from finetune_test_kernels.tensor_checks import DEVICE
from finetune_test_models.tiny_architectures import tiny_mixture


def quantized_mixture(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of four layers on the test's device with our experts in double-quantised NF4, and the factors of random
    adapters on them."""
    model = draw_router_biases(tiny_mixture(model_type)).requires_grad_(False).to(DEVICE, dtype)
    family = expert_family_of_type(model_type)
    assert family is not None
    for _, module in expert_modules(model):
        for name in family.weights:
            matrices = [each.T if family.is_transposed else each for each in getattr(module, name)]
            stack = Nf4Stack.of(matrices, double=True)
            parameter: Any = torch.nn.Parameter(stack.codes, requires_grad=False)
            parameter.nf4_stack = stack
            setattr(module, name, parameter)
    assert replace_experts(model) == keep_routers_in_fp32(model) >= 3
    return model, adapt(model, family)
