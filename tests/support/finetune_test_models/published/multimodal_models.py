"""Tiny random checkpoints that also read images, one of each family, as transformers saves them: with the names that
the published ones have.

Gemma 3n's tower is a package of its own (timm): without it, whoever builds one puts something else in its place.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_test_models.tiny_model import train_tokenizer

VOCABULARY = 512
_HEAD = 64
_TEXT: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": _HEAD, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    "pad_token_id": 0, "initializer_range": 1 / 16,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}
_QWEN3_TOWER = _QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_PIXTRAL = _SIGLIP | {"head_dim": 32}
_CLIP = _SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 64}
_LLAVA = {"image_token_index": 500, "tie_word_embeddings": False}
_GRID = {"image_grid_pinpoints": [[28, 28]]}
_OUTER = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
_MISTRAL = {"image_token_index": 500, "spatial_merge_size": 1, "tie_word_embeddings": False}
_GEMMA = {"sliding_window": 64, "query_pre_attn_scalar": _HEAD, "tie_word_embeddings": True}


def _mrope(*sections: int, **other: Any) -> dict[str, Any]:
    """RoPE whose dimensions belong to time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **other}


TRAINED = ("gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3", "ministral3", "llama4", "glm4v",
           "qwen3_vl_moe", "smolvlm")  # fmt: skip
"""Those that tests train; the others only differ from one of them in what is not trained, or in their experts."""
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {"model_type": "gemma3_text", **_GEMMA}, _SIGLIP, {"mm_tokens_per_image": 4}),
    "gemma4": (
        "gemma4",
        {
            "model_type": "gemma4_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
            "global_head_dim": _HEAD, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 64,
            "num_kv_shared_layers": 0, "tie_word_embeddings": True,
        },
        _SIGLIP | {"head_dim": 32, "num_key_value_heads": 2, "position_embedding_size": 16, "pooling_kernel_size": 2},
        {"audio_config": None},
    ),
    "qwen2_5_vl": ("qwen2_5_vl", {"rope_parameters": _mrope(8, 12, 12)}, _QWEN_TOWER, _OUTER),
    "qwen3_vl": (
        "qwen3_vl", {"rope_parameters": _mrope(8, 12, 12, mrope_interleaved=True)}, _QWEN3_TOWER,
        _OUTER | {"tie_word_embeddings": True},
    ),
    "qwen3_5": (
        "qwen3_5",
        {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
        _QWEN3_TOWER, _OUTER,
    ),
    "mistral3": ("mistral3", {"model_type": "mistral"}, _PIXTRAL, _MISTRAL),
    "ministral3": (
        "mistral3", {"model_type": "ministral3"}, _PIXTRAL, _MISTRAL,
    ),
    "llama4": (
        "llama4",
        {
            "model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 2,
        },
        _SIGLIP
        | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "pixel_shuffle_ratio": 1.0},
        {},
    ),
    "glm4v": (
        "glm4v", {"rope_parameters": _mrope(4, 6, 6, partial_rotary_factor=0.5)},
        {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256},
        {"image_token_id": 500, "video_token_id": 501, "image_start_token_id": 502, "image_end_token_id": 503},
    ),
}  # fmt: skip
MULTIMODAL |= {
    "gemma3n": (
        "gemma3n",
        {
            "model_type": "gemma3n_text", "intermediate_size": [512, 512], "vocab_size_per_layer_input": VOCABULARY,
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 64, "laurel_rank": 8, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0], "tie_word_embeddings": True,
        },
        {"hidden_size": 64, "vocab_offset": VOCABULARY, "vocab_size": 8},
        {
            "audio_config": {
                "hidden_size": 64, "vocab_offset": VOCABULARY + 8, "vocab_size": 8, "conf_num_hidden_layers": 1,
            }
        },
    ),
    "gemma4_moe": (
        "gemma4",
        MULTIMODAL["gemma4"][1] | {
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64,
            "hidden_size_per_layer_input": 0,
        },
        *MULTIMODAL["gemma4"][2:],
    ),
    "glm46v": ("glm46v", *MULTIMODAL["glm4v"][1:]),
    "glm4v_moe": (
        "glm4v_moe",
        MULTIMODAL["glm4v"][1] | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        *MULTIMODAL["glm4v"][2:],
    ),
    "qwen2_vl": (
        "qwen2_vl", MULTIMODAL["qwen2_5_vl"][1],
        {"depth": 1, "embed_dim": 64, "hidden_size": 256, "mlp_ratio": 1, "num_heads": 2}, _OUTER,
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        MULTIMODAL["qwen3_5"][1] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                    "shared_expert_intermediate_size": 64},
        *MULTIMODAL["qwen3_5"][2:],
    ),
    "exaone4_5": (
        "exaone4_5", {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
        _QWEN_TOWER, {"image_token_id": 500, "video_token_id": 501},
    ),
    "gemma4_unified": (
        "gemma4_unified",
        {"model_type": "gemma4_unified_text", "layer_types": ["sliding_attention", "full_attention"],
         "sliding_window": 64, "tie_word_embeddings": True},
        {}, {},
    ),
    "idefics3": ("idefics3", {"model_type": "llama"}, _SIGLIP, {"image_token_id": 500, "tie_word_embeddings": False}),
    "internvl": (
        "internvl", {"model_type": "qwen3"}, _SIGLIP | {"image_size": [28, 28], "patch_size": [14, 14]},
        {"image_token_id": 500, "tie_word_embeddings": False},
    ),
    "lfm2_vl": (
        "lfm2_vl", {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 64},
        _SIGLIP | {"model_type": "siglip2_vision_model", "num_patches": 16}, {"image_token_id": 500},
    ),
    "llava": ("llava", {"model_type": "llama"}, _CLIP, _LLAVA),
    "llava_next": ("llava_next", {"model_type": "mistral"}, _CLIP, _LLAVA | _GRID),
    "llava_onevision": (
        "llava_onevision", {"model_type": "qwen2"}, _SIGLIP | {"model_type": "siglip_vision_model"},
        _LLAVA | _GRID | {"video_token_index": 501},
    ),
    **{
        name: (name, MULTIMODAL["qwen3_5"][1] | {"model_type": "qwen3_5_text"}, _SIGLIP, {"image_token_id": 500})
        for name in ("minicpmv4_6", "minicpmv4_7")
    },
    **{
        name: (
            "qwen3_vl_moe",
            MULTIMODAL["qwen3_vl"][1] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
            _QWEN3_TOWER, _OUTER | {"tie_word_embeddings": False},
        )
        for name in ("qwen3_vl_moe", "qwen3_vl_moe_resaved")
    },
    "smolvlm": ("smolvlm", {"model_type": "llama"}, _SIGLIP, {"image_token_id": 500, "tie_word_embeddings": False}),
}  # fmt: skip
"""By name: model type, and what text section, vision section and outer config have of their own."""
AS_TRANSFORMERS_4 = ("qwen3_vl_moe",)
"""Those that are written as transformers 4 did, which is how they are published; transformers 5 saves other files."""


