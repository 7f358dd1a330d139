"""Models of random weights, written as NF4 checkpoints: `python -m speed.models llama-8b`.

Weights are drawn and quantised on the GPU one by one: the 16-bit model (16 GB at 8B) never exists. The files are equal
in form to those that `save_pretrained` writes for a model that bitsandbytes quantised.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from speed.rows import MAX_POSITIONS, SEED, SHAPES, model_folder


def prepare(model: str) -> None:
    """Makes the model of that name if it does not exist."""
    folder = model_folder(model)
    if not (folder / "config.json").exists():
        write(SHAPES[model], folder, "cuda", qwen="qwen3" in model)


def write(shape: dict[str, Any], folder: Path, device: str, *, qwen: bool) -> None:
    """Writes checkpoint and tokenizer of `shape` (fields of a configuration) into `folder`, complete or not at all."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3Config

    kind: Any = Qwen3Config if qwen else LlamaConfig
    config = kind(
        **shape, max_position_embeddings=MAX_POSITIONS, rope_theta=500000.0, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):  # names and shapes only
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]

    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    config.architectures, config.quantization_config = [type(model).__name__], quantization.to_dict()

    # A folder under its final name is complete.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_weights(model, device), partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(partial)
    config.save_pretrained(partial)
    partial.rename(folder)


def _weights(model: Any, device: str) -> dict[str, Any]:
    """Returns random tensors by name: linears except the head in NF4 with their scales, all others in bfloat16."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(SEED)
    found: dict[str, Any] = {}

    for name, meta in model.named_parameters():
        if meta.ndim == 1:
            found[name] = torch.ones(meta.shape, dtype=torch.bfloat16)
            continue
        weight = torch.empty(meta.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        if not name.endswith("_proj.weight"):
            found[name] = weight.cpu()
            continue

        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        found[name] = packed.cpu()
        found |= {f"{name}.{part}": value.cpu() for part, value in state.as_dict(packed=True).items()}
    return found


def tokenizer() -> Any:
    """Returns a tokenizer with one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bytewise,
        model_max_length=MAX_POSITIONS,
        **dict(zip(("bos_token", "eos_token", "pad_token"), alphabet[:3], strict=True)),
    )


if __name__ == "__main__":
    prepare(sys.argv[1])
