"""The sizes of single layers of a model whose layers differ (Gemma 4, Nemotron H), from its configuration. Pure.

Full layers of Gemma 4 have larger heads than windowed ones, and may have no projection of v: v is k's projection,
before its norm. The last layers may reuse the keys and values that the last layer of their type before them stores;
their MLP may be twice as wide. Layers of Nemotron H have one block each; the sizes of others are 0 there.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from finetune_kernels.planning.family import Family

Sharing = Literal["stores", "reuses"] | None


class LayerSizes(NamedTuple):
    """Sizes of one layer."""

    key_value_heads: int
    head_size: int
    feed_forward: int
    keys_are_values: bool = False
    """True if v is k's projection."""
    sharing: Sharing = None
    """What the layer does with keys and values that several layers have; None: they are its own."""
    block: Literal["attention", "mixer", "mlp", "experts"] | None = None
    """The layer's one block; None: it has two."""

    @property
    def projections(self) -> int:
        """Number of projections beside q's: of k and v."""
        return 0 if self.sharing == "reuses" else 1 if self.keys_are_values else 2


def layer_sizes(config: Any, family: Family | None) -> tuple[LayerSizes, ...]:
    """Returns the sizes of each layer of a text configuration; nothing if all layers are alike."""
    if family is not None and family.block is not None:
        return tuple(_with_one_block(config, kind) for kind in config.layer_types)
    if family is None or not family.layers_differ:
        return ()
    sharing = _sharing(config.layer_types, config.num_kv_shared_layers)
    wide = 2 if config.use_double_wide_mlp else 1

    return tuple(
        LayerSizes(
            key_value_heads=layer.num_key_value_heads,
            head_size=layer.head_dim,
            feed_forward=config.intermediate_size * (wide if shares == "reuses" else 1),
            keys_are_values=config.attention_k_eq_v and kind == "full_attention",
            sharing=shares,
        )
        for layer, kind, shares in zip(config.per_layer_config, config.layer_types, sharing, strict=True)
    )


def _sharing(kinds: Sequence[str], reusing: int) -> list[Sharing]:
    """Returns what each layer does with shared keys and values: the last `reusing` layers reuse those that the last
    layer of their kind before them stores. `kinds`: layer_types of the configuration."""
    own = len(kinds) - reusing
    stores = {max(place for place in range(own) if kinds[place] == kind) for kind in kinds[own:]}
    return ["reuses" if place >= own else "stores" if place in stores else None for place in range(len(kinds))]


def _with_one_block(config: Any, layer_type: str) -> LayerSizes:
    """The sizes of a layer of Nemotron H."""
    none = LayerSizes(key_value_heads=0, head_size=0, feed_forward=0)
    if layer_type == "mlp":
        return none._replace(feed_forward=config.intermediate_size, block="mlp")
    if layer_type == "full_attention":
        return none._replace(key_value_heads=config.num_key_value_heads, head_size=config.head_dim, block="attention")
    if layer_type == "moe":
        return none._replace(feed_forward=config.moe_shared_expert_intermediate_size, block="experts")

    return none._replace(block="mixer")


def row_of_layer(family: Family, sizes: LayerSizes | None) -> Family:
    """Returns the family's row without what a layer of these sizes lacks: norms and projections of k and v, or all
    blocks but one."""
    if sizes is not None and sizes.block is not None:
        mixer = family.mixer if sizes.block == "mixer" else None

        return replace(
            family, block=sizes.block, mixer=mixer, mixture=family.mixture if sizes.block == "experts" else None
        )
    if sizes is None or sizes.projections == len(family.attention_inputs) - 1:
        return family
    inputs = family.attention_inputs[: 1 + sizes.projections]
    if sizes.projections:
        return replace(family, attention_inputs=inputs)
    return replace(family, attention_inputs=inputs, head_norms=family.head_norms[:1], value_norm=None)
