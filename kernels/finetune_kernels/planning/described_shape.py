"""The shape of a model that is not loaded: its parameters are counted from its configuration and its family's row."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.family import LLAMA_NAMES, Family
from finetune_kernels.planning.fused_support import largest
from finetune_kernels.planning.model_shape import (
    ModelShape,
    ParameterCounts,
    build_shape,
)
from finetune_kernels.planning.parts.expert_shape import experts_a_layer
from finetune_kernels.planning.parts.layer_sizes import row_of_layer
from finetune_kernels.planning.parts.vocabulary import keeps_vocabulary, vocabulary_bytes

_LLAMA = Family("", "")
"""Row of a family without one: its layers are taken to have Llama's projections."""


def shape_from_config(
    config: Any, targets: Collection[str], rank: int, *, quantized: bool, dropout: bool = False,
    magnitudes: bool = False,
) -> ModelShape | None:  # fmt: skip
    """Returns the shape of a model that is not loaded, with an adapter on `targets`.

    None if the architecture has not the projections of attention and one MLP (mixtures of experts and others).
    """
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    if any(not isinstance(largest(config, name), int) for name in needed):
        return None
    if experts_a_layer(config):
        return None

    uncounted = build_shape(config, ParameterCounts(0, 0, quantized, 0))
    family = family_of_config(config) or _LLAMA
    counted = _linears(uncounted, family)
    linears = {name for _, group in counted for name in group}
    adapted = {name for name in linears if name in targets or set(LLAMA_NAMES.get(name, ("",))) <= set(targets)}
    adapted |= {part for name in targets for part in LLAMA_NAMES.get(name, ())} & linears
    if "all-linear" in targets:
        adapted = linears
    adapted -= set(family.barred)

    # A [r, in], B [out, r] and, for DoRA, m [out]
    adapters = [
        layers * (rank * (rows + columns) + (rows if magnitudes else 0))
        for layers, group in counted
        for name, (rows, columns) in group.items()
        if name in adapted
    ]
    counts = ParameterCounts(
        linears=sum(layers * rows * columns for layers, group in counted for rows, columns in group.values()),
        adapters=sum(adapters),
        quantized=quantized,
        movable_bytes=0 if keeps_vocabulary(config) else vocabulary_bytes(config),
    )
    return build_shape(config, counts, dropout=dropout, magnitudes=magnitudes)


def _linears(shape: ModelShape, family: Family) -> list[tuple[int, dict[str, tuple[int, int]]]]:
    """Numbers of layers, each with the output and input size of its linear layers by the names of the family's row: the
    MLP of all layers, attention, and the other mixer of a hybrid."""
    if shape.sizes:
        return _linears_by_layer(shape, family)

    # Rows of W for q, and for k or v.
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    hidden, wide = shape.hidden, shape.feed_forward

    mlp = {family.mlp_output: (hidden, wide)} | _inputs(family.mlp_inputs, (wide,) * shape.wide_inputs, hidden)
    q = 2 * queries if shape.gates_heads else queries
    if shape.latent is not None:
        attention = shape.latent.linears(family)
    else:
        attention = {family.attention_output: (hidden, queries)}
        attention |= _inputs(family.attention_inputs, (q, keys, keys)[: 1 + shape.projections], hidden)
    if family.block is not None:
        alone = {"attention": attention, "mlp": mlp, "mixer": {} if shape.mixers is None else shape.mixers.linears}
        return [(shape.layers, alone[family.block])]
    if shape.mixers is None:
        return [(shape.layers, mlp), (shape.layers, attention)]
    attentive = shape.layers - shape.mixers.without_attention
    return [(shape.layers, mlp), (attentive, attention), (len(shape.mixers.layers), shape.mixers.linears)]


def _linears_by_layer(shape: ModelShape, family: Family) -> list[tuple[int, dict[str, tuple[int, int]]]]:
    """The same of a model whose layers differ, with what makes the layers' own inputs."""
    found = [
        (count * layers, linears)
        for sizes, count in Counter(shape.sizes).items()
        for layers, linears in _linears(replace(shape.in_layer(sizes), layers=1), row_of_layer(family, sizes))
    ]
    if family.layer_input is None:
        return found
    third, own, hidden = family.layer_input, shape.layer_input, shape.hidden
    found.append((shape.layers, {third.gate: (own, hidden), third.projection: (hidden, own)}))
    return [*found, (1, {third.source: (shape.layers * own, hidden)})]


def _inputs(names: tuple[str, ...], sizes: tuple[int, ...], hidden: int) -> dict[str, tuple[int, int]]:
    """Sizes of linear layers that read the residual stream; one name for all sizes is a merged layer's."""
    merged = sizes if len(names) == len(sizes) else (sum(sizes),)
    return {name: (rows, hidden) for name, rows in zip(names, merged, strict=True)}
