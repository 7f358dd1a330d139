"""Says why layers of a transformers model cannot be built as `DecoderLayer`s: each is compared with its family's row.

What is let through can be built: a module that is missing, of another class, or that the row does not name is a reason,
never a guess.
"""

from typing import Any

from torch import nn

from finetune_kernels.layers.patching import has_dora, why_not_adapter
from finetune_kernels.planning.families import family_of
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.fused_support import head_size, why_not_config
from finetune_kernels.planning.parts.expert_shape import dense_layers, experts_a_layer
from finetune_kernels.planning.parts.latent_shape import LatentShape, latent_shape
from finetune_kernels.planning.parts.layer_sizes import LayerSizes, layer_sizes, row_of_layer


def why_not_fused(causal: Any) -> str | None:
    """Returns why the layers of this transformers model cannot be built; None if they can."""
    config, family = causal.config, family_of(causal)
    if (reason := why_not_config(config, family)) is not None or family is None:
        return reason

    sizes = layer_sizes(config, family)
    each = sizes or (None,) * config.num_hidden_layers
    rows = [row_of_layer(family, of_layer) for of_layer in each]
    reasons = (
        _why_not_place(index, layer, row, config)
        or _why_not_layer(layer, row)
        or _why_not_sizes(layer, row, config, of_layer)
        for index, (layer, row, of_layer) in enumerate(zip(causal.model.layers, rows, each, strict=True))
    )
    return next((reason for reason in reasons if reason is not None), None)


def has_mixer(layer: Any, family: Family) -> bool:
    """True if a layer has the family's other mixer in attention's place."""
    return family.mixer is not None and getattr(layer, family.mixer.name, None) is not None


def has_mixture(layer: Any, family: Family) -> bool:
    """True if a layer has the family's experts in the MLP's place."""
    if family.mixture is None:
        return False
    block = getattr(layer, family.mixture.block, None) if family.mixture.block else layer
    return getattr(block, "experts", None) is not None


def _why_not_layer(layer: Any, family: Family) -> str | None:
    """Compares one layer with its family's row."""
    modules, mixer, mixture = dict(layer.named_modules()), has_mixer(layer, family), has_mixture(layer, family)
    expected = family.modules(mixer=mixer, mixture=mixture)

    # Every module that the builder will ask for.
    for name, kind in expected.items():
        if name not in modules:
            return f"{type(layer).__name__} has no {name}"
        if kind is not None and type(modules[name]).__name__ != kind:
            return f"{name} is {type(modules[name]).__name__}, not {kind}"
    if reason := _unknown_module(modules, expected, family):
        return reason

    if (reason := _why_trains(modules, expected, family)) is not None:
        return reason
    has_factors = "mlp_multipliers" in family.factors
    for name in (name for name, kind in expected.items() if kind is None):
        projection = modules[name]
        if has_factors and hasattr(projection, "lora_A") and has_dora(projection):
            return "DoRA beside factors"
        reason = why_not_adapter(projection) if hasattr(projection, "lora_A") else _why_not_plain(projection)
        if reason is not None:
            return reason
    return None


def _why_trains(modules: dict[str, Any], expected: dict[str, str | None], family: Family) -> str | None:
    """Returns which weights beside the adapters' would train; None if there are none."""
    if any(modules[name].weight.requires_grad for name in expected if name in family.norms):
        return "norm weights that train"
    if family.has_sinks and modules[family.attention_name].sinks.requires_grad:
        return "sinks that train"
    router = None if family.mixture is None else family.mixture.router
    trains = router in expected and any(value.requires_grad for value in modules[str(router)].parameters())
    return "router weights that train" if trains else None


def _why_not_place(index: int, layer: Any, family: Family, config: Any) -> str | None:
    """Compares the place of a mixture's layers with MLPs with the configuration, by which memory is planned."""
    if family.mixture is None or not experts_a_layer(config):
        return None
    dense = dense_layers(config)
    is_dense = dense is not None and index in dense.layers
    if has_mixture(layer, family) != is_dense:
        return None
    return f"layer {index} has {'experts' if is_dense else 'an MLP'}, unlike what the configuration says"


def _why_not_sizes(layer: Any, family: Family, config: Any, sizes: LayerSizes | None) -> str | None:
    """Compares the sizes of one layer with the configuration: each layer with attention has the same heads, if it has
    no `sizes` of its own."""
    if not family.has_attention(mixer=has_mixer(layer, family)):
        return None
    attention = getattr(layer, family.attention_name)
    if (latent := latent_shape(config, family)) is not None:
        return _why_not_latent(attention, latent, family)

    size = head_size(config) if sizes is None else sizes.head_size
    key = (config.num_key_value_heads if sizes is None else sizes.key_value_heads) * size
    query = config.num_attention_heads * size
    projections = 2 if sizes is None else sizes.projections
    wanted_outputs = (2 if family.gates_heads else 1) * query + projections * key
    found = sum(getattr(attention, name).out_features for name in family.attention_inputs)
    if found != wanted_outputs:
        return f"{found} outputs for q, k and v, not {wanted_outputs} as the configuration says"

    wanted = (query, key) if family.head_norm_place == "row" else (size, size)
    for name, width in zip(family.head_norms, wanted, strict=False):
        if (found := getattr(attention, name).weight.numel()) != width:
            return f"{family.attention_name}.{name} has {found} weights, not {width}"
    return None


def _why_not_latent(attention: Any, shape: LatentShape, family: Family) -> str | None:
    """Compares the sizes of latent attention with the configuration."""
    for name, (rows, columns) in shape.linears(family).items():
        linear = getattr(attention, name)
        if (linear.out_features, linear.in_features) != (rows, columns):
            return f"self_attn.{name} is {linear.out_features} x {linear.in_features}, not {rows} x {columns}"

    norms = () if family.latent is None else family.latent.norms
    for name, width in zip(norms, (shape.query_rank, shape.rank)[-len(norms) :], strict=True):
        if (found := getattr(attention, name).weight.numel()) != width:
            return f"self_attn.{name} has {found} weights, not {width}"
    return None


def _unknown_module(modules: dict[str, Any], expected: dict[str, str | None], family: Family) -> str | None:
    """Returns a module with numbers of its own that the row does not name, or that drops activations; None if there is
    none."""
    linears = tuple(name for name, kind in expected.items() if kind is None)
    whole = tuple(name for name in expected if name in family.whole_modules)
    parts = tuple(f"{name}." for name in (*linears, *whole))
    for name, module in modules.items():
        # Parts of linear layers are peft's, those of the mixer and of the router transformers', the experts' ours.
        if name in (*family.norms, *linears, *whole) or name.startswith(parts):
            continue

        place = name or type(module).__name__
        if isinstance(module, nn.Dropout) and module.p:
            return f"{place} drops activations of the base model"
        own = {key for key, value in (module._parameters | module._buffers).items() if value is not None}
        if own - set(family.own_tensors.get(name, ())) and name != f"{family.mlp_name}.act_fn":
            what = "norm" if "Norm" in type(module).__name__ else "module"
            return f"{place} is a {what} that other {family.prefix} models do not have"
    return None


def _why_not_plain(projection: Any) -> str | None:
    if not isinstance(projection, nn.Linear):
        return f"a projection is {type(projection).__name__}, not a linear layer"
    return "base weights that train" if projection.weight.requires_grad else None
