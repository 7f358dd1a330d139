"""Mixtures of experts as metadata: how many experts a layer has, and which layers have none. Needs no PyTorch."""

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.layers.kinds import has_expert_layers

EXPERT_COUNTS = (
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")),
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk")),
    ("expert_group_count", ("n_group",)),
    ("expert_group_used_count", ("topk_group",)),
)
"""Methods of GGUFWriter for mixtures of experts, with the names that config.json has for what they write."""
LAYER_KINDS, DENSE = "mlp_layer_types", "dense"
"""Which layers have experts, one by one, and the word for one that has none."""
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Names of the number of first layers without experts; they count where LAYER_KINDS is not set."""
LAST = "moe_layer_end_index"
"""The last layer that may have experts (Ernie 4.5)."""


def count_experts(config: Mapping[str, Any]) -> int:
    """Experts of a layer; 0 for a model without."""
    if has_expert_layers(config) is False:
        return 0  # Nemotron H has a number of experts all the same
    names = EXPERT_COUNTS[0][1]
    return next((_of_every_layer(name, config[name]) for name in names if config.get(name)), 0)


def add_experts(writer: GGUFWriter, family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Write the numbers of experts and, if llama.cpp wants it, of the first layers without."""
    if has_expert_layers(config) is False:
        return
    for add, names in EXPERT_COUNTS:
        found = next((name for name in names if config.get(name) is not None), None)
        if found is not None:
            getattr(writer, f"add_{add}")(_of_every_layer(found, config[found]))

    if family.leading_dense:
        writer.add_leading_dense_block_count(_count_leading(config))


def check_layers_without_experts(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedArchitectureError if llama.cpp has experts in other layers than config.json."""
    last, layers = config.get(LAST), config["num_hidden_layers"]
    if last is not None and last < layers - 1:
        raise UnsupportedArchitectureError(
            f"llama.cpp has experts in the last layers of this architecture, too, but config.json has {LAST} {last} "
            f"and {layers} layers: export without GGUF"
        )

    kinds = config.get(LAYER_KINDS)
    if kinds is None:
        return

    leading = _count_leading(config) if family.leading_dense else 0
    if DENSE in kinds[leading:]:
        where = "the first layers" if family.leading_dense else "no layer"
        raise UnsupportedArchitectureError(
            f"llama.cpp leaves experts out of {where} of this architecture only, but config.json has {LAYER_KINDS} "
            f"{kinds}: export without GGUF"
        )


def _of_every_layer(name: str, value: int | list[int]) -> int:
    """A number of experts that may be given for each layer (Hunyuan), as the one number that llama.cpp reads."""
    numbers = value if isinstance(value, list) else [value]
    if len(set(numbers)) != 1:
        raise UnsupportedArchitectureError(
            f"llama.cpp has as many experts in every layer, but config.json has {name} {value}: export without GGUF"
        )
    return int(numbers[0])


def _count_leading(config: Mapping[str, Any]) -> int:
    """The number of first layers without experts."""
    kinds = config.get(LAYER_KINDS)
    if kinds is None:
        return int(next(config[name] for name in LEADING if config.get(name) is not None))
    return next((index for index, kind in enumerate(kinds) if kind != DENSE), len(kinds))
