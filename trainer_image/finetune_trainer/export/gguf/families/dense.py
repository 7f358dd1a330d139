"""Rows of families without experts and without states."""

from gguf import MODEL_ARCH

from finetune_trainer.export.gguf.families.common import GRANITE_SCALES, LLAMA, TANH_GELU
from finetune_trainer.export.gguf.family_row import GgufFamily

DENSE: dict[str, GgufFamily] = {
    "llama": GgufFamily(MODEL_ARCH.LLAMA, **LLAMA),
    "mistral": GgufFamily(MODEL_ARCH.LLAMA, **LLAMA),
    "ministral3": GgufFamily(
        MODEL_ARCH.MISTRAL3,
        yarn_log="mscale_all_dim",
        settings={"llama_4_scaling_beta": "attn_temperature_scale"},
        **LLAMA,
    ),
    "iquestcoder": GgufFamily(MODEL_ARCH.LLAMA, **LLAMA),
    "internlm3": GgufFamily(MODEL_ARCH.LLAMA, **LLAMA),
    "smollm3": GgufFamily(MODEL_ARCH.SMOLLM3, no_rope_period=4, **LLAMA),
    "granite": GgufFamily(
        MODEL_ARCH.GRANITE,
        permuted_heads=True,
        rope_dimensions=True,
        fixed={"head_dim": None},
        settings=GRANITE_SCALES,
    ),
    "arcee": GgufFamily(MODEL_ARCH.ARCEE, activation="relu2", **LLAMA),
    "jais2": GgufFamily(
        MODEL_ARCH.JAIS2,
        activation="relu2",
        rope_dimensions=True,
        fixed={"attention_bias": True, "mlp_bias": True},
    ),
    "nemotron": GgufFamily(
        MODEL_ARCH.NEMOTRON,
        activation="relu2",
        norm_offset=1.0,
        rope_dimensions=True,
        scaled_rope=False,
        settings={"norm_eps": "layer_norm_eps"},
        fixed={"tie_word_embeddings": False},
    ),
    "seed_oss": GgufFamily(MODEL_ARCH.SEED_OSS, fixed={"mlp_bias": False}),
    "qwen2": GgufFamily(MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(MODEL_ARCH.QWEN3),
    "minicpm3": GgufFamily(
        MODEL_ARCH.MINICPM3,
        latent_attention=True,
        latent_heads=True,
        rope_dimensions=True,
        rope_tensors=True,
        names_longrope=False,
        fixed={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "attention_bias": False, "mlp_bias": False},
    ),
    "olmo": GgufFamily(
        MODEL_ARCH.OLMO,
        permuted_heads=True,
        settings={"clip_qkv": "clamp_kqv"},
        constants={"layer_norm_eps": 1e-5},
        fixed={"attention_bias": False},
    ),
    "olmo2": GgufFamily(MODEL_ARCH.OLMO2),
    "olmo3": GgufFamily(MODEL_ARCH.OLMO2, window_pattern=True),
    "exaone4": GgufFamily(
        MODEL_ARCH.EXAONE4, rope_tensors=True, window_pattern=True, window_period=4, windowed_layers=64
    ),
    "ernie4_5": GgufFamily(MODEL_ARCH.ERNIE4_5, fixed={"use_bias": False}),
    "hunyuan_v1_dense": GgufFamily(MODEL_ARCH.HUNYUAN_DENSE, stretched_rope=True),
    "glm": GgufFamily(MODEL_ARCH.CHATGLM, rope_dimensions=True),
    "glm4": GgufFamily(MODEL_ARCH.GLM4, rope_dimensions=True),
    "cohere": GgufFamily(
        MODEL_ARCH.COMMAND_R,
        scaled_rope=False,
        normed_heads_from=64,
        settings={"logit_scale": "logit_scale"},
        fixed={"tie_word_embeddings": True, "attention_bias": False},
    ),
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
    "phi3": GgufFamily(
        MODEL_ARCH.PHI3,
        sliding_window=True,
        rope_dimensions=True,
        rope_tensors=True,
        names_longrope=False,
        original_context=True,
    ),
}
