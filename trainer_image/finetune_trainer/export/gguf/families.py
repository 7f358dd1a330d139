"""The model families that GGUF files are written for: one row each, and no class per family.

Source: the model code of transformers (what a weight means) and llama.cpp's graphs (what it expects). A family gets
its row once a parity test against llama.cpp covers it; `tests/trainer/export/gguf/test_families.py` lists what a row
lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from gguf import MODEL_ARCH, ExpertGatingFuncType

from finetune_trainer.export.errors import UnsupportedArchitectureError

log = getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A stored tensor that llama.cpp has as several tensors, or with its last two dimensions swapped."""

    into: tuple[str, ...]
    """The ends of names that take the place of the stored tensor's."""
    transposed: bool = False
    """The last two dimensions are swapped first."""
    interleaved: bool = False
    """Rows take turns; else each part has its rows together."""
    per_head: tuple[str, ...] = ()
    """Settings of config.json with each part's rows in a head, where every head has rows of each part. The first part
    is turned over: [heads, columns, rows]."""


@dataclass(frozen=True)
class GgufFamily:
    """The differences between a Hugging Face `model_type` and its llama.cpp architecture."""

    architecture: MODEL_ARCH
    """llama.cpp's architecture, which also gives the names of the tensors."""
    permuted_heads: bool = False
    """The rows of q and k go from RoPE's halves to interleaved pairs."""
    norm_offset: float = 0.0
    """Added to norm weights: Hugging Face stores them around 0, GGUF around 1."""
    sliding_window: bool = False
    """llama.cpp wants the window's size: some layers attend within a sliding window."""
    rope_dimensions: bool = False
    """llama.cpp wants the number of rotated dimensions of a head."""
    fixed_scale_layers: int | None = None
    """Number of layers at which llama.cpp's attention scale, 1/sqrt(head size), becomes 1/sqrt(hidden/heads).

    None: llama.cpp does not hard-code the scale of this architecture.
    """
    window_period: int | None = None
    """Every n-th layer attends fully, which llama.cpp hard-codes; None: no layer has a window there."""
    window_pattern: bool = False
    """llama.cpp is told which layers attend within a window."""
    windowed_layers: int | None = None
    """The number of layers of the one size that llama.cpp computes windows for; None: of every size."""
    no_rope_period: int | None = None
    """Every n-th layer has no RoPE, which llama.cpp hard-codes; None: every layer has."""
    activation: str = "silu"
    """The activation that gates the MLP, which llama.cpp hard-codes."""
    rope_tensors: bool = False
    """llama.cpp takes divisors of RoPE's frequencies from tensors."""
    names_longrope: bool = True
    """The scaling type must be written for llama.cpp to look for the short and long divisors."""
    original_context: bool = False
    """The context length before scaling is always written."""
    scaled_rope: bool = True
    """False: llama.cpp is told that RoPE is never scaled."""
    feed_forward: str = "intermediate_size"
    """The setting that has the width of MLPs outside experts."""
    equal_heads: bool = False
    """llama.cpp expects as many heads of keys and values as of queries."""
    cut_ramp: bool = True
    """False: a YaRN ramp that transformers does not truncate is accepted, although llama.cpp truncates it."""
    latent_attention: bool = False
    """Keys and values are made from one low-rank state (DeepSeek's MLA)."""
    yarn_log: str | None = None
    """The RoPE setting that llama.cpp takes YaRN's weight on the logarithm from; None: it takes the factor itself."""
    splits: Mapping[str, Split] = field(default_factory=dict)
    """By the end of the stored tensor's name."""
    arrays: Mapping[str, str] = field(default_factory=dict)
    """End of the name of a scalar that every layer has -> the method of GGUFWriter that writes all of them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Setting of config.json -> the method of GGUFWriter that writes it; settings that are null are left out."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Method of GGUFWriter -> a value that all models of the family have."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.json whose value llama.cpp hard-codes, with that value."""


