"""Checkpoints that also read images or sound: where their language model is, in their config and in their files. Pure,
and without PyTorch: preflight asks too.

The language model trains as a model of its own, of the class that transformers has for it. Of some wrappers the text
part has no such class, but computes on text what a published family computes: the three position axes of Qwen-VL and
GLM-V are one on text. Each row of the tables was compared on text with the whole checkpoint, with random weights and
in fp32: the logits are equal, bit by bit (`tests/trainer/model/test_multimodal.py`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from finetune_trainer.model.safetensors_header import TensorHeader

_USUAL, _OF_LLAMA4, _OF_IDEFICS = "model.language_model.", "language_model.model.", "model.text_model."
LANGUAGE_MODEL_AT: dict[str, str] = {
    **dict.fromkeys(
        (
            "exaone4_5", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "internvl",
            "lfm2_vl", "llava", "llava_next", "llava_onevision", "minicpmv4_6", "minicpmv4_7", "mistral3",
            "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
        ),
        _USUAL,
    ),
    "llama4": _OF_LLAMA4,
    **dict.fromkeys(("idefics3", "smolvlm"), _OF_IDEFICS),
}  # fmt: skip
"""`model_type` of a checkpoint -> the place of its language model in transformers' class, by which adapters name their
layers."""

PLAIN_TYPES = {
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""`model_type` of a text section without a causal class of its own -> the family that computes the same on text."""
FIXED_SETTINGS: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
"""`model_type` of such a section -> settings of the family that it always has, whatever config.json says."""
TURNED_TYPES = frozenset({"qwen3_vl_moe"})
"""Types of checkpoints whose files may have stacks of experts as [experts, in, out] (`expert_files.turned_stacks`)."""

_PREFIXES = {
    **dict.fromkeys((_OF_LLAMA4, _USUAL, _OF_IDEFICS), "model."),
    "language_model.lm_head": "lm_head",
    "lm_head": "lm_head",
}
"""Beginning of a name in the files of a checkpoint -> that in the files of its language model alone."""
_UNPREFIXED = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
"""Beginnings in older checkpoints, Qwen2-VL's and Qwen2.5-VL's, whose language model has no prefix."""
PREFIXES = (_OF_LLAMA4, _USUAL, _OF_IDEFICS, "model.layers.")
"""Beginnings of the names of a language model's layers, for people."""


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """True if config.json, as written, belongs to a checkpoint whose language model trains by itself."""
    return config.get("model_type") in LANGUAGE_MODEL_AT


def what_it_reads(config: Mapping[str, Any]) -> str:
    """Names what a multimodal checkpoint reads beside text, for people."""
    has_sound = isinstance(config.get("audio_config"), dict)
    return "images and sound" if has_sound and isinstance(config.get("vision_config"), dict) else "images"


def language_model_names(names: Collection[str]) -> dict[str, str]:
    """Names in the files -> names in the language model alone, for the tensors that belong to it."""
    has_prefix = any(name.startswith((_OF_LLAMA4, _USUAL, _OF_IDEFICS)) for name in names)
    if not has_prefix:
        return {name: name for name in names if name.startswith(_UNPREFIXED)}

    found = {}
    for name in names:
        for prefix, own in _PREFIXES.items():
            if name.startswith(prefix):
                found[name] = own + name.removeprefix(prefix)
    return found


def split_headers(
    headers: Iterable[TensorHeader], config: Mapping[str, Any]
) -> tuple[list[TensorHeader], list[TensorHeader]]:
    """The tensors of the language model, under its own names, and all others; `config` is config.json as written."""
    listed = list(headers)
    if not is_multimodal(config):
        return listed, []
    names = language_model_names([header.name for header in listed])
    own = [replace(header, name=names[header.name]) for header in listed if header.name in names]
    return own, [header for header in listed if header.name not in names]


def name_in_checkpoint(model_type: str, name: str) -> str:
    """The name in transformers' class of the whole checkpoint of a name in its language model alone."""
    place = LANGUAGE_MODEL_AT[model_type]
    if name.startswith("model."):
        return place + name.removeprefix("model.")
    return place.removesuffix("model.") + name if place == _OF_LLAMA4 else name


def name_in_language_model(name: str) -> str:
    """The name in the language model alone of a name in transformers' class of a checkpoint, or of its own."""
    return next((own + name.removeprefix(prefix) for prefix, own in _PREFIXES.items() if name.startswith(prefix)), name)
