"""The sizes of a model that memory and time depend on, and the formulas over them.

They come from a loaded model's counted parameters or from its configuration alone (`config` is transformers' text
configuration, of which only numbers are read).

    bytes as loaded = 16-bit embeddings, head and norms + linears (NF4: half a byte and a scale for each 64 weights)
                      + adapters in fp32
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.block_sizes import CHUNK_ROWS, HEAD_ROWS, TILE_ROWS, VOCABULARY_BLOCK
from finetune_kernels.planning.families import family_of_type

BYTES = 2
"""Bytes of one element in 16 bits."""
NF4_BLOCK, SCALES_BLOCK = 64, 256
"""NF4 weights per scale; scales per scale of their own (double quantisation)."""
ADAPTER_BYTES = 4
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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
    dropout: bool = False
    """True if adapters drop a part of their inputs."""
    magnitudes: bool = False
    """True if adapters have DoRA's magnitudes."""

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
            elements += self.heads * self.head_size + self.hidden + self.attention_width + 2 * (self.heads + 2)
            elements += 2 * (self.hidden + 2) if self.second_norms else 0
        if policy is ActivationPolicy.SAVE_ALL:
            elements += 2 * self.feed_forward  # gate and up

        return elements * BYTES

    def recomputed_flop(self, policy: ActivationPolicy) -> float:
        """FLOP per token and layer that backward spends on recomputing."""
        gate_up = 4.0 * self.hidden * self.feed_forward
        if policy is ActivationPolicy.SAVE_ALL:
            return 0.0
        if policy is ActivationPolicy.RECOMPUTE_MLP:
            return gate_up

        attention = 2.0 * self.hidden * (self.attention_width + self.heads * self.head_size)
        return gate_up + attention + (gate_up / 2 if self.second_norms else 0.0)

    def working_bytes(self, tokens: int, *, tiled: bool) -> int:
        """Bytes that one layer's backward needs beside what is saved; `tiled`: the MLP takes `TILE_ROWS` at a time."""
        q, stream = self.heads * self.head_size, self.hidden
        # gate, up, their gradients and the activation's. A sixth is what dropout leaves of the activation, or the
        # gradients of gate and up times DoRA's factors (by then the activation is released).
        wide = (6 if self.dropout or self.magnitudes else 5) * self.feed_forward
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
    """Returns the shape of a model whose parameters were counted."""
    family = family_of_type(_model_type(config))
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        linear_parameters=counts.linears,
        adapter_parameters=counts.adapters,
        quantized=counts.quantized,
        movable_bytes=counts.movable_bytes,
        second_norms=family is not None and family.second_norms,
        dropout=dropout,
        magnitudes=magnitudes,
    )


def shape_from_config(
    config: Any, targets: Collection[str], rank: int, *, quantized: bool, dropout: bool = False,
    magnitudes: bool = False,
) -> ModelShape | None:  # fmt: skip
    """Returns the shape of a model that is not loaded, with an adapter on `targets`.

    None if the architecture does not have the seven standard projections (mixtures of experts and others).
    """
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    if any(not isinstance(getattr(config, name, None), int) for name in needed):
        return None
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None

    uncounted = build_shape(config, ParameterCounts(0, 0, quantized, 0))
    linears = _linears(uncounted)
    adapted = {part for name in targets for part in _PARTS.get(name, (name,))} & set(linears)
    if "all-linear" in targets:
        adapted = set(linears)

    # A [r, in], B [out, r] and, for DoRA, m [out]
    adapter = {name: rank * (rows + columns) + (rows if magnitudes else 0) for name, (rows, columns) in linears.items()}
    counts = ParameterCounts(
        linears=uncounted.layers * sum(rows * columns for rows, columns in linears.values()),
        adapters=uncounted.layers * sum(adapter[name] for name in adapted),
        quantized=quantized,
        movable_bytes=0 if _scales_embedding(config) else _vocabulary_bytes(config, uncounted),
    )
    return build_shape(config, counts, dropout=dropout, magnitudes=magnitudes)


def loaded_bytes(config: Any, shape: ModelShape, *, double_quantized: bool) -> int:
    """Bytes of the weights once they are loaded, adapters included."""
    # Embedding, head, and two norms a layer plus the last one.
    others = _vocabulary_bytes(config, shape) + (2 * shape.layers + 1) * shape.hidden * BYTES
    linears = shape.linear_parameters * BYTES

    if shape.quantized:
        scales = shape.linear_parameters // NF4_BLOCK
        linears = shape.linear_parameters // 2 + (
            scales + 4 * scales // SCALES_BLOCK if double_quantized else 4 * scales
        )

    return linears + others + shape.adapter_parameters * ADAPTER_BYTES


def _model_type(config: Any) -> str:
    return str(getattr(config, "model_type", ""))


def _vocabulary_bytes(config: Any, shape: ModelShape) -> int:
    """Bytes of embedding and head, which may be one tensor."""
    tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
    return tables * shape.vocabulary * shape.hidden * BYTES


def _scales_embedding(config: Any) -> bool:
    """True if the embedding is a module of the family's own, which stays on the GPU."""
    family = family_of_type(_model_type(config))
    # Gemmas without a row (the first, 3n) scale their embedding, too.
    return _model_type(config).startswith("gemma") if family is None else family.scales_embedding


def _linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Output and input size of each linear layer in a decoder layer."""
    # Rows of W for q, and for k or v.
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    hidden, wide = shape.hidden, shape.feed_forward
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }
