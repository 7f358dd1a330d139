"""The sizes of a model that memory and time depend on, and the formulas over them.

They come from a loaded model's counted parameters or from its configuration alone (`config` is transformers' text
configuration, of which only numbers are read).

    bytes as loaded = 16-bit embeddings, head and norms + linears (NF4: half a byte and a scale for each 64 weights)
                      + adapters in fp32
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.block_sizes import CHUNK_ROWS, HEAD_ROWS, TILE_ROWS, VOCABULARY_BLOCK
from finetune_kernels.planning.expert_shape import ExpertShape, expert_shape, has_experts
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.family import LLAMA_NAMES, Family
from finetune_kernels.planning.fused_support import PLAIN_ATTENTION, head_size, largest

BYTES = 2
"""Bytes of one element in 16 bits."""
NF4_BLOCK, SCALES_BLOCK = 64, 256
"""NF4 weights per scale; scales per scale of their own (double quantisation)."""
ADAPTER_BYTES = 4
WHOLE_LAYERS = 2
"""Layers that are whole at a time if each rank keeps a part of the base: one computes, one is gathered."""
_LLAMA = Family("", "")
"""Row of a family without one: its layers are taken to have Llama's projections."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model with its adapter."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    linear_parameters: int
    """Parameters of the linear layers in all decoder layers."""
    adapter_parameters: int
    quantized: bool
    movable_bytes: int = 0
    """Bytes of embedding and head, if they can move to host memory."""
    second_norms: bool = False
    """True if the blocks' outputs are normed (Gemma): these norms' inputs are saved, or the down projection is
    recomputed."""
    parallel: bool = False
    """True if the MLP reads the layer's input and not the attention's output as well (Cohere): one stream less."""
    gated: bool = True
    """True if the MLP has a gate beside its up projection."""
    dropout: bool = False
    """True if adapters drop a part of their inputs."""
    magnitudes: bool = False
    """True if adapters have DoRA's magnitudes."""
    experts: ExpertShape | None = None
    score_heads: int = 0
    """Heads of which layers that are not fused keep the scores of every pair of tokens of a row."""
    """The experts of a mixture; `feed_forward` is the shared experts' then, and `linear_parameters` are without
    experts."""
    gathered_bytes: int = 0
    """Bytes of the layers that are whole at a time, if each rank keeps a part of the base; 0 if it keeps all."""

    @property
    def attention_width(self) -> int:
        """Elements of a row of q, k and v."""
        return (self.heads + 2 * self.key_value_heads) * self.head_size

    def saved_bytes(self, policy: ActivationPolicy) -> int:
        """Bytes per token and layer that stay on the GPU between forward and backward."""
        if policy is ActivationPolicy.OFFLOAD:
            return 0

        elements = self.hidden  # the layer's input
        if policy is not ActivationPolicy.RECOMPUTE_ALL:
            # attention's output, h, q k v, the softmax sums and both norms' rstd (fp32, hence twice)
            between = 0 if self.parallel else self.hidden
            elements += self.heads * self.head_size + between + self.attention_width + 2 * (self.heads + 2)
            elements += 2 * (self.hidden + 2) if self.second_norms else 0
        if policy is ActivationPolicy.SAVE_ALL:
            elements += self.wide_inputs * self.feed_forward  # gate and up

        return elements * BYTES

    @property
    def wide_inputs(self) -> int:
        """Projections that widen the MLP's input: gate and up, or up."""
        return 2 if self.gated else 1

    def recomputed_flop(self, policy: ActivationPolicy) -> float:
        """FLOP per token and layer that backward spends on recomputing."""
        down = 2.0 * self.hidden * self.feed_forward
        gate_up = self.wide_inputs * down
        if policy is ActivationPolicy.SAVE_ALL:
            return 0.0
        if policy is ActivationPolicy.RECOMPUTE_MLP:
            return gate_up

        attention = 2.0 * self.hidden * (self.attention_width + self.heads * self.head_size)
        return gate_up + attention + (down if self.second_norms else 0.0)

    def working_bytes(self, tokens: int, *, tiled: bool) -> int:
        """Bytes that one layer's backward needs beside what is saved; `tiled`: the MLP takes `TILE_ROWS` at a time."""
        q, stream = self.heads * self.head_size, self.hidden
        # gate, up, their gradients and the activation's. One more is what dropout leaves of the activation, or the
        # gradients of gate and up times DoRA's factors (by then the activation is released).
        parts = 2 * self.wide_inputs + (2 if self.dropout or self.magnitudes else 1)
        wide = parts * self.feed_forward
        whole = wide + 6 * stream + 2 * self.attention_width
        if not tiled or tokens <= TILE_ROWS:
            return tokens * whole * BYTES

        mlp = tokens * (4 * stream + self.attention_width + q) + TILE_ROWS * (wide + 2 * stream)
        # x, two gradients of the residual stream, attention's output and its gradient; q, k, v and their gradients,
        # once more merged; fp32 sums and each query head's own gradients of k and v inside attention
        attention = tokens * (3 * stream + 2 * q + 3 * self.attention_width + 4 * q)
        return max(mlp, attention) * BYTES

    def loss_bytes(self, tokens: int, *, blocked: bool) -> int:
        """Bytes that the loss needs: the head's input, its gradient, and the logits of some rows. `blocked`: the head
        is in host memory, two blocks of it are on the GPU at a time, and the gradient is summed in fp32."""
        if not blocked:
            return (3 * tokens * self.hidden + min(tokens, CHUNK_ROWS) * self.vocabulary) * BYTES

        block, rows = min(VOCABULARY_BLOCK, self.vocabulary), min(tokens, HEAD_ROWS)
        return 8 * tokens * self.hidden + rows * (block * BYTES + 4 * self.hidden) + 2 * block * self.hidden * BYTES