_GATE_UP = ("experts.gate_proj.weight", "experts.up_proj.weight")
_LATENT_SPLIT = Split(
    ("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"), per_head=("qk_nope_head_dim", "v_head_dim")
)
_SHARED_EXPERT_SPLITS = {
    "block_sparse_moe.input_linear.weight": Split(("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")),
    "shared_mlp.input_linear.weight": Split(("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight")),
}
_GRANITE_SCALES = {
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_EXPERT_WIDTHS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_ROUTED = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}
_LATENT: dict[str, Any] = {
    "latent_attention": True,
    "rope_dimensions": True,
    "splits": {"self_attn.kv_b_proj.weight": _LATENT_SPLIT},
    "settings": _ROUTED,
}
TANH_GELU = "gelu_pytorch_tanh"
_LLAMA: dict[str, Any] = {"permuted_heads": True, "rope_dimensions": True, "rope_tensors": True}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": TANH_GELU}
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, **_LLAMA),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, **_LLAMA),
    "ministral3": GgufFamily(
        MODEL_ARCH.MISTRAL3,
        yarn_log="mscale_all_dim",
        settings={"llama_4_scaling_beta": "attn_temperature_scale"},
        **_LLAMA,
    ),
    "smollm3": GgufFamily(MODEL_ARCH.SMOLLM3, no_rope_period=4, **_LLAMA),
    "granite": GgufFamily(
        MODEL_ARCH.GRANITE,
        permuted_heads=True,
        rope_dimensions=True,
        fixed={"head_dim": None},
        settings=_GRANITE_SCALES,
    ),
    "arcee": GgufFamily(MODEL_ARCH.ARCEE, activation="relu2", **_LLAMA),
    "seed_oss": GgufFamily(MODEL_ARCH.SEED_OSS, fixed={"mlp_bias": False}),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "olmo2": GgufFamily(MODEL_ARCH.OLMO2),
    "olmo3": GgufFamily(MODEL_ARCH.OLMO2, window_pattern=True),
    "exaone4": GgufFamily(
        MODEL_ARCH.EXAONE4, rope_tensors=True, window_pattern=True, window_period=4, windowed_layers=64
    ),
    "ernie4_5": GgufFamily(MODEL_ARCH.ERNIE4_5, fixed={"use_bias": False}),
    "hunyuan_v1_dense": GgufFamily(MODEL_ARCH.HUNYUAN_DENSE),
    "glm4": GgufFamily(MODEL_ARCH.GLM4, rope_dimensions=True),
    "cohere2": GgufFamily(
        MODEL_ARCH.COHERE2,
        sliding_window=True,
        window_period=4,
        rope_dimensions=True,
        scaled_rope=False,
        settings={"logit_scale": "logit_scale"},
        fixed={"tie_word_embeddings": True, "attention_bias": False},
    ),
    "starcoder2": GgufFamily(MODEL_ARCH.STARCODER2, activation=TANH_GELU, fixed={"use_bias": True}),
    "apertus": GgufFamily(
        MODEL_ARCH.APERTUS,
        activation="xielu",
        rope_dimensions=True,
        rope_tensors=True,
        arrays={f".act_fn.{name}": f"xielu_{name}" for name in ("alpha_n", "alpha_p", "beta", "eps")},
    ),
    "phi": GgufFamily(MODEL_ARCH.PHI2, activation="gelu_new", rope_dimensions=True, fixed={"qk_layernorm": False}),
    "stablelm": GgufFamily(
        MODEL_ARCH.STABLELM,
        rope_dimensions=True,
        settings={"use_parallel_residual": "parallel_residual"},
        fixed={"qk_layernorm": False},
    ),
    "mixtral": GgufFamily(MODEL_ARCH.LLAMA, **_LLAMA),
    "olmoe": GgufFamily(MODEL_ARCH.OLMOE, fixed={"clip_qkv": None, "norm_topk_prob": False, "attention_bias": False}),
    "qwen2_moe": GgufFamily(
        MODEL_ARCH.QWEN2MOE,
        settings=_EXPERT_WIDTHS,
        fixed={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3_moe": GgufFamily(
        MODEL_ARCH.QWEN3MOE,
        settings=_EXPERT_WIDTHS,
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "granitemoe": GgufFamily(
        MODEL_ARCH.GRANITE_MOE,
        permuted_heads=True,
        rope_dimensions=True,
        splits=_SHARED_EXPERT_SPLITS,
        fixed={"head_dim": None},
        settings=_GRANITE_SCALES | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
    ),
    "gpt_oss": GgufFamily(
        MODEL_ARCH.GPT_OSS,
        sliding_window=True,
        window_period=2,
        splits={
            "experts.gate_up_proj": Split(_GATE_UP, transposed=True, interleaved=True),
            "experts.gate_up_proj_bias": Split(("experts.gate_proj.bias", "experts.up_proj.bias"), interleaved=True),
            "experts.down_proj": Split(("experts.down_proj.weight",), transposed=True),
        },
        settings={"intermediate_size": "expert_feed_forward_length"},
        cut_ramp=False,
    ),
    "llama4_text": GgufFamily(
        MODEL_ARCH.LLAMA4,
        rope_dimensions=True,
        rope_tensors=True,
        no_rope_period=4,
        feed_forward="intermediate_size_mlp",
        splits={
            "experts.gate_up_proj": Split(_GATE_UP, transposed=True),
            "experts.down_proj": Split(("experts.down_proj.weight",), transposed=True),
        },
        settings={
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "intermediate_size": "expert_feed_forward_length",
        },
    ),
    "glm4_moe": GgufFamily(
        MODEL_ARCH.GLM4_MOE,
        rope_dimensions=True,
        settings=_ROUTED,
        constants={"expert_gating_func": ExpertGatingFuncType.SIGMOID},
    ),
    "deepseek_v2": GgufFamily(
        MODEL_ARCH.DEEPSEEK2,
        constants={"expert_gating_func": ExpertGatingFuncType.SOFTMAX},
        fixed={"topk_method": "greedy", "norm_topk_prob": False},
        **_LATENT,
    ),
    "deepseek_v3": GgufFamily(
        MODEL_ARCH.DEEPSEEK2, constants={"expert_gating_func": ExpertGatingFuncType.SIGMOID}, **_LATENT
    ),
    "gemma": GgufFamily(MODEL_ARCH.GEMMA, fixed={"tie_word_embeddings": True}, **_GEMMA),
    "gemma2": GgufFamily(MODEL_ARCH.GEMMA2, sliding_window=True, fixed_scale_layers=46, window_period=2, **_GEMMA),
    "gemma3_text": GgufFamily(MODEL_ARCH.GEMMA3, sliding_window=True, fixed_scale_layers=62, window_period=6, **_GEMMA),
    "phi3": GgufFamily(
        MODEL_ARCH.PHI3,
        sliding_window=True,
        rope_dimensions=True,
        rope_tensors=True,
        names_longrope=False,
        original_context=True,
    ),
}
"""By `model_type` of config.json."""


def find_family(config: Mapping[str, Any]) -> GgufFamily:
    """Find the family of a full config.

    Raises UnsupportedArchitectureError if there is none, or if a setting has no equal in llama.cpp.
    """
    model_type = config.get("model_type")
    family = GGUF_FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedArchitectureError(
            f"model_type {model_type!r} in config.json has no GGUF conversion: use {', '.join(GGUF_FAMILIES)}, "
            "or export without GGUF"
        )

    _check_activation(family, config)
    _check_fixed(family, config)
    _check_attention_scale(family, config)
    _check_windows(family, config)
    return family


def _check_activation(family: GgufFamily, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config["hidden_act"]
    if found != family.activation:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes {family.activation} in this architecture, but config.json asks for {found!r}: "
            "export without GGUF"
        )


def _check_fixed(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise for a setting, or for layers without RoPE, that llama.cpp computes otherwise."""
    for key, value in family.fixed.items():
        if config.get(key) is not None and config[key] != value:
            raise UnsupportedArchitectureError(
                f"llama.cpp computes this architecture {_as_if(key, value)}, but config.json has {key} "
                f"{config[key]!r}: export without GGUF"
            )

    if family.equal_heads and config["num_key_value_heads"] != config["num_attention_heads"]:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes this architecture with as many key and value heads as query heads, but config.json "
            f"has num_key_value_heads {config['num_key_value_heads']} and num_attention_heads "
            f"{config['num_attention_heads']}: export without GGUF"
        )

    layers, period = config.get("no_rope_layers"), family.no_rope_period
    if layers is not None and period is not None:
        expected = [int((layer + 1) % period != 0) for layer in range(len(layers))]
        if [int(each) for each in layers] != expected:
            raise UnsupportedArchitectureError(
                f"llama.cpp leaves RoPE out of every {period}th layer of this architecture, but config.json has "
                f"no_rope_layers {layers}: export without GGUF"
            )


def _as_if(key: str, value: object) -> str:
    return f"without {key}" if value in (None, False) else f"with {key} {value}"


def _check_attention_scale(family: GgufFamily, config: Mapping[str, Any]) -> None:
    if family.fixed_scale_layers is None:
        return

    size = config["head_dim"]
    if config["num_hidden_layers"] == family.fixed_scale_layers:
        size = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] != size:
        raise UnsupportedArchitectureError(
            f"llama.cpp scales the attention of this architecture by 1/sqrt({size}), "
            f"but config.json asks for query_pre_attn_scalar {config['query_pre_attn_scalar']}: export without GGUF"
        )


def _check_windows(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise if llama.cpp's windowed layers are others than the config's; warn if llama.cpp has no windows at all."""
    layers: list[str] = config.get("layer_types") or []
    if family.windowed_layers is not None:
        _check_windowed_size(family.windowed_layers, config, has_windows="sliding_attention" in layers)
        if "sliding_attention" not in layers:
            return
    elif family.window_pattern:
        return

    if family.window_period is None:
        window = _effective_window(config)
        if window is not None:
            log.warning(
                "llama.cpp has no sliding window for this architecture: beyond %s tokens its answers differ from "
                "those of transformers",
                window,
            )
        return

    period = family.window_period
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layers))]
    if layers != expected:
        raise UnsupportedArchitectureError(
            f"llama.cpp computes full attention in every {period}th layer of this architecture, "
            f"but config.json has layer_types {layers}: export without GGUF"
        )


def _check_windowed_size(size: int, config: Mapping[str, Any], *, has_windows: bool) -> None:
    if has_windows == (config["num_hidden_layers"] == size):
        return
    found = "windows" if has_windows else "no windows"
    raise UnsupportedArchitectureError(
        f"llama.cpp computes sliding windows in models of this architecture with {size} layers and in no others, but "
        f"config.json has {config['num_hidden_layers']} layers and {found} in layer_types: export without GGUF"
    )


def _effective_window(config: Mapping[str, Any]) -> int | None:
    """The window that transformers applies, in tokens; None if it covers the whole context."""
    kinds: list[str] = config.get("layer_types") or []
    window = config.get("sliding_window")
    is_applied = "sliding_attention" in kinds if kinds else True
    return window if window and is_applied and window < config["max_position_embeddings"] else None
