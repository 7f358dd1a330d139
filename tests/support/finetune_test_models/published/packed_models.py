"""Tiny models published in FP8 and MXFP4, made of tiny models in 16 bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, set_seed

from finetune_test_models.tiny_model import train_tokenizer

WEIGHTS, LARGEST = "model.safetensors", 448.0  # of E4M3
Tensors = dict[str, torch.Tensor]


def write_fp8(source: Path, target: Path, *, block: int | None) -> Tensors:
    """Publish the model in `source` in FP8, with a scale for each `block` x `block` weights or for each matrix.

    Returns the decoded weights of the quantised layers, in fp32, by the formula.
    """
    shutil.copytree(source, target)
    stored, decoded = load_file(source / WEIGHTS), {}
    for name in [name for name in stored if name.endswith("_proj.weight") and "vision" not in name]:
        weights = stored[name].float()
        sizes = (block or weights.shape[0], block or weights.shape[1])
        scale = _scales(weights, sizes)
        spread = scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[
            : weights.shape[0], : weights.shape[1]
        ]
        stored[name] = (weights / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale if block else scale.reshape(()).bfloat16()
        decoded[name] = stored[name].float() * (spread if block else stored[f"{name}_scale_inv"].float())
        if not block:
            stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5, dtype=torch.bfloat16)

    save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
    _write_method(
        target,
        {
            "quant_method": "fp8",
            "weight_block_size": [block, block] if block else None,
            "activation_scheme": "dynamic" if block else "static",
        },
    )
    return decoded


def _scales(weights: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """The scale of each block, by its largest weight; the last blocks may be cut off."""
    rows = [torch.split(row, sizes[1], 1) for row in torch.split(weights, sizes[0])]
    return torch.stack([torch.stack([part.abs().amax() / LARGEST for part in row]) for row in rows])


def write_mxfp4(target: Path, texts: list[str]) -> Path:
    """Write a tiny gpt-oss whose experts are in MXFP4, of random codes. Returns `target`."""
    tokenizer = train_tokenizer(texts, vocab_size=512)
    set_seed(0)
    config = GptOssConfig(
        vocab_size=512, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=64,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=1 / 16,
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)

    stored = load_file(target / WEIGHTS)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, out = stored.pop(name).shape
        groups = (experts, out, inside // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(121, 124, groups, dtype=torch.uint8)  # 2^-6 to 2^-4
    save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
    _write_method(target, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return target


def _write_method(folder: Path, method: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
