"""A tiny random model of every published family that GGUF files are written for, with its kind of tokenizer.

Sizes are as small as possible. Everything that distinguishes a family is as published: RoPE scaling, windows, soft
caps, tied embeddings, head sizes, special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune_test_models.tiny_model import write_random_weights
from finetune_test_models.tiny_tokenizers import KINDS, ByteLevelKind, write_tokenizer

HIDDEN_SIZE = 256
HEAD_SIZE = 64
SPARE_ROWS = 24  # of the embedding, beyond the tokenizer: published models have some
GLM_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
)
NAMED_TEMPLATES = [
    {"name": "default", "template": CHAT_TEMPLATE},
    {"name": "tool_use", "template": "{{ tools }}" + CHAT_TEMPLATE},
]


def _factors(start: float, step: float, count: int) -> list[float]:
    return [start + step * index for index in range(count)]


def _long_rope(dimensions: int) -> dict[str, Any]:
    short, long = _factors(1.0, 0.01, dimensions // 2), _factors(1.0, 0.5, dimensions // 2)
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}


@dataclass(frozen=True)
class FamilyModel:
    """Arguments for the builders of one tiny model and its tokenizer."""

    family: str
    """A key of tiny_model.TINY_FAMILIES."""
    tokenizer: str
    """A key of tiny_tokenizers.KINDS."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the Hugging Face config."""
    ends: Sequence[str] = ()
    """Tokens at which generation stops, for generation_config.json; empty: the tokenizer's end of sequence."""
    template: Any = CHAT_TEMPLATE
    spare_rows: int = SPARE_ROWS
    """Rows of the embedding beyond the tokenizer."""


