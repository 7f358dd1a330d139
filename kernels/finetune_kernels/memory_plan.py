"""What fits: whether activations are kept or recomputed, and whether dequantised weights stay. Pure.

The fastest that fits is taken, with a margin, in this order (each costs less memory and more time than the one before):

    keep activations, resident weights      no recomputation, no dequantisation
    keep activations                        4-bit weights are dequantised twice per micro-batch
    recompute, resident weights             one more forward per micro-batch
    recompute                               both
"""

from dataclasses import dataclass

MARGIN = 0.85  # share of the free memory that may be planned for; the rest is fragmentation and workspaces
# Activations kept per layer and token, in elements of 2 bytes, with our kernels: residual (2), norm outputs (2),
# attention input and output around RoPE and SDPA (q twice, k and v and their rotated or repeated copies), gate, up
# and their product.
HIDDEN_COPIES, KEY_VALUE_COPIES, FEED_FORWARD_COPIES = 8, 6, 3
CHUNK_ROWS = 1024
BYTES = 2


@dataclass(frozen=True)
class ModelShape:
    """Sizes that memory depends on."""

    layers: int
    hidden: int
    key_value: int
    """Key-value heads times head size."""
    feed_forward: int
    vocabulary: int
    linear_parameters: int
    """Parameters of the linear layers that have an adapter over a quantised base."""


@dataclass(frozen=True)
class MemoryPlan:
    """The choice, and the bytes it was made from."""

    keep_activations: bool
    resident_weights: bool
    activation_bytes: int
    resident_bytes: int
    loss_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        """One line for a log."""
        activations = "kept" if self.keep_activations else "recomputed"
        weights = "dequantised for good" if self.resident_weights else "dequantised where they are used"
        gib = 2**30
        return (
            f"memory plan: activations {activations} ({self.activation_bytes / gib:.1f} GiB), "
            f"weights {weights} ({self.resident_bytes / gib:.1f} GiB), loss {self.loss_bytes / gib:.1f} GiB; "
            f"{self.free_bytes / gib:.1f} GiB are free"
        )


def plan_memory(shape: ModelShape, tokens: int, free_bytes: int) -> MemoryPlan:
    """The fastest plan that fits for micro-batches of `tokens`; the last one is taken where nothing fits."""
    per_token = (
        shape.hidden * HIDDEN_COPIES + shape.key_value * KEY_VALUE_COPIES + shape.feed_forward * FEED_FORWARD_COPIES
    )
    one_layer = tokens * per_token * BYTES
    kept, recomputed = one_layer * shape.layers, one_layer + tokens * shape.hidden * BYTES * shape.layers
    loss = tokens * shape.hidden * BYTES * 2 + min(tokens, CHUNK_ROWS) * shape.vocabulary * BYTES
    resident = shape.linear_parameters * BYTES
    for keep, stay in ((True, True), (True, False), (False, True), (False, False)):
        plan = MemoryPlan(keep, stay, kept if keep else recomputed, resident if stay else 0, loss, free_bytes)
        if plan.activation_bytes + plan.resident_bytes + plan.loss_bytes <= MARGIN * free_bytes:
            break
    return plan
