"""Models of random weights, written as checkpoints: `python -m speed.models.checkpoint llama-8b`.

Weights are drawn on the GPU one by one. Most models are quantised there, too, so that the 16-bit model (16 GB at 8B)
never exists; their files are equal in form to those that `save_pretrained` writes for a model that bitsandbytes
quantised. Mixtures of a few layers are written in 16 bits under the published names. Of models whose weights are drawn
where they are used (`on_device`), configuration and tokenizer are written.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speed.rows import IN_16_BITS, MAX_POSITIONS, ROWS, SEED, SHAPES, model_folder


def prepare(model: str) -> None:
    """Makes the model of that name if it does not exist."""
    folder = model_folder(model)
    if (folder / "config.json").exists():
        return
    if any(row.on_device for row in ROWS.values() if row.model == model):
        write_frame(SHAPES[model], folder)
    else:
        write(SHAPES[model], folder, "cuda", quantized=model not in IN_16_BITS)


def write(shape: dict[str, Any], folder: Path, device: str, *, quantized: bool = True) -> None:
    """Writes checkpoint and tokenizer of `shape` (fields of a configuration) into `folder`, complete or not at all."""
    import torch
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    config = configuration(shape)
    model = on_meta(config)
    if quantized:
        nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        config.quantization_config = nf4.to_dict()

    with _complete(folder) as partial:
        weights = _weights(model, device, quantized=quantized)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(partial)


def write_frame(shape: dict[str, Any], folder: Path) -> None:
    """Writes configuration and tokenizer of `shape` alone."""
    with _complete(folder) as partial:
        config = configuration(shape)
        on_meta(config)
        config.save_pretrained(partial)


def configuration(shape: dict[str, Any]) -> Any:
    """transformers' configuration of the fields in `shape`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in shape.items() if name != "model_type"}
    common = {"max_position_embeddings": MAX_POSITIONS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return CONFIG_MAPPING[shape["model_type"]](**common | fields, dtype="bfloat16")


def on_meta(config: Any) -> Any:
    """The model of a configuration without weights: names and shapes only. The configuration gets its class's name."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    config.architectures = [type(model).__name__]
    return model


def draw(name: str, meta: Any, device: str) -> Any:
    """Random weights of the shape of `meta`: norms are ones, biases zeros, all others normal."""
    import torch

    if meta.ndim < 2:
        return torch.full(meta.shape, 0.0 if name.endswith("bias") else 1.0, dtype=meta.dtype, device=device)
    return torch.empty(meta.shape, dtype=meta.dtype, device=device).normal_(std=0.02)


def linears(model: Any) -> dict[str, Any]:
    """The linear layers that bitsandbytes quantises, by name: all but the head."""
    import torch

    head = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    return {name: module for name, module in found.items() if module is not head}


def _weights(model: Any, device: str, *, quantized: bool) -> dict[str, Any]:
    """Returns random tensors by name: linears except the head in NF4 with their scales if `quantized`, all others in
    bfloat16."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(SEED)
    found: dict[str, Any] = {}
    in_nf4 = {f"{name}.weight" for name in linears(model)} if quantized else set()

    for name, meta in _stored(model):
        weight = draw(name, meta, device)
        if name not in in_nf4:
            found[name] = weight.cpu()
            continue

        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        found[name] = packed.cpu()
        found |= {f"{name}.{part}": value.cpu() for part, value in state.as_dict(packed=True).items()}
    return found


def _stored(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and shapes of the tensors in the files: Qwen's hold a matrix for each expert."""
    own = dict(model.named_parameters())
    kept = {name: value for name, value in model.state_dict().items() if name in dict(model.named_buffers())}
    for name, meta in (own | kept).items():
        block, _, leaf = name.rpartition(".experts.")
        if not block or model.config.model_type != "qwen3_moe":
            yield name, meta
            continue

        parts = {"gate_proj": 0, "up_proj": 1} if leaf == "gate_up_proj" else {"down_proj": 0}
        for expert, whole in enumerate(meta):
            for part, place in parts.items():
                yield f"{block}.experts.{expert}.{part}.weight", whole.chunk(len(parts))[place]


@contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, with a tokenizer; it gets its final name when all is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer().save_pretrained(partial)
    yield partial
    partial.rename(folder)


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