FAMILY_MODELS: dict[str, FamilyModel] = {
    "llama-2": FamilyModel("llama", "llama-2"),
    "llama-3.1": FamilyModel(
        "llama", "llama-3",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), template=NAMED_TEMPLATES,
    ),
    "llama-linear": FamilyModel(
        "llama", "gpt-2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "smollm": FamilyModel("llama", "smollm", {"tie_word_embeddings": True}),
    "mistral": FamilyModel("mistral", "llama-2", {"sliding_window": 4096}),
    "mistral-nemo": FamilyModel("mistral", "tekken", {"head_dim": 2 * HEAD_SIZE}),
    "qwen2.5": FamilyModel(
        "qwen2", "qwen", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen2.5-yarn": FamilyModel(
        "qwen2", "qwen",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    "qwen3": FamilyModel("qwen3", "qwen", {"head_dim": 2 * HEAD_SIZE}),
    "gemma-2": FamilyModel("gemma2", "gemma", ends=("<eos>", "<end_of_turn>")),
    "gemma-3": FamilyModel(
        "gemma3", "gemma",
        {"num_hidden_layers": 6, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        ends=("<eos>", "<end_of_turn>"),
    ),
    "phi-3": FamilyModel(
        "phi3", "phi-3", {"sliding_window": 2047}, ends=("<|endoftext|>", "<|assistant|>", "<|end|>")
    ),
    "phi-3-long": FamilyModel(
        "phi3", "phi-3",
        {"rope_parameters": _long_rope(HEAD_SIZE), "original_max_position_embeddings": 512, "sliding_window": None},
    ),
    "phi-4": FamilyModel("phi3", "phi-4", {"sliding_window": None}),
    "phi-4-mini": FamilyModel(
        "phi3", "phi-4-mini",
        {"rope_parameters": _long_rope(HEAD_SIZE * 3 // 4) | {"partial_rotary_factor": 0.75},
         "original_max_position_embeddings": 512, "sliding_window": None, "tie_word_embeddings": True},
        ends=("<|endoftext|>", "<|end|>"),
    ),
    "ministral-3": FamilyModel(
        "ministral3", "tekken",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "smollm-3": FamilyModel("smollm3", "llama-3", {"num_hidden_layers": 4}),
    "granite-3": FamilyModel(
        "granite", "smollm",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.22,
         "attention_multiplier": 0.2},
    ),
    "arcee": FamilyModel("arcee", "llama-3"),
    "seed-oss": FamilyModel("seed_oss", "seed", {"attention_bias": True}),
    "olmo-2": FamilyModel("olmo2", "phi-4"),
    "olmo-3": FamilyModel("olmo3", "phi-4", {"num_hidden_layers": 4}),
    "exaone-4": FamilyModel("exaone4", "gpt-2", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone-4-32b": FamilyModel(
        "exaone4", "gpt-2",
        {"num_hidden_layers": 64, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "ernie-4.5": FamilyModel("ernie4_5", "llama-2", {"tie_word_embeddings": True}),
    "hunyuan": FamilyModel("hunyuan", "phi-4", {"eod_token_id": None}),
    "glm-4": FamilyModel("glm4", "glm-4", ends=GLM_ENDS),
    "cohere-2": FamilyModel("cohere2", "smollm", {"num_hidden_layers": 4, "rotary_pct": 1.0, "logit_scale": 0.5}),
    "starcoder-2": FamilyModel("starcoder2", "smollm"),
    "phi-2": FamilyModel("phi", "gpt-2", {"intermediate_size": 4 * HIDDEN_SIZE, "num_key_value_heads": 4}),
    "stablelm": FamilyModel("stablelm", "gpt-2", {"use_qkv_bias": True}),
    "apertus": FamilyModel(
        "apertus", "tekken",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    "mixtral": FamilyModel("mixtral", "llama-2", {"num_hidden_layers": 3}),
    "olmoe": FamilyModel("olmoe", "gpt-2"),
    "qwen1.5-moe": FamilyModel("qwen2_moe", "qwen"),
    "qwen3-moe": FamilyModel("qwen3_moe", "qwen"),
    "qwen3-next": FamilyModel("qwen3_next", "qwen", {"num_hidden_layers": 4}),
    "qwen3.5": FamilyModel("qwen3_5", "qwen-3.5", {"num_hidden_layers": 4}),
    "qwen3.5-moe": FamilyModel("qwen3_5_moe", "qwen-3.5", {"num_hidden_layers": 4}),
    "lfm-2": FamilyModel(
        "lfm2", "llama-3", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
    ),
    "granite-3-moe": FamilyModel(
        "granitemoe", "smollm",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.22,
         "attention_multiplier": 0.2},
    ),
    "gpt-oss": FamilyModel(
        "gpt_oss", "phi-4-mini",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}},
    ),
    "llama-4": FamilyModel("llama4", "phi-4-mini", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
    "glm-4.5": FamilyModel("glm4_moe", "glm-4", {"num_nextn_predict_layers": 0}, ends=GLM_ENDS),
    "deepseek-v2": FamilyModel("deepseek_v2", "gpt-2"),
    "deepseek-v3": FamilyModel("deepseek_v3", "deepseek-3", {"n_routed_experts": 8, "n_group": 2}),
    "gemma-4-31b": FamilyModel(
        "gemma4", "gemma-4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0},
        ends=("<eos>", "<turn|>"), spare_rows=0,
    ),
    "gemma-4-e2b": FamilyModel(
        "gemma4", "gemma-4",
        {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
         "num_hidden_layers": 6, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2},
        ends=("<eos>", "<turn|>"), spare_rows=0,
    ),
    "gemma-4-26b-a4b": FamilyModel(
        "gemma4", "gemma-4",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
         "top_k_experts": 2, "moe_intermediate_size": HIDDEN_SIZE},
        ends=("<eos>", "<turn|>"), spare_rows=0,
    ),
    "gemma": FamilyModel(
        "gemma", "gemma", {"num_key_value_heads": 1, "num_hidden_layers": 3}, ends=("<eos>", "<end_of_turn>")
    ),
}  # fmt: skip


SAMPLE = frozenset(
    {
        "llama-2", "llama-3.1", "llama-linear", "smollm", "mistral", "mistral-nemo", "qwen2.5", "qwen2.5-yarn", "qwen3",
        "gemma-2", "gemma-3", "phi-3", "phi-3-long", "phi-4", "phi-4-mini", "granite-3", "cohere-2",
    }
)  # fmt: skip
"""The models that every run of the tests converts; `make gguf` converts them all."""


def family_params(also: Sequence[str] = (), without: Sequence[str] = ()) -> list[Any]:
    """Every family but those `without`, as parameters of a test; all but the sample and `also` are marked `gguf`."""
    often = {*SAMPLE, *also}
    names = [name for name in FAMILY_MODELS if name not in without]
    return [name if name in often else pytest.param(name, marks=pytest.mark.gguf) for name in names]


def pre_tokenizer_of(name: str) -> str:
    """llama.cpp's name of the pre-tokenizer of FAMILY_MODELS[name], which its converter must be told."""
    kind = KINDS[FAMILY_MODELS[name].tokenizer]
    return kind.name if isinstance(kind, ByteLevelKind) else "default"


def make_family_model(name: str, folder: Path, texts: Sequence[str], **settings: Any) -> Path:
    """Write the model folder of FAMILY_MODELS[name]; `settings` override those of the family. Returns `folder`."""
    model = FAMILY_MODELS[name]
    count = write_tokenizer(model.tokenizer, folder, texts, chat_template=model.template)

    ids = {
        token["content"]: int(index)
        for index, token in json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"].items()
    }
    kind = KINDS[model.tokenizer]
    tokens = {
        "vocab_size": count + model.spare_rows,
        "bos_token_id": ids.get(kind.bos or ""),
        "eos_token_id": ids[kind.eos],
        "pad_token_id": ids.get(kind.pad or ""),
    }

    if model.settings.get("hidden_size_per_layer_input"):
        tokens["vocab_size_per_layer_input"] = tokens["vocab_size"]

    common = {"num_hidden_layers": 2, "hidden_size": HIDDEN_SIZE}  # K-quants need rows of a multiple of 256
    write_random_weights(folder, family=model.family, **common | tokens | dict(model.settings) | settings)

    generation = {"eos_token_id": [ids[text] for text in model.ends] or tokens["eos_token_id"]}
    if tokens["bos_token_id"] is not None:
        generation["bos_token_id"] = tokens["bos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder
