"""Bytes of a model's weights once they are loaded, and what changes in its shape if some of them lie elsewhere. Pure.

bytes as loaded = 16-bit embeddings, head and norms + linears (NF4: half a byte and a scale for each 64 weights)
                  + adapters in fp32
"""

from dataclasses import replace
from itertools import accumulate
from typing import Any

from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.model_shape import BYTES, ModelShape
from finetune_kernels.planning.parts.vocabulary import layer_input_bytes, tables, vocabulary_bytes

NF4_BLOCK, SCALES_BLOCK = 64, 256
"""NF4 weights per scale; scales per scale of their own (double quantisation)."""
ADAPTER_BYTES = 4
WHOLE_LAYERS = 2
"""Layers that are whole at a time if weights stream, from the ranks or from host memory: one computes, one comes."""


def with_new_tokens(shape: ModelShape, config: Any, count: int) -> ModelShape:
    """Returns the shape with rows of `count` new tokens in embedding and head, which keep both on the GPU."""
    if not count:
        return shape
    rows = count * shape.hidden * tables(config)
    return replace(shape, adapter_parameters=shape.adapter_parameters + rows, movable_bytes=0)


def loaded_bytes(config: Any, shape: ModelShape, *, double_quantized: bool) -> int:
    """Bytes of the weights once they are loaded, adapters included."""
    # Embeddings, head, and the norms of a layer (two if the family is not known) plus the last one.
    family = family_of_config(config)
    norms = 2 if family is None else len(family.block_norms)
    others = vocabulary_bytes(config) + layer_input_bytes(config) + (norms * shape.layers + 1) * shape.hidden * BYTES
    return linear_bytes(shape, double_quantized=double_quantized) + others + shape.adapter_parameters * ADAPTER_BYTES


def linear_bytes(shape: ModelShape, *, double_quantized: bool) -> int:
    """Bytes of the linear layers' weights as loaded."""
    if not shape.quantized:
        return shape.linear_parameters * BYTES
    return _nf4_bytes(shape.linear_parameters, double_quantized=double_quantized)


def share_out(shape: ModelShape, loaded: int, ranks: int, *, double_quantized: bool) -> tuple[ModelShape, int]:
    """Returns the shape and the bytes of a rank that keeps one of `ranks` parts of the linear layers' weights.
    `loaded`: bytes of the whole model."""
    whole = linear_bytes(shape, double_quantized=double_quantized)
    gathered = WHOLE_LAYERS * max(_by_layer(whole, shape))
    return replace(shape, gathered_bytes=gathered), loaded - whole + whole // ranks


def let_stream(shape: ModelShape, *, double_quantized: bool) -> ModelShape:
    """Returns the shape of a model whose layers can stream from host memory, if they are in NF4. Left out are layers
    that the ranks share out, experts in 16 bits, and DoRA, which reads all weights at the start."""
    experts = shape.experts
    if not shape.quantized or shape.gathered_bytes or shape.magnitudes or (experts and not experts.quantized):
        return shape
    linears = _by_layer(linear_bytes(shape, double_quantized=double_quantized), shape)
    stacks = 0 if experts is None else _nf4_bytes(experts.parameters, double_quantized=double_quantized)
    dense = () if shape.dense is None else shape.dense.layers
    whole = (size + (0 if index in dense else stacks) for index, size in enumerate(linears))
    return replace(shape, streamable_bytes=tuple(whole))


def kept_parameters(shape: ModelShape) -> list[int]:
    """Returns how many parameters are decoded if the weights of the last 0, 1, 2 ... layers are kept dequantised: of
    linear layers that our kernels run."""
    mixers = shape.mixers
    whole = shape.linear_parameters - (0 if mixers is None else mixers.all_parameters)
    modules = () if mixers is None else mixers.layers

    each = [
        _linear_parameters(shape, index) - (mixers.parameters if mixers is not None and index in modules else 0)
        for index in range(shape.layers)
    ]

    total = sum(each) + shape.layers * shape.layer_input * shape.hidden
    return [whole * count // (total or 1) for count in accumulate(reversed(each), initial=0)]


def _by_layer(whole: int, shape: ModelShape) -> list[int]:
    """Returns the bytes of each layer's linear layers, of `whole` of all and of what makes the layers' own inputs."""
    parameters = [_linear_parameters(shape, index) for index in range(shape.layers)]
    total = sum(parameters) + shape.layers * shape.layer_input * shape.hidden
    return [whole * count // total for count in parameters]


def _linear_parameters(shape: ModelShape, index: int) -> int:
    """Parameters of one layer's linear layers, experts left out."""
    shape = shape.in_layer(shape.sizes[index]) if shape.sizes else shape
    shape = shape.in_dense_layers if shape.dense is not None and index in shape.dense.layers else shape
    attention = shape.hidden * (shape.projected_width + shape.heads * shape.head_size)
    attention = attention if shape.latent is None else shape.latent.parameters

    mixers = shape.mixers
    if mixers is not None and index in mixers.layers:
        attention = mixers.parameters + (attention if mixers.beside_attention else 0)
    mlp = (1 + shape.wide_inputs) * shape.feed_forward + 2 * shape.layer_input
    return attention + shape.hidden * mlp


def _nf4_bytes(parameters: int, *, double_quantized: bool) -> int:
    scales = parameters // NF4_BLOCK
    return parameters // 2 + (scales + 4 * scales // SCALES_BLOCK if double_quantized else 4 * scales)
