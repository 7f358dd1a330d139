"""Price and number of layers whose frozen weights stream from host memory. Pure.

A layer is copied while the one before computes, forward and backward. What the copy takes longer is waited for:

    wait = max(0, copy - forward) + max(0, copy - backward)          of one layer and micro-batch
    copy = bytes / copying,   forward = 2 P tokens / products + P / decoding,   backward = forward + recomputing

P: parameters of a layer. So the larger a micro-batch is, the less it waits. Computing is taken at its best, as if it
were products alone.
"""

from finetune_kernels.planning.loaded_weights import WHOLE_LAYERS
from finetune_kernels.planning.model_shape import ModelShape
from finetune_kernels.planning.rates import Rates


def numbers_of_layers(shape: ModelShape, least: int) -> tuple[int, ...]:
    """Returns how many layers may stream: none, or more than are on the GPU at a time; from `least`, which stream
    already."""
    if not shape.streamable_bytes:
        return (0,)
    found = tuple(range(max(least, WHOLE_LAYERS + 1), shape.layers + 1))
    return found if least else (0, *found)


def waiting_seconds(shape: ModelShape, rates: Rates, tokens: int, recomputed: float) -> float:
    """Seconds that a micro-batch of `tokens` waits for the copies of one layer. `recomputed`: FLOP per token that
    backward spends on recomputing, in all layers."""
    parameters = shape.linear_parameters / shape.layers
    copy = shape.streamable_bytes / rates.copying
    forward = 2.0 * parameters * tokens / rates.products + parameters / rates.decoding
    backward = forward + recomputed / shape.layers * tokens / rates.products
    return max(0.0, copy - forward) + max(0.0, copy - backward)


def streamed_rows(layers: int, moved: int, gathered: int) -> list[tuple[str, str]]:
    """The rows of a plan for people about weights that are not on the GPU all the time: layers that stream from host
    memory and their bytes, and bytes of those that are on the GPU at a time, from there or from the ranks."""
    if not gathered:
        return []
    at_a_time = f"{gathered / 2**30:.2f} GiB"
    if not layers:
        return [("layers gathered from the ranks", at_a_time)]
    there = f"{-moved / 2**30:.2f} GiB ({layers} layers)"
    return [("weights streamed from the host", there), ("two layers of them at a time", at_a_time)]
