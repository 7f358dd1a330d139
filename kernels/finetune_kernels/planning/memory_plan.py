"""What fits: what each layer policies for its backward pass, and whether decoded weights stay. Pure.

Each choice has a price in milliseconds per micro-batch, from operations counted and rates measured on an H200: weights
are decoded twice where they do not stay; gate and up, or the whole layer, are computed again where they are not kept.
The cheapest mixture that fits is taken; where nothing fits, the smallest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import (
    CHUNK_ROWS,
    HEAD_ROWS,
    TILE_ROWS,
    VOCABULARY_BLOCK,
    ActivationPolicy,
)

MARGIN = 0.92
"""Share of the memory that may be planned for; the rest is fragmentation and libraries' workspaces."""
BYTES = 2
GEMM_RATE = 7.0e14
"""FLOP/s of bf16 products at these shapes (measured: 685-783)."""
DECODE_RATE = 4.0e12 / 2.5
"""Weights decoded per second: half a byte read and two written each, at 4 TB/s."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes that memory depends on."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    linear_parameters: int
    """Parameters of all layers' linears."""
    adapter_parameters: int
    quantized: bool
    movable_bytes: int = 0
    """Of embedding and head, where they can move to host memory."""
    second_norms: bool = False
    """Whether what each half adds is normed (Gemma): the norms' inputs are kept, or the second projection is made
    again."""
    dropout: bool = False
    """Whether adapters drop a part of their inputs."""
    magnitudes: bool = False
    """Whether adapters have them (DoRA)."""

    @property
    def attention_width(self) -> int:
        """Elements of a row of q, k and v."""
        return (self.heads + 2 * self.key_value_heads) * self.head_size

    def kept(self, policy: ActivationPolicy) -> int:
        """Bytes per token and layer between forward and backward."""
        if policy is ActivationPolicy.OFFLOAD:
            return 0
        elements = self.hidden
        if policy is not ActivationPolicy.RECOMPUTE_ALL:
            # out, h, q k v, the softmax sums and both norms' scales (fp32)
            elements += self.heads * self.head_size + self.hidden + self.attention_width + 2 * (self.heads + 2)
            elements += 2 * (self.hidden + 2) if self.second_norms else 0
        if policy is ActivationPolicy.SAVE_ALL:
            elements += 2 * self.feed_forward
        return elements * BYTES

    def recomputed(self, policy: ActivationPolicy) -> float:
        """FLOP per token and layer that backward makes again."""
        gate_up = 4.0 * self.hidden * self.feed_forward
        if policy is ActivationPolicy.SAVE_ALL:
            return 0.0
        if policy is ActivationPolicy.RECOMPUTE_MLP:
            return gate_up
        attention = 2.0 * self.hidden * (self.attention_width + self.heads * self.head_size)
        return gate_up + attention + (gate_up / 2 if self.second_norms else 0.0)

    def working(self, tokens: int, *, tiled: bool) -> int:
        """Bytes while one layer's backward runs: gate, up, their gradients, the activation's, and rows of the residual
        stream; `tiled`: the MLP goes through in tiles, and attention needs more, at every token. What an adapter left
        of the activation, or the gradients of gate and up times DoRA's factors where the activation is no longer
        needed, come on top."""
        q, stream = self.heads * self.head_size, self.hidden
        wide = (6 if self.dropout or self.magnitudes else 5) * self.feed_forward
        whole = wide + 6 * stream + 2 * self.attention_width
        if not tiled or tokens <= TILE_ROWS:
            return tokens * whole * BYTES
        mlp = tokens * (4 * stream + self.attention_width + q) + TILE_ROWS * (wide + 2 * stream)
        # x, two gradients of the stream, out and its gradient; q, k, v and their gradients, once more merged; sums in
        # fp32 and the heads' own gradients of k and v inside attention
        attention = tokens * (3 * stream + 2 * q + 3 * self.attention_width + 4 * q)
        return max(mlp, attention) * BYTES

    def loss(self, tokens: int, *, blocked: bool) -> int:
        """Bytes while the loss is made: the head's input, its gradient, and scores of some rows; `blocked`: the head is
        in host memory, two blocks of it come at a time, and the gradient is added up in fp32."""
        if not blocked:
            return (3 * tokens * self.hidden + min(tokens, CHUNK_ROWS) * self.vocabulary) * BYTES
        block, rows = min(VOCABULARY_BLOCK, self.vocabulary), min(tokens, HEAD_ROWS)
        return 8 * tokens * self.hidden + rows * (block * BYTES + 4 * self.hidden) + 2 * block * self.hidden * BYTES


