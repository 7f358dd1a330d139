"""Says from a configuration alone why a model's layers cannot be fused: preflight's answer, and the layer builder's
first question.

What only the modules can tell (a norm of another class, base weights that train) `layer_check.why_not_fused` adds.
"""

from typing import Any, Literal, NamedTuple

from finetune_kernels.planning.families import FAMILIES, family_of_config
from finetune_kernels.planning.family import Family
from finetune_kernels.planning.parts.expert_shape import dense_layers, experts_a_layer

MAX_HEAD_SIZE, MAX_CAPPED_HEAD_SIZE = 512, 256
"""Elements of a head that attention takes, and attention with a softcap, whose kernel is ours."""

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""transformers' name of an activation -> the kernels' name, in an MLP with a gate."""
PLAIN_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "relu2", "xielu"]] = {
    **ACTIVATIONS,
    "relu2": "relu2",
    "xielu": "xielu",
}
"""The same in an MLP without a gate."""

FOREIGN_FACTORS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "key_multiplier",
    "mlp_multipliers",
    "ssm_out_multiplier",
)
"""Fields of configurations that scale embedding, residual stream, scores or logits. A family that does not name one
in its row must not have it: a small model of such a family hides it, as their defaults are mostly 1."""
OTHER_NUMBERS = {
    "clip_qkv": "bounds of q, k and v",
    "router_jitter_noise": "noise before the router while it trains",
    "moe_latent_size": "a projection around the experts",
}
"""Fields of configurations that change what a layer computes and that no row knows -> what they are."""
DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "hidden_dropout")
"""Fields of configurations that drop a part of the base model's own activations while it trains."""
REASONS = {
    "llama4_text": "layers of Llama 4 attend within chunks, and scale and norm queries where they have no RoPE",
    "phimoe": "the router of Phi-MoE draws experts by chance while it trains",
    "flex_olmo": "the outputs of FlexOlmo's experts are normed, and the kernels add them as they are",
    "gemma3n_text": "layers of Gemma 3n have inputs of their own and several residual streams",
}
"""`model_type` of families that were looked at and left -> why."""


PLAIN_ATTENTION = frozenset({
    "bloom", "codegen", "falcon_mamba", "flint", "gemma2", "gpt_neo", "gpt_neox_japanese", "gptj",
    "granite_swa", "granitemoe_swa", "hy_v4", "inkling2_text", "mamba", "mamba2", "mimo_v2_flash", "mpt", "openai-gpt",
    "rwkv", "vaultgemma", "xglm", "xlstm",
})  # fmt: skip
"""`model_type` of models whose layers, where they are not fused, have transformers' plain attention alone: it keeps the
scores of every pair of tokens."""


def why_not_config(config: Any, family: Family | None) -> str | None:
    """Returns why layers of this text configuration cannot be fused, whatever their weights; None if they can.

    `family` is its row, or None for a family without one.
    """
    if family is None:
        model_type = str(getattr(config, "model_type", ""))
        return REASONS.get(model_type, f"the kernels do not know the layers of model type {model_type}")
    if family.model_type in REASONS:
        return REASONS[family.model_type]
    if (factor := foreign_factor(config, family)) is not None:
        return f"{factor} = {getattr(config, factor)} in the configuration, a factor that fused layers do not apply"
    if sees_both_directions(config):
        return "attention in both directions"
    if reason := _why_not_heads(config, family):
        return reason

    known = ACTIVATIONS if family.gated else PLAIN_ACTIVATIONS
    activation = activation_name(config, family)
    if activation not in known:
        return f"activation {activation}, not {' or '.join(known)}"
    dropout = next((name for name in DROPOUTS if getattr(config, name, 0)), None)
    if dropout is not None:
        return f"{dropout} = {getattr(config, dropout)} in the configuration: dropout in the base model"
    other = next((name for name in OTHER_NUMBERS if getattr(config, name, None)), None)
    if other is not None:
        return f"{other} = {getattr(config, other)} in the configuration: {OTHER_NUMBERS[other]}"
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased and "mlp_multipliers" in family.factors:
        return f"{biased[0]} in the configuration: biases beside factors"
    return _why_not_layers(config, family)


def sees_both_directions(config: Any) -> bool:
    """True if tokens of text see those behind them. Gemma 4's "vision" is for tokens of images."""
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _why_not_heads(config: Any, family: Family) -> str | None:
    """Returns why attention's kernels do not take the heads of the configuration."""
    size = head_size(config)
    largest_size = MAX_CAPPED_HEAD_SIZE if family.caps_scores else MAX_HEAD_SIZE
    if size > largest_size or size % 8:
        return f"heads of {size} elements, not of a multiple of 8 up to {largest_size}"
    if family.latent is not None and config.v_head_dim > size:
        return f"heads of {config.v_head_dim} values, more than the {size} elements of q and k"
    return None


