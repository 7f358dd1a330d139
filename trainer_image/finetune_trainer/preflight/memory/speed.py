"""The speed of training that follows from a plan, as a share of what the GPU's data sheet says. Pure.

    seconds a token = (4 P + attention + head + recomputed) / (EFFICIENCY x FLOP/s)        6 P with DoRA

P: parameters of the linears that a token meets, which stay frozen; DoRA computes their outputs twice. What weights that
stream from host memory are waited for comes on top, over a bus of 55 GB/s.

A mixture's products are as fast, but all experts are decoded in each pass, and rows are sorted, gathered and summed for
each token. With few tokens the GPU waits for the host, which launches two hundred small operations a layer: the slower
of the two decides, unless layers can be launched as graphs. Where activations are recomputed, forward runs again, which
is a third of a layer. Linear attention by fla's kernels takes a time of its own for each token beside its products.
"""

from dataclasses import replace

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.memory_plan import MARGIN, MemoryPlan
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import H200
from finetune_kernels.planning.streamed_weights import waiting_seconds

EFFICIENCY = 0.5
"""Share of the data sheet's TFLOP/s that training reaches: 15,800 tokens/s with Llama 8B on an H200."""
BACKWARD = 2.5
"""Attention's matrix products in backward, over those in forward."""
EXPERT_DECODING = 1.4e12
"""Weights of experts decoded per second, on an H200."""
MIXTURE_LAUNCHES = 7.6e-3
"""Seconds in which a host launches a mixture's layer, forward and backward: on an H200's host 363 ms for 48 layers of
Qwen3-30B-A3B, and 184 ms for 24 of gpt-oss-20b. Hosts differ by a tenth and more."""
MIXTURE_RECORDED = 1.3
"""Time of a mixture's pass that is launched as graphs, over what its products allow. With so few tokens that a host
would be the slower one, experts have too few rows for the GPU: on an H200, with 2,048 tokens, 1.17 in Qwen3-30B-A3B and
1.48 in gpt-oss-20b."""
MIXTURE_TOKEN = 0.5e-6
"""Seconds that a mixture's layer takes for each token beside products and decoding, on an H200: four sequences of 2,048
tokens take 450 ms in Qwen3-30B-A3B."""
LINEAR_ATTENTION_TOKEN = 0.73e-6
"""Seconds that linear attention by fla's kernels takes for each token and layer beside its products, on an H200:
12,100 tokens/s with Qwen 3.5 9B, where the products alone would allow 15,300."""
FORWARD = 1 / 3
"""Share of forward in a layer's own costs; backward has twice as many."""


def why_unknown(shape: ModelShape, teraflops: float | None) -> str | None:
    """Says why no speed can be told, for people; None if one can."""
    if teraflops is None:
        return "spec.resources names no GPU whose speed is known (nodeSelector nvidia.com/gpu.product)"
    if shape.mixers is not None and (not shape.mixers.graph_bytes or shape.experts is not None):
        return (
            "of models that have other layers than attention, only those with linear attention by fla-core's kernels "
            "and without experts have had their speed measured"
        )
    return None


def tokens_per_second(
    shape: ModelShape, plan: MemoryPlan, sizes: tuple[int, int], teraflops: float | None
) -> float | None:
    """Tokens per second of training; None if they are not known (`why_unknown`). `sizes`: tokens of a micro-batch, and
    of a sequence."""
    if teraflops is None or why_unknown(shape, teraflops) is not None:
        return None
    tokens, length = sizes

    # Floating-point operations for one token, forward and backward.
    linears = (6.0 if shape.magnitudes else 4.0) * shape.active_parameters
    attentive = shape.layers - (0 if shape.mixers is None else shape.mixers.without_attention)
    elements = sum(layer.head_size for layer in shape.sizes) or attentive * shape.head_size
    attention = 2.0 * length * shape.heads * elements * (1 + BACKWARD)
    head = 4.0 * shape.hidden * shape.vocabulary
    recomputed = shape.recomputed_by(plan.policies)

    # Seconds of a pass.
    products = EFFICIENCY * teraflops * 1e12
    busy = tokens * (linears + attention + head + recomputed) / products
    busy += plan.streamed_layers * waiting_seconds(shape, replace(H200, products=products), tokens, recomputed)
    if shape.mixers is not None:
        busy += len(shape.mixers.layers) * LINEAR_ATTENTION_TOKEN * tokens
    if shape.experts is not None:
        busy = _with_experts(busy, shape, plan, tokens)
    return tokens / busy


def _with_experts(busy: float, shape: ModelShape, plan: MemoryPlan, tokens: int) -> float:
    """Seconds of a mixture's pass, whose products and waiting take `busy`."""
    again = sum(policy is not ActivationPolicy.SAVE_ALL for policy in plan.policies) / shape.layers
    layers = shape.mixture_layers * (1 + FORWARD * again)
    busy += layers * MIXTURE_TOKEN * tokens + shape.decoded_experts(plan.policies) / EXPERT_DECODING

    launching = layers * MIXTURE_LAUNCHES
    if busy < launching and _can_be_recorded(shape, plan):
        return min(MIXTURE_RECORDED * busy, launching)
    return max(busy, launching)


def _can_be_recorded(shape: ModelShape, plan: MemoryPlan) -> bool:
    """True if layers can be launched as graphs: all is on the GPU, and memory has room for the activations of one more
    pass."""
    stays = not (plan.streamed_layers or shape.gathered_bytes or ActivationPolicy.OFFLOAD in plan.policies)
    again = plan.activation_bytes + plan.working_bytes
    return stays and not shape.dropout and plan.peak_bytes + again <= plan.budget_bytes / MARGIN