@dataclass(frozen=True)
class MemoryPlan:
    """The choice, and the bytes it was made from."""

    mode: MemoryMode
    policies: tuple[ActivationPolicy, ...]
    keep_dequantized: bool
    base_bytes: int
    """In use before: weights as loaded, adapters."""
    dequantized_bytes: int
    training_bytes: int
    """Gradients, optimiser state and 16-bit copies of the adapters."""
    activation_bytes: int
    working_bytes: int
    host_bytes: int
    """Of `base_bytes`, those of embedding and head, which move to host memory."""
    budget_bytes: int
    extra_milliseconds: float
    """Per micro-batch, over keeping everything."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of allocated memory."""
        stays = self.base_bytes - self.host_bytes + self.dequantized_bytes
        return stays + self.training_bytes + self.activation_bytes + self.working_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    def rows(self) -> list[tuple[str, str]]:
        """The explanation, as a table of category and amount."""
        gib = 2**30
        counts = {policy: self.policies.count(policy) for policy in ActivationPolicy if policy in self.policies}
        layers = ", ".join(f"{count} {policy.value}" for policy, count in counts.items())
        return [
            ("mode", self.mode.value),
            ("layers", layers),
            ("weights as loaded, adapters", f"{self.base_bytes / gib:.2f} GiB"),
            ("embedding and head, moved to the host", f"{-self.host_bytes / gib:.2f} GiB"),
            ("weights decoded for good", f"{self.dequantized_bytes / gib:.2f} GiB"),
            ("gradients, optimiser, copies", f"{self.training_bytes / gib:.2f} GiB"),
            ("activations", f"{self.activation_bytes / gib:.2f} GiB"),
            ("one layer's work, or the loss", f"{self.working_bytes / gib:.2f} GiB"),
            ("predicted peak", f"{self.peak_bytes / gib:.2f} GiB of {self.budget_bytes / gib:.2f} planned for"),
            ("recomputing and decoding", f"{self.extra_milliseconds:.0f} ms per micro-batch"),
        ]


def plan_modules(shape: ModelShape, tokens: int, *, base_bytes: int, total_bytes: int) -> tuple[bool, bool]:
    """Whether activations are kept and weights stay decoded where layers run module by module under autograd, which
    policies more: copies of the residual stream, of q around rotation, and of gate, up and their product."""
    width = 8 * shape.hidden + 6 * shape.key_value_heads * shape.head_size + 3 * shape.feed_forward
    layer = tokens * width * BYTES
    kept, again = layer * shape.layers, layer + tokens * shape.hidden * BYTES * shape.layers
    rest = base_bytes + shape.adapter_parameters * 7 + shape.working(tokens, tiled=False)
    keep_dequantized = shape.linear_parameters * BYTES if shape.quantized else 0
    for keep, stay in ((True, True), (True, False), (False, True)):
        if rest + (kept if keep else again) + (keep_dequantized if stay else 0) <= MARGIN * total_bytes:
            return keep, stay
    return False, False


def plan_memory(shape: ModelShape, tokens: int, *, base_bytes: int, total_bytes: int, mode: MemoryMode) -> MemoryPlan:
    """The plan for micro-batches of `tokens` on a device with `total_bytes` for this process, `base_bytes` of them in
    use."""
    layers = shape.layers
    if mode is MemoryMode.SMALLEST:
        return _plan(
            shape, tokens, base_bytes, total_bytes, mode, (ActivationPolicy.OFFLOAD,) * layers, keep_dequantized=False
        )
    best = ActivationPolicy.SAVE_ALL if mode is MemoryMode.FASTEST else ActivationPolicy.RECOMPUTE_MLP
    candidates = [
        _plan(shape, tokens, base_bytes, total_bytes, mode, policies, keep_dequantized=keep_dequantized)
        for keep_dequantized in ((True, False) if mode is MemoryMode.FASTEST and shape.quantized else (False,))
        for policies in _mixtures(layers, best)
    ]
    fitting = [plan for plan in candidates if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: (plan.extra_milliseconds, plan.peak_bytes))
    return plan_memory(shape, tokens, base_bytes=base_bytes, total_bytes=total_bytes, mode=MemoryMode.SMALLEST)


def smaller_plan(plan: MemoryPlan, plan_for: Callable[[MemoryMode], MemoryPlan]) -> MemoryPlan | None:
    """What to go on with after `plan` ran out of memory: that of the next mode which needs less (on a tight card
    Fastest policies what Balanced does), or the smallest; None where that was it."""
    modes = list(MemoryMode)
    candidates = [plan_for(mode) for mode in modes[modes.index(plan.mode) + 1 :]]
    less = [candidate for candidate in candidates if candidate.peak_bytes < plan.peak_bytes]
    return next(iter(less or candidates[-1:]), None)


def _mixtures(layers: int, best: ActivationPolicy) -> list[tuple[ActivationPolicy, ...]]:
    """From every layer keeping `best` down to every layer keeping its input, one layer at a time."""
    steps = [ActivationPolicy.SAVE_ALL, ActivationPolicy.RECOMPUTE_MLP, ActivationPolicy.RECOMPUTE_ALL]
    steps = steps[steps.index(best) :]
    found = [(best,) * layers]
    for more, less in pairwise(steps):
        found += [(less,) * count + (more,) * (layers - count) for count in range(1, layers + 1)]
    return found


def _plan(
    shape: ModelShape,
    tokens: int,
    base_bytes: int,
    total_bytes: int,
    mode: MemoryMode,
    policies: tuple[ActivationPolicy, ...],
    *,
    keep_dequantized: bool,
) -> MemoryPlan:
    moved = shape.movable_bytes if all(policy is ActivationPolicy.OFFLOAD for policy in policies) else 0
    decoding = 0.0 if keep_dequantized or not shape.quantized else 2 * shape.linear_parameters / DECODE_RATE
    scratch = 0 if keep_dequantized or not shape.quantized else 3 * shape.feed_forward * shape.hidden * BYTES
    again = sum(shape.recomputed(policy) for policy in policies) * tokens / GEMM_RATE
    # gradient 2, two 8-bit moments 2, copies with zero blocks 3; the gradient as it was before a pass, where there is
    # a smaller plan to repeat the pass with
    training = 7 if all(policy is ActivationPolicy.OFFLOAD for policy in policies) else 9
    return MemoryPlan(
        mode=mode,
        policies=policies,
        keep_dequantized=keep_dequantized,
        base_bytes=base_bytes,
        dequantized_bytes=shape.linear_parameters * BYTES if keep_dequantized else 0,
        training_bytes=shape.adapter_parameters * training,
        activation_bytes=tokens * sum(shape.kept(policy) for policy in policies),
        working_bytes=max(
            shape.loss(tokens, blocked=moved > 0),
            shape.working(tokens, tiled=ActivationPolicy.SAVE_ALL not in policies) + scratch,
        ),
        host_bytes=moved,
        budget_bytes=int(MARGIN * total_bytes),
        extra_milliseconds=1e3 * (decoding + again),
    )
