"""A Llama of any size with random 16-bit weights, drawn on a device: for measuring, where weights need no meaning."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune_trainer.export.tensor_io.file_writer import FileWriters
from finetune_trainer.export.tensor_io.safetensors_files import SafetensorsWriter
from finetune_trainer.model.weight_files import INDEX_NAME

RANK, SHARDS = 16, 4
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """The shape of a Llama model."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(torch.Size(shape).numel() for shape in list_shapes(self).values())


LLAMA_8B, SMALL = Size(4096, 14336, 32, 32, 8, 128256), Size(512, 1024, 4, 8, 2, 1024)


def list_shapes(size: Size) -> Shapes:
    """All tensors by name, in the order of the layers."""
    key_width = size.hidden // size.heads * size.kv_heads
    in_layer: Shapes = {
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (key_width, size.hidden),
        "self_attn.v_proj": (key_width, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.feed_forward, size.hidden),
        "mlp.up_proj": (size.feed_forward, size.hidden),
        "mlp.down_proj": (size.hidden, size.feed_forward),
    }

    shapes: Shapes = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in in_layer.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (size.hidden,)

    return shapes | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def make_random_base(folder: Path, size: Size, device: torch.device) -> Path:
    """Write a Hugging Face folder of random BF16 weights in shards, with a tokenizer of its own. Returns `folder`."""
    folder.mkdir()
    shapes = list_shapes(size)
    names = list(shapes)
    per_shard = -(-len(names) // SHARDS)
    files = {
        f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors": names[index * per_shard : (index + 1) * per_shard]
        for index in range(SHARDS)
    }

    generator = torch.Generator(device).manual_seed(0)
    with FileWriters(device) as writers:
        for file, held in files.items():
            writer = SafetensorsWriter(writers, folder / file, [(name, torch.bfloat16, shapes[name]) for name in held])
            for name in held:
                writer.write(name, torch.randn(shapes[name], generator=generator, device=device).mul_(0.02).bfloat16())
            writer.close()

    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_describe(size)))
    _make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def make_random_adapter(folder: Path, size: Size) -> Path:
    """Write a random LoRA adapter for all seven matrices of every layer. Returns `folder`."""
    folder.mkdir()

    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in list_shapes(size).items():
        if "proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[-1], generator=generator) * 0.01
            weights[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.01

    save_file(weights, folder / "adapter_model.safetensors")
    config: Mapping[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _describe(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _make_tokenizer() -> Tokenizer:
    """Byte-level, of 300 tokens; the embedding's other rows have none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a text to learn pairs of letters from"] * 10, trainer)
    return tokenizer
