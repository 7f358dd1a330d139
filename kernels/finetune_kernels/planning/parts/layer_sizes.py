"""The sizes of single layers of a model whose layers differ (Gemma 4), from its configuration. Pure.

Full layers of Gemma 4 have larger heads than windowed ones, and may have no projection of v: v is k's projection,
before its norm. The last layers may reuse the keys and values that the last layer of their type before them stores;
their MLP may be twice as wide.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from finetune_kernels.planning.family import Family


class LayerSizes(NamedTuple):
    """Sizes of one layer."""

    key_value_heads: int
    head_size: int
    feed_forward: int
    keys_are_values: bool = False
    """True if v is k's projection."""
    sharing: Literal["stores", "reuses"] | None = None
    """What the layer does with keys and values that several layers have; None: they are its own."""

    @property
    def projections(self) -> int:
        """Number of projections beside q's: of k and v."""
        return 0 if self.sharing == "reuses" else 1 if self.keys_are_values else 2


def layer_sizes(config: Any, family: Family | None) -> tuple[LayerSizes, ...]:
    """Returns the sizes of each layer of a text configuration; nothing if all layers are alike."""
    if family is None or not family.layers_differ:
        return ()
    modes = config.kv_sharing_modes
    # The last layer of each type stores keys and values, even if none reuses them.
    is_shared = "reuse" in modes
    kinds = {"store": "stores", "reuse": "reuses"} if is_shared else {}
    wide = 2 if config.use_double_wide_mlp else 1

    return tuple(
        LayerSizes(
            key_value_heads=layer.num_key_value_heads,
            head_size=layer.head_dim,
            feed_forward=config.intermediate_size * (wide if mode == "reuse" else 1),
            keys_are_values=config.attention_k_eq_v and kind == "full_attention",
            sharing=kinds.get(mode),  # type: ignore[arg-type]  # "stores" or "reuses"
        )
        for layer, kind, mode in zip(config.per_layer_config, config.layer_types, modes, strict=True)
    )


def row_of_layer(family: Family, sizes: LayerSizes | None) -> Family:
    """Returns the family's row without what a layer of these sizes lacks: norms and projections of k and v."""
    if sizes is None or sizes.projections == len(family.attention_inputs) - 1:
        return family
    inputs = family.attention_inputs[: 1 + sizes.projections]
    if sizes.projections:
        return replace(family, attention_inputs=inputs)
    return replace(family, attention_inputs=inputs, head_norms=family.head_norms[:1], value_norm=None)