def make_multimodal_model(name: str, folder: Path, texts: Sequence[str], **text: Any) -> Path:
    """Write a checkpoint of a family with its tokenizer; `text` changes its text section. Returns `folder`."""
    model_type, own_text, vision, outer = MULTIMODAL[name]
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY - 16)
    settings: dict[str, Any] = dict(
        text_config=_TEXT | {"eos_token_id": tokenizer.eos_token_id} | own_text | text,
        vision_config=dict(vision),
        eos_token_id=tokenizer.eos_token_id,
        **outer,
    )
    config = CONFIG_MAPPING[model_type](**settings)

    set_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else 1 / math.sqrt(parameter.shape[-1])
            around = parameter if parameter.dim() == 1 else torch.zeros_like(parameter)
            parameter.data = (around + scale * torch.randn_like(parameter)).bfloat16()  # buffers may be complex
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
    if name in AS_TRANSFORMERS_4:
        turn_stored_stacks(folder)
        _name_settings_as_before(folder / "config.json")
    return folder


def turn_stored_stacks(folder: Path) -> None:
    """Write the stacks of experts with rows and columns swapped: [experts, in, out], as transformers 4 did, or back."""
    stored = load_file(folder / "model.safetensors")
    for name, value in stored.items():
        if ".experts." in name:
            stored[name] = value.transpose(1, 2).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _name_settings_as_before(path: Path) -> None:
    """Give the text section the names of transformers 4, and leave it to the whole to say that the head is its own."""
    config = json.loads(path.read_text())
    text = config["text_config"]
    rope, _ = text.pop("rope_parameters"), text.pop("tie_word_embeddings")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "num_experts": text.pop("num_local_experts")}
    text["norm_topk_prob"] = True
    path.write_text(json.dumps(config))