class ParameterCounts(NamedTuple):
    """The part of a shape that is counted, not read from the configuration."""

    linears: int
    adapters: int
    quantized: bool
    movable_bytes: int


def build_shape(config: Any, counts: ParameterCounts, *, dropout: bool = False, magnitudes: bool = False) -> ModelShape:
    """Returns the shape of a model whose parameters were counted. One without attention (Mamba, RWKV) is planned as if
    it had one head, and one without an MLP as if it had Llama's."""
    family, experts = family_of_config(config), expert_shape(config, quantized=counts.quantized)
    field = "intermediate_size" if family is None else family.feed_forward_field
    heads = largest(config, "num_attention_heads") or 1
    feed_forward = largest(config, field) or 4 * config.hidden_size

    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        key_value_heads=largest(config, "num_key_value_heads") or heads,
        head_size=head_size(config),
        feed_forward=feed_forward if experts is None else experts.shared,
        vocabulary=config.vocab_size,
        linear_parameters=counts.linears,
        adapter_parameters=counts.adapters,
        quantized=counts.quantized,
        movable_bytes=counts.movable_bytes,
        second_norms=family is not None and family.second_norms,
        parallel=family is not None and family.parallel,
        gated=family is None or family.gated,
        dropout=dropout,
        magnitudes=magnitudes,
        experts=experts,
        score_heads=heads if getattr(config, "model_type", "") in PLAIN_ATTENTION else 0,
    )


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
    if has_experts(config):
        return None

    uncounted = build_shape(config, ParameterCounts(0, 0, quantized, 0))
    linears = _linears(uncounted, family_of_config(config) or _LLAMA)
    adapted = {name for name in linears if name in targets or set(LLAMA_NAMES.get(name, ("",))) <= set(targets)}
    adapted |= {part for name in targets for part in LLAMA_NAMES.get(name, ())} & set(linears)
    if "all-linear" in targets:
        adapted = set(linears)

    # A [r, in], B [out, r] and, for DoRA, m [out]
    adapter = {name: rank * (rows + columns) + (rows if magnitudes else 0) for name, (rows, columns) in linears.items()}
    counts = ParameterCounts(
        linears=uncounted.layers * sum(rows * columns for rows, columns in linears.values()),
        adapters=uncounted.layers * sum(adapter[name] for name in adapted),
        quantized=quantized,
        movable_bytes=0 if keeps_vocabulary(config) else vocabulary_bytes(config, uncounted),
    )
    return build_shape(config, counts, dropout=dropout, magnitudes=magnitudes)


