"""Price and number of layers whose frozen weights stream from host memory. Pure.

A layer is copied while the one before computes, forward and backward. What the copy takes longer is waited for:

    wait = max(0, copy - forward) + max(0, copy - backward)          of one layer and micro-batch
    copy = bytes / copying,   forward = 2 P tokens / products + W / decoding,   backward = forward + recomputing

W: parameters of a layer; P: those that a token meets, of a mixture its own experts' only. A mixture copies all of its
experts, so it waits far longer. The larger a micro-batch is, the less it waits. Computing is taken at its best, as if
it were products alone.
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


def streamed_bytes(shape: ModelShape, count: int) -> int:
    """Bytes of the frozen weights of the first `count` layers, if they stream."""
    return sum(shape.streamable_bytes[:count])


def window_bytes(shape: ModelShape) -> int:
    """Bytes of the places on the GPU where streamed layers are while they are used, each for the largest of them."""
    return WHOLE_LAYERS * max(shape.streamable_bytes, default=0)


def waiting_seconds(shape: ModelShape, rates: Rates, tokens: int, recomputed: float) -> float:
    """Seconds that a micro-batch of `tokens` waits for the copies of one layer. `recomputed`: FLOP per token that
    backward spends on recomputing, in all layers."""
    experts = 0 if shape.experts is None else shape.mixture_layers * shape.experts.parameters
    decoded, multiplied = (shape.linear_parameters + experts) / shape.layers, shape.active_parameters / shape.layers
    copy = streamed_bytes(shape, shape.layers) / shape.layers / rates.copying
    forward = 2.0 * multiplied * tokens / rates.products + decoded / rates.decoding
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
