"""The speed of training that follows from a plan, as a share of what the GPU's data sheet says. Pure.

    seconds a token = (4 P + attention + head + recomputed) / (EFFICIENCY x FLOP/s)        6 P with DoRA

P: parameters of the linears that a token meets, which stay frozen; DoRA computes their outputs twice. What weights that
stream from host memory are waited for comes on top, over a bus of 55 GB/s.

A mixture's products are as fast, but are the lesser part of its time. All experts are decoded in each pass; and a layer
has costs of its own, which are neither: launches, once a pass, and sorting, gathering and summing rows for each token.
Where activations are recomputed, forward runs again, which is a third of them.
"""

from dataclasses import dataclass, replace

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import MemoryPlan
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import H200
from finetune_kernels.planning.streamed_weights import waiting_seconds

EFFICIENCY = 0.5
"""Share of the data sheet's TFLOP/s that training reaches: 15,800 tokens/s with Llama 8B on an H200."""
BACKWARD = 2.5
"""Attention's matrix products in backward, over those in forward."""
EXPERT_DECODING = 8.8e11
"""Weights of experts decoded per second: 58 billion of Qwen3-30B-A3B in 66 ms on an H200."""
FORWARD = 1 / 3
"""Share of forward in a layer's own costs; backward has twice as many."""


@dataclass(frozen=True)
class MixtureCosts:
    """Seconds of a mixture's layer, forward and backward, that are neither products nor decoding."""

    layer: float
    """Once a pass, however many tokens it has."""
    token: float
    """For each token of a pass."""


MIXTURE: MixtureCosts | None = None
"""Costs on an H200; None, as they are not told apart yet: 4.5 ms a layer were measured with 2,048 tokens alone."""


def tokens_per_second(
    shape: ModelShape, plan: MemoryPlan, sizes: tuple[int, int], teraflops: float | None,
    mixture: MixtureCosts | None = MIXTURE,
) -> float | None:  # fmt: skip
    """Tokens per second of training; None if the GPU's TFLOP/s are not known, or for a mixture whose costs are not.
    `sizes`: tokens of a micro-batch, and of a sequence."""
    if teraflops is None or (shape.experts is not None and mixture is None):
        return None
    tokens, length = sizes

    # Floating-point operations for one token, forward and backward.
    linears = (6.0 if shape.magnitudes else 4.0) * shape.active_parameters
    attention = shape.layers * 2.0 * length * shape.heads * shape.head_size * (1 + BACKWARD)
    head = 4.0 * shape.hidden * shape.vocabulary
    recomputed = shape.recomputed_by(plan.policies)

    products = EFFICIENCY * teraflops * 1e12
    waited = plan.streamed_layers * waiting_seconds(shape, replace(H200, products=products), tokens, recomputed)
    beside = 0.0 if mixture is None else _seconds_beside(shape, plan, tokens, mixture)
    return 1 / ((linears + attention + head + recomputed) / products + (waited + beside) / tokens)


def _seconds_beside(shape: ModelShape, plan: MemoryPlan, tokens: int, costs: MixtureCosts) -> float:
    """Seconds of a pass that a mixture's layers take beside their products; 0 for another model."""
    if shape.experts is None:
        return 0.0
    again = sum(policy is not ActivationPolicy.SAVE_ALL for policy in plan.policies) / shape.layers
    layers = shape.mixture_layers * (1 + FORWARD * again)
    return layers * (costs.layer + costs.token * tokens) + shape.decoded_experts(plan.policies) / EXPERT_DECODING
