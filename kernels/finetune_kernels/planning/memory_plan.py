"""Picks which activations each layer saves, and whether a 16-bit copy of the NF4 weights is kept, so that the predicted
peak fits the GPU at the least extra time.

Each choice has a price in milliseconds per micro-batch, from counted operations and rates measured on an H200: weights
that are not kept dequantised are dequantised twice; gate and up, or the whole layer, are recomputed if they are not
saved. The cheapest mixture that fits is taken. If none fits, the smallest is: it moves the vocabulary and the layers'
inputs to pinned host memory, as far as that has room; what has none stays on the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.model_shape import BYTES, ModelShape

MARGIN = 0.92
"""Share of the memory that a plan may use; the rest is for fragmentation and libraries' workspaces."""
GEMM_RATE = 7.0e14
"""FLOP/s of bf16 matrix products at these shapes (measured on an H200: 685-783 TFLOP/s)."""
UNLIMITED = 1 << 60
"""Bytes of a memory of which nothing is known."""
DEQUANTIZE_RATE = 4.0e12 / 2.5
"""Weights dequantised per second: half a byte read and two written each, at 4 TB/s."""


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen policies, and the bytes they were chosen by."""

    mode: MemoryMode
    policies: tuple[ActivationPolicy, ...]
    """One for each layer."""
    keep_dequantized: bool
    base_bytes: int
    """Bytes in use before: weights as loaded, adapters."""
    dequantized_bytes: int
    training_bytes: int
    activation_bytes: int
    working_bytes: int
    host_bytes: int
    """Bytes of embedding and head within `base_bytes`, which move to host memory."""
    budget_bytes: int
    input_bytes: int
    """Bytes of the layers' inputs that wait in host memory between forward and backward."""
    extra_milliseconds: float
    """Milliseconds per micro-batch over a plan that saves and keeps everything."""
    gathered_bytes: int = 0
    """Bytes of the layers that are gathered from the ranks at a time; 0 if each rank keeps all weights."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of allocated memory."""
        weights = self.base_bytes - self.host_bytes + self.dequantized_bytes + self.gathered_bytes
        return weights + self.training_bytes + self.activation_bytes + self.working_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory that the plan pins; it cannot be swapped out."""
        return self.host_bytes + self.input_bytes

    @property
    def fits(self) -> bool:
        """True if the peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table for people: what, and how much."""
        gib = 2**30
        counts = {policy: self.policies.count(policy) for policy in ActivationPolicy if policy in self.policies}
        layers = ", ".join(f"{count} {policy.value}" for policy, count in counts.items())

        return [
            ("mode", self.mode.value),
            ("layers", layers),
            ("weights as loaded, adapters", f"{self.base_bytes / gib:.2f} GiB"),
            *([("layers gathered from the ranks", f"{self.gathered_bytes / gib:.2f} GiB")] * bool(self.gathered_bytes)),
            ("embedding and head, moved to the host", f"{-self.host_bytes / gib:.2f} GiB"),
            ("weights kept dequantised", f"{self.dequantized_bytes / gib:.2f} GiB"),
            ("gradients, optimiser, copies", f"{self.training_bytes / gib:.2f} GiB"),
            ("activations", f"{self.activation_bytes / gib:.2f} GiB"),
            ("one layer's work, or the loss", f"{self.working_bytes / gib:.2f} GiB"),
            ("pinned in host memory", f"{self.pinned_bytes / gib:.2f} GiB"),
            ("predicted peak", f"{self.peak_bytes / gib:.2f} GiB of {self.budget_bytes / gib:.2f} planned for"),
            ("recomputing and dequantising", f"{self.extra_milliseconds:.0f} ms per micro-batch"),
        ]


def plan_unfused_layers(
    shape: ModelShape, tokens: int, *, base_bytes: int, total_bytes: int, length: int | None = None
) -> tuple[bool, bool]:
    """Returns whether activations are saved and whether weights are kept dequantised, for layers that run module by
    module; other parameters as in `unfused_bytes`."""
    dequantized = shape.linear_parameters * BYTES if shape.quantized else 0

    # From fast to slow: recomputing a layer takes longer than dequantising its weights. Of a sharded base no rank keeps
    # them dequantised.
    for save, keep in ((True, True), (True, False), (False, True)):
        need = base_bytes + (dequantized if keep else 0) + unfused_bytes(shape, tokens, saves=save, length=length)
        if need <= MARGIN * total_bytes and not (keep and shape.gathered_bytes):
            return save, keep
    return False, False


def unfused_bytes(shape: ModelShape, tokens: int, *, saves: bool, length: int | None = None) -> int:
    """Bytes beside the weights for layers that run module by module; `saves`: activations are not recomputed; `length`:
    tokens of a row (None: all in one).

    Autograd saves more there: copies of the residual stream, of q around RoPE, and of gate, up and their product, and
    once the scores of plain attention, of which two more copies exist while it works.
    """
    # Elements a token of one layer.
    width = 8 * shape.hidden + 6 * shape.key_value_heads * shape.head_size + 3 * shape.feed_forward
    working = shape.working_bytes(tokens, tiled=False)
    if shape.experts is not None:
        width += shape.experts.saved_elements
        working += shape.experts.working_bytes(tokens)

    scores = shape.score_heads * tokens * (length or tokens) * BYTES

    # Recomputing, autograd saves each layer's input, and one layer at a time is whole.
    layer = tokens * width * BYTES + scores
    kept = layer * shape.layers if saves else layer + tokens * shape.hidden * BYTES * shape.layers
    return shape.adapter_parameters * 7 + kept + working + 2 * scores + shape.gathered_bytes


class _Workload(NamedTuple):
    """One micro-batch on one device."""

    shape: ModelShape
    tokens: int
    base_bytes: int
    total_bytes: int


def plan_memory(
    shape: ModelShape, tokens: int, *, base_bytes: int, total_bytes: int, mode: MemoryMode, host_room: int = UNLIMITED
) -> MemoryPlan:
    """Returns the plan for micro-batches of `tokens`, on a device that has `total_bytes` for this process and
    `base_bytes` of them in use. `host_room`: bytes of host memory that this process may pin."""
    work, layers = _Workload(shape, tokens, base_bytes, total_bytes), shape.layers
    if mode is MemoryMode.SMALLEST:
        return _plan_smallest(work, host_room)

    # Balanced never saves gate and up, and never keeps weights dequantised; of a sharded base no rank could.
    fastest = mode is MemoryMode.FASTEST
    best = ActivationPolicy.SAVE_ALL if fastest else ActivationPolicy.RECOMPUTE_MLP
    may_keep = fastest and shape.quantized and not shape.gathered_bytes
    candidates = [
        _predict(work, mode, policies, keep_dequantized=keep)
        for keep in ((True, False) if may_keep else (False,))
        for policies in _mixtures(layers, best)
    ]

    fitting = [plan for plan in candidates if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (plan.extra_milliseconds, plan.peak_bytes))
    return _plan_smallest(work, host_room)


def _plan_smallest(work: _Workload, host_room: int) -> MemoryPlan:
    """Returns the plan with the least memory on the GPU of those whose pinned memory has room: with the vocabulary on
    the host or not, and as many layers' inputs as fit beside it; the last layers' are kept on the GPU."""
    layers, each = work.shape.layers, work.tokens * work.shape.hidden * BYTES
    vocabulary = work.shape.movable_bytes
    candidates = []
    for moved in {vocabulary, 0}:
        if moved <= max(0, host_room):
            count = min(layers, max(0, host_room - moved) // each)
            policies = (ActivationPolicy.OFFLOAD,) * count + (ActivationPolicy.RECOMPUTE_ALL,) * (layers - count)
            candidates.append(_predict(work, MemoryMode.SMALLEST, policies, keep_dequantized=False, host_bytes=moved))
    return min(candidates, key=lambda plan: plan.peak_bytes)


def smaller_plan(plan: MemoryPlan, plan_for: Callable[[MemoryMode], MemoryPlan]) -> MemoryPlan | None:
    """Returns the plan to go on with after `plan` ran out of memory: that of the next mode which needs less (on a tight
    card Fastest chooses what Balanced does), or the smallest. None if `plan` was the smallest."""
    modes = list(MemoryMode)
    candidates = [plan_for(mode) for mode in modes[modes.index(plan.mode) + 1 :]]  # smaller modes, largest first

    less = [candidate for candidate in candidates if candidate.peak_bytes < plan.peak_bytes]
    return next(iter(less or candidates[-1:]), None)


def _mixtures(layers: int, best: ActivationPolicy) -> list[tuple[ActivationPolicy, ...]]:
    """Policies of all layers: from `best` everywhere down to RECOMPUTE_ALL everywhere, one layer at a time."""
    steps = [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL]
    steps = steps[steps.index(best) :]

    found = [(best,) * layers]
    for more, less in pairwise(steps):
        found += [(less,) * count + (more,) * (layers - count) for count in range(1, layers + 1)]

    return found


def _predict(
    work: _Workload,
    mode: MemoryMode,
    policies: tuple[ActivationPolicy, ...],
    *,
    keep_dequantized: bool,
    host_bytes: int = 0,
) -> MemoryPlan:
    """Returns the plan of these choices, with its bytes and its price. `host_bytes`: the vocabulary's, if it moves."""
    shape, tokens, base_bytes, total_bytes = work

    # Weights that are not kept are dequantised in forward and in backward, three matrices of the MLP at a time.
    dequantizes = shape.quantized and not keep_dequantized
    dequantizing = 2 * shape.linear_parameters / DEQUANTIZE_RATE if dequantizes else 0.0
    scratch = 3 * shape.feed_forward * shape.hidden * BYTES if dequantizes else 0
    recomputing = sum(shape.recomputed_flop(policy) for policy in policies) * tokens / GEMM_RATE

    # Bytes per adapter parameter: gradient 2, two 8-bit moments 2, copies with zero blocks 3. If there is a smaller
    # plan to repeat a pass with, 2 more: the gradient from before the pass.
    training = 7 if mode is MemoryMode.SMALLEST else 9
    tiled = ActivationPolicy.SAVE_ALL not in policies

    return MemoryPlan(
        mode=mode,
        policies=policies,
        keep_dequantized=keep_dequantized,
        base_bytes=base_bytes,
        dequantized_bytes=shape.linear_parameters * BYTES if keep_dequantized else 0,
        training_bytes=shape.adapter_parameters * training,
        activation_bytes=tokens * sum(shape.saved_bytes(policy) for policy in policies),
        working_bytes=max(
            shape.loss_bytes(tokens, blocked=host_bytes > 0), shape.working_bytes(tokens, tiled=tiled) + scratch
        ),
        host_bytes=host_bytes,
        budget_bytes=int(MARGIN * total_bytes),
        input_bytes=policies.count(ActivationPolicy.OFFLOAD) * tokens * shape.hidden * BYTES,
        extra_milliseconds=1e3 * (dequantizing + recomputing),
        gathered_bytes=shape.gathered_bytes,
    )