def _why_not_layers(config: Any, family: Family) -> str | None:
    """Returns which layers of the configuration have neither attention nor the family's other mixer, or no MLP."""
    if reason := _why_not_experts(config, family):
        return reason
    types = set(getattr(config, "layer_types", None) or ())
    others = set() if family.mixer is None else {family.mixer.layer_type}
    others |= set() if family.block is None else {"mlp", "moe"}
    strange = sorted(types - {"full_attention", "sliding_attention", "attention"} - others)
    if strange:
        return f"layers of type {strange[0]}"
    options = [name for name in ("qk_layernorm", "use_qk_norm") if getattr(config, name, False)]
    if family.head_norms:
        return None
    return f"{options[0]} in the configuration: a LayerNorm of q and k" if options else None


def _why_not_experts(config: Any, family: Family) -> str | None:
    """Returns why layers with experts cannot be fused; None if they can, or if there are none."""
    experts, dense = experts_a_layer(config), dense_layers(config)
    if not experts or (dense is not None and len(dense.layers) == config.num_hidden_layers):
        return None
    if family.mixture is None:
        return f"{experts} experts a layer"
    if getattr(config, "output_router_logits", False):
        return "output_router_logits in the configuration: the load-balancing loss reads what fused layers do not keep"
    return None


def activation_name(config: Any, family: Family) -> str | None:
    """Name of the MLP's activation, as transformers has it; None if the configuration does not say."""
    name = family.activation or getattr(config, family.activation_field, None)
    return None if name is None else str(name)


def why_not_described(config: Any) -> str | None:
    """Returns why layers of a text configuration cannot be fused, by its `model_type`; None if they can."""
    return why_not_config(config, family_of_config(config))


def foreign_factor(config: Any, family: Family | None) -> str | None:
    """Returns the first factor of a model's configuration that its row does not name; None if it has none."""
    known = () if family is None else family.factors
    names = (name for name in FOREIGN_FACTORS if name not in known)
    return next((name for name in names if getattr(config, name, None) is not None), None)


def residual_factor(config: Any, family: Family) -> float:
    """Factor of what each block adds to the residual stream."""
    return float(config.residual_multiplier) if "residual_multiplier" in family.factors else 1.0


def logit_factor(config: Any, family: Family | None) -> float:
    """Factor of the head's outputs."""
    factors = () if family is None else family.factors
    if "logits_scaling" in factors:
        return 1.0 / float(config.logits_scaling)
    name = next((name for name in ("logit_scale", "lm_head_multiplier") if name in factors), None)
    return 1.0 if name is None else float(getattr(config, name))


class BlockFactors(NamedTuple):
    """Factors of Falcon H1's blocks; all are 1 for other families."""

    scores: float = 1.0
    """Factor of attention's scores: of its input, twice, and of the keys."""
    attention: float = 1.0
    """Factor of attention's output: of its input, which the values have, and of the output itself."""
    mixer: float = 1.0
    gate: float = 1.0
    """Factor of the MLP's gate, before its activation."""
    mlp: float = 1.0


def block_factors(config: Any, family: Family) -> BlockFactors:
    """Returns the factors of a model's blocks."""
    if "mlp_multipliers" not in family.factors:
        return BlockFactors()
    entry, (gate, down) = config.attention_in_multiplier, config.mlp_multipliers
    scores, attention = entry * entry * config.key_multiplier, entry * config.attention_out_multiplier
    return BlockFactors(scores, attention, config.ssm_out_multiplier, gate, down)


def largest(config: Any, name: str) -> Any:
    """Setting of a configuration, the largest of its layers where they differ (heads of Gemma 4); None if absent."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return max(getattr(layer, name) for layer in config.per_layer_config)
    value = getattr(config, name, None)
    return max(value) if isinstance(value, list | tuple) else value  # Gemma 3n lists a size for each layer


def head_size(config: Any) -> int:
    """Elements of a head of q and k, the largest where layers differ."""
    if isinstance(largest(config, "kv_lora_rank"), int):
        return int(largest(config, "qk_nope_head_dim") + largest(config, "qk_rope_head_dim"))
    return int(largest(config, "head_dim") or config.hidden_size // (largest(config, "num_attention_heads") or 1))


def feed_forward_size(config: Any, field: str) -> int | None:
    """Returns the width of the MLP, the largest of a model whose layers differ; None if the configuration has no such
    `field`. LFM2 makes another one of what its configuration says."""
    width = largest(config, field)
    if width is None or not getattr(config, "block_auto_adjust_ff_dim", False):
        return width  # type: ignore[no-any-return]
    adjusted, multiple = int(config.block_ffn_dim_multiplier * int(2 * width / 3)), config.block_multiple_of
    return int(multiple * -(-adjusted // multiple))


def fused_families() -> tuple[str, ...]:
    """`model_type` of every family whose layers are fused, in alphabetical order: the list in the documents."""
    return tuple(sorted(family.model_type for family in FAMILIES if family.model_type not in REASONS))