def with_new_tokens(shape: ModelShape, config: Any, count: int) -> ModelShape:
    """Returns the shape with rows of `count` new tokens in embedding and head, which keep both on the GPU."""
    if not count:
        return shape
    rows = count * shape.hidden * _tables(config)
    return replace(shape, adapter_parameters=shape.adapter_parameters + rows, movable_bytes=0)


def loaded_bytes(config: Any, shape: ModelShape, *, double_quantized: bool) -> int:
    """Bytes of the weights once they are loaded, adapters included."""
    # Embedding, head, and the norms of a layer (two if the family is not known) plus the last one.
    family = family_of_config(config) or _LLAMA
    norms = len(family.pre_norms) + len(family.post_norms)
    others = vocabulary_bytes(config, shape) + (norms * shape.layers + 1) * shape.hidden * BYTES
    return linear_bytes(shape, double_quantized=double_quantized) + others + shape.adapter_parameters * ADAPTER_BYTES


def linear_bytes(shape: ModelShape, *, double_quantized: bool) -> int:
    """Bytes of the linear layers' weights as loaded."""
    if not shape.quantized:
        return shape.linear_parameters * BYTES

    scales = shape.linear_parameters // NF4_BLOCK
    return shape.linear_parameters // 2 + (scales + 4 * scales // SCALES_BLOCK if double_quantized else 4 * scales)


def share_out(shape: ModelShape, loaded: int, ranks: int, *, double_quantized: bool) -> tuple[ModelShape, int]:
    """Returns the shape and the bytes of a rank that keeps one of `ranks` parts of the linear layers' weights.
    `loaded`: bytes of the whole model."""
    whole = linear_bytes(shape, double_quantized=double_quantized)
    gathered = WHOLE_LAYERS * whole // shape.layers
    return replace(shape, gathered_bytes=gathered), loaded - whole + whole // ranks


def vocabulary_bytes(config: Any, shape: ModelShape) -> int:
    """Bytes of embedding and head."""
    return _tables(config) * shape.vocabulary * shape.hidden * BYTES


def _tables(config: Any) -> int:
    """Embedding and head, which may be one tensor."""
    return 1 if getattr(config, "tie_word_embeddings", False) else 2


def keeps_vocabulary(config: Any) -> bool:
    """True if embedding and head stay on the GPU: the embedding is a module of the family's own, or the head has a
    bias."""
    family = family_of_config(config)
    # Gemmas without a row (3n, 4) scale their embedding, too.
    if family is None:
        return str(getattr(config, "model_type", "")).startswith("gemma")
    return family.scales_embedding or family.head_bias


def _linears(shape: ModelShape, family: Family) -> dict[str, tuple[int, int]]:
    """Output and input size of each linear layer in a decoder layer, by the names of the family's row."""
    # Rows of W for q, and for k or v.
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    hidden, wide = shape.hidden, shape.feed_forward
    attention, mlp = (queries, keys, keys), (wide,) * shape.wide_inputs

    found = {family.attention_output: (hidden, queries), family.mlp_output: (hidden, wide)}
    for names, sizes in ((family.attention_inputs, attention), (family.mlp_inputs, mlp)):
        merged = sizes if len(names) == len(sizes) else (sum(sizes),)
        found |= {name: (rows, hidden) for name, rows in zip(names, merged, strict=True)}
    return found
