"""The sizes that a memory plan needs, from a model's configuration alone. Pure; `config` is transformers' text
configuration, of which only numbers are read.

    bytes as loaded = 16-bit embeddings, head and norms + linears (NF4: half a byte and a scale for each 64 weights)
                      + adapters in fp32
"""

from collections.abc import Collection
from typing import Any

from finetune_kernels.planning.memory_plan import BYTES, ModelShape

BLOCK, SCALES_BLOCK = 64, 256  # NF4 weights per scale; scales per scale of their own (double quantisation)
ADAPTER_BYTES = 4
SECOND_NORMS = ("gemma2", "gemma3")  # model types whose layers norm what each half adds
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def build_shape(
    config: Any, *, linear_parameters: int, adapter_parameters: int, quantized: bool, movable_bytes: int,
    dropout: bool = False, magnitudes: bool = False,
) -> ModelShape:  # fmt: skip
    """The shape of a model whose parameters were counted."""
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        linear_parameters=linear_parameters,
        adapter_parameters=adapter_parameters,
        quantized=quantized,
        movable_bytes=movable_bytes,
        second_norms=str(getattr(config, "model_type", "")).startswith(SECOND_NORMS),
        dropout=dropout,
        magnitudes=magnitudes,
    )


def shape_from_config(
    config: Any, targets: Collection[str], rank: int, *, quantized: bool, dropout: bool = False,
    magnitudes: bool = False,
) -> ModelShape | None:  # fmt: skip
    """The shape of a model that is not loaded, with an adapter on `targets`; None for layers that are not seven
    linears (mixtures of experts, other architectures)."""
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    if any(not isinstance(getattr(config, name, None), int) for name in needed):
        return None
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None
    empty = build_shape(config, linear_parameters=0, adapter_parameters=0, quantized=quantized, movable_bytes=0)
    linears = _linears(empty)
    adapted = {part for name in targets for part in _PARTS.get(name, (name,))} & set(linears)
    if "all-linear" in targets:
        adapted = set(linears)
    each = {name: rank * (rows + columns) + (rows if magnitudes else 0) for name, (rows, columns) in linears.items()}
    return build_shape(
        config,
        linear_parameters=empty.layers * sum(rows * columns for rows, columns in linears.values()),
        adapter_parameters=empty.layers * sum(each[name] for name in adapted),
        quantized=quantized,
        movable_bytes=0 if _scales_embedding(config) else _vocabulary_bytes(config, empty),
        dropout=dropout,
        magnitudes=magnitudes,
    )


def loaded_bytes(config: Any, shape: ModelShape, *, double_quantized: bool) -> int:
    """Memory of the weights once they are loaded, adapters included."""
    others = _vocabulary_bytes(config, shape) + (2 * shape.layers + 1) * shape.hidden * BYTES
    linears = shape.linear_parameters * BYTES
    if shape.quantized:
        scales = shape.linear_parameters // BLOCK
        linears = shape.linear_parameters // 2 + (
            scales + 4 * scales // SCALES_BLOCK if double_quantized else 4 * scales
        )
    return linears + others + shape.adapter_parameters * ADAPTER_BYTES


def _vocabulary_bytes(config: Any, shape: ModelShape) -> int:
    """Of embedding and head, which may be one."""
    tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
    return tables * shape.vocabulary * shape.hidden * BYTES


def _scales_embedding(config: Any) -> bool:
    """Whether the embedding is a module of the family's own, which stays on the GPU."""
    return str(getattr(config, "model_type", "")).startswith("gemma")


def _linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Output and input size of a layer's linears."""
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
