"""Picks which activations each layer saves, of how many layers a 16-bit copy of the NF4 weights is kept, and what waits
in host memory, so that the predicted peak fits the GPU at the least extra time.

Each choice has a price in milliseconds per micro-batch, from counted operations and the machine's `Rates`: weights
that are not kept dequantised are dequantised twice; gate and up, or the whole layer, are recomputed if they are not
saved; what waits in pinned host memory (layers' inputs, the vocabulary) is copied over the bus. The cheapest mixture
that fits is taken, so memory is left over only where nothing is left to keep, and a larger card never gets a slower
plan. If none fits, the smallest is: it moves as much to host memory as that has room for, and as many layers' frozen
weights as it takes to fit, which then stream a layer ahead. `memory: Smallest` streams all of them.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.loaded_weights import kept_parameters
from finetune_kernels.planning.model_shape import BYTES, ModelShape
from finetune_kernels.planning.rates import H200, UNKNOWN_MACHINE, Machine, Rates
from finetune_kernels.planning.streamed_weights import (
    numbers_of_layers,
    streamed_bytes,
    streamed_rows,
    waiting_seconds,
    window_bytes,
)

MARGIN = 0.92
"""Share of the memory that a plan may use; the rest is for fragmentation and libraries' workspaces."""
STEP_DOWN = 0.75
"""Share of what a plan that did not fit took beside the weights as loaded, which the next one may take."""


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen policies, and the bytes they were chosen by."""

    mode: MemoryMode
    policies: tuple[ActivationPolicy, ...]
    """One for each layer."""
    kept_layers: int
    """Layers whose weights are kept dequantised: the last ones."""
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
    """Bytes of the streamed layers that are on the GPU at a time, from the ranks or from host memory."""
    streamed_layers: int = 0
    """Layers whose frozen weights stream from host memory: the first ones."""
    streamed_bytes: int = 0
    """Bytes of their weights within `base_bytes`, which are in host memory."""
    rates: Rates = H200
    """Rates by which the choices were priced."""
    pinned_table_bytes: int = 0
    """Host memory that embedding and head take there."""

    @property
    def keep_dequantized(self) -> bool:
        """True if the weights of all layers are kept dequantised."""
        return self.kept_layers == len(self.policies)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of allocated memory."""
        weights = self.base_bytes - self.host_bytes - self.streamed_bytes + self.gathered_bytes
        return weights + self.dequantized_bytes + self.training_bytes + self.activation_bytes + self.working_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory that the plan pins; it cannot be swapped out."""
        return self.pinned_table_bytes + self.input_bytes + self.streamed_bytes

    @property
    def is_smallest(self) -> bool:
        """True if no plan needs less: in mode Smallest, where layers that stream are all of them or none."""
        return self.mode is MemoryMode.SMALLEST and self.streamed_layers in (0, len(self.policies))

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
            *streamed_rows(self.streamed_layers, self.streamed_bytes, self.gathered_bytes),
            ("embedding and head, moved to the host", f"{-self.host_bytes / gib:.2f} GiB"),
            ("weights kept dequantised", f"{self.dequantized_bytes / gib:.2f} GiB ({self.kept_layers} layers)"),
            ("gradients, optimiser, copies", f"{self.training_bytes / gib:.2f} GiB"),
            ("activations", f"{self.activation_bytes / gib:.2f} GiB"),
            ("one layer's work, or the loss", f"{self.working_bytes / gib:.2f} GiB"),
            ("pinned in host memory", f"{self.pinned_bytes / gib:.2f} GiB"),
            ("predicted peak", f"{self.peak_bytes / gib:.2f} GiB of {self.budget_bytes / gib:.2f} planned for"),
            ("recomputing, decoding, copying", f"{self.extra_milliseconds:.0f} ms per micro-batch"),
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

    scores = shape.score_heads * tokens * (length or tokens) * BYTES

    # Recomputing, autograd saves each layer's input, and one layer at a time is whole.
    layer = tokens * width * BYTES + scores
    kept = layer * shape.layers if saves else layer + tokens * shape.hidden * BYTES * shape.layers
    if saves and shape.mixers is not None:
        kept += len(shape.mixers.layers) * tokens * shape.mixers.bytes_per_token
    return shape.adapter_parameters * (5 + shape.gradient_bytes) + kept + working + 2 * scores + shape.gathered_bytes


class _Workload(NamedTuple):
    """One micro-batch on one device."""

    shape: ModelShape
    tokens: int
    base_bytes: int
    total_bytes: int
    machine: Machine
    kept: list[int]
    """Parameters that are decoded if the last 0, 1, 2 ... layers are kept."""


def plan_memory(
    shape: ModelShape, tokens: int, *, base_bytes: int, total_bytes: int, mode: MemoryMode,
    machine: Machine = UNKNOWN_MACHINE,
) -> MemoryPlan:  # fmt: skip
    """Returns the plan for micro-batches of `tokens`, on a device that has `total_bytes` for this process and
    `base_bytes` of them in use."""
    work = _Workload(shape, tokens, base_bytes, total_bytes, machine, kept_parameters(shape))
    if mode is MemoryMode.SMALLEST or machine.streamed_layers:
        return _plan_smallest(work, mode)

    # Balanced never saves gate and up, and never keeps weights dequantised.
    fastest = mode is MemoryMode.FASTEST
    best = ActivationPolicy.SAVE_ALL if fastest else ActivationPolicy.RECOMPUTE_MLP
    may_keep = fastest and shape.quantized

    fitting = []
    for moved in {0, shape.movable_bytes}:
        for policies in _mixtures(shape.layers, best):
            plan = _predict(work, mode, policies, host_bytes=moved)
            if plan.fits and plan.pinned_bytes <= max(0, machine.host_room):
                fitting.append(_keep_weights(work, plan) if may_keep else plan)
    if fitting:
        return min(fitting, key=lambda plan: (plan.extra_milliseconds, plan.pinned_bytes, plan.peak_bytes))
    return _plan_smallest(work, mode)


def _keep_weights(work: _Workload, plan: MemoryPlan) -> MemoryPlan:
    """Returns the plan with the weights of as many layers kept dequantised as there is room for."""
    room = plan.budget_bytes - plan.peak_bytes
    count = bisect_right(work.kept, room // BYTES) - 1
    return _predict(work, plan.mode, plan.policies, kept_layers=count, host_bytes=plan.host_bytes)


def _plan_smallest(work: _Workload, wanted: MemoryMode) -> MemoryPlan:
    """Returns the plan with the least memory on the GPU of those whose pinned memory has room: with the vocabulary on
    the host or not, some layers' weights, and as many layers' inputs as fit beside them; the last layers' are kept on
    the GPU. If Smallest is not what is `wanted`, no more layers stream than it takes to fit."""
    shape, host_room = work.shape, max(0, work.machine.host_room)
    layers, each = shape.layers, work.tokens * shape.stream * BYTES
    candidates = []
    for streamed in numbers_of_layers(shape, work.machine.streamed_layers):
        for moved in {shape.movable_bytes, 0}:
            room = host_room - shape.pinned_table_bytes(moved) - streamed_bytes(shape, streamed)
            if room >= 0 or (streamed == work.machine.streamed_layers and not moved):
                count = min(layers, max(0, room) // each)
                policies = (ActivationPolicy.OFFLOAD,) * count + (ActivationPolicy.RECOMPUTE_ALL,) * (layers - count)
                candidates.append(_predict(
                    work, MemoryMode.SMALLEST, policies, host_bytes=moved, streamed_layers=streamed
                ))  # fmt: skip

    fitting = [plan for plan in candidates if plan.fits and wanted is not MemoryMode.SMALLEST]
    if fitting:
        return min(fitting, key=lambda plan: (plan.streamed_layers, plan.peak_bytes))
    return min(candidates, key=lambda plan: (plan.peak_bytes, plan.extra_milliseconds))


def smaller_plan(plan: MemoryPlan, plan_for: Callable[[MemoryMode, int], MemoryPlan]) -> MemoryPlan | None:
    """Returns the plan to go on with after `plan` ran out of memory: the next mode's, in noticeably less memory than
    `plan` needed, or the smallest; after one that streams some layers, one that streams more. None if `plan` was the
    smallest. `plan_for` gives the plan of a mode on a GPU of so many bytes.
    """
    modes, beside = list(MemoryMode), plan.peak_bytes - plan.base_bytes
    total = int((plan.base_bytes + STEP_DOWN * beside) / MARGIN)
    smaller = modes[modes.index(plan.mode) + 1 :]  # largest first
    candidates = [plan_for(mode, total) for mode in smaller or modes[-1:]]

    less = [candidate for candidate in candidates if candidate.peak_bytes < plan.peak_bytes]
    return next(iter(less or candidates[-1:] * bool(smaller)), None)


def _mixtures(layers: int, best: ActivationPolicy) -> list[tuple[ActivationPolicy, ...]]:
    """Policies of all layers: from `best` everywhere down to OFFLOAD everywhere, one layer at a time."""
    steps = list(ActivationPolicy)  # from most memory to least
    steps = steps[steps.index(best) :]

    found = [(best,) * layers]
    for more, less in pairwise(steps):
        found += [(less,) * count + (more,) * (layers - count) for count in range(1, layers + 1)]
    return found


def _predict(
    work: _Workload, mode: MemoryMode, policies: tuple[ActivationPolicy, ...], *, kept_layers: int = 0,
    host_bytes: int = 0, streamed_layers: int = 0,
) -> MemoryPlan:  # fmt: skip
    """Returns the plan of these choices, with its bytes and its price. `host_bytes`: the vocabulary's, if it moves."""
    shape, tokens, base_bytes, total_bytes, machine, every_kept = work
    rates = machine.rates

    # Weights that are not kept are dequantised in forward and in backward, three matrices of the MLP at a time; those
    # of a hybrid's other mixers once more where these run again.
    dequantized = shape.layers - kept_layers if shape.quantized else 0
    kept = every_kept[kept_layers]
    decoded = 2 * (shape.linear_parameters - kept) + shape.repeated_parameters(policies) if shape.quantized else 0
    dequantizing = (decoded + shape.decoded_experts(policies)) / rates.decoding
    widest = max(shape.feed_forward, shape.in_dense_layers.feed_forward)
    scratch = 3 * widest * shape.hidden * BYTES if dequantized else 0
    recomputing = shape.recomputed_by(policies) * tokens / rates.products
    inputs = policies.count(ActivationPolicy.OFFLOAD) * tokens * shape.stream * BYTES
    # Layers' inputs go there and back, the head comes once. Computing hides most of it, but buses differ, and a head on
    # the host makes samples slow: what is pinned has to be worth all of its copies.
    copying = (2 * inputs + shape.vocabulary * shape.hidden * BYTES * (host_bytes > 0)) / rates.copying
    copying += streamed_layers * waiting_seconds(shape, rates, tokens, shape.recomputed_by(policies))

    # Bytes per adapter parameter: its gradient, two 8-bit moments 2, copies with zero blocks 3. If there is a smaller
    # plan to repeat a pass with, the gradient from before the pass as well.
    is_last = mode is MemoryMode.SMALLEST and streamed_layers in (0, shape.layers)
    training = shape.adapter_parameters * (5 + shape.gradient_bytes * (1 if is_last else 2))

    return MemoryPlan(
        mode=mode,
        policies=policies,
        kept_layers=kept_layers,
        base_bytes=base_bytes,
        dequantized_bytes=kept * BYTES,
        training_bytes=training,
        activation_bytes=tokens * shape.saved_by(policies),
        working_bytes=max(
            shape.loss_bytes(tokens, blocked=host_bytes > 0),
            shape.working_bytes(tokens, tiled=ActivationPolicy.SAVE_ALL not in policies) + scratch,
        ),
        host_bytes=host_bytes,
        budget_bytes=int(MARGIN * total_bytes),
        input_bytes=inputs,
        extra_milliseconds=1e3 * (dequantizing + recomputing + copying),
        gathered_bytes=window_bytes(shape) if streamed_layers else shape.gathered_bytes,
        streamed_layers=streamed_layers,
        streamed_bytes=streamed_bytes(shape, streamed_layers),
        rates=rates,
        pinned_table_bytes=shape.pinned_table_bytes(host_bytes),
    )
