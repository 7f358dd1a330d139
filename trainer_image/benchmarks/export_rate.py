"""How long merging and quantising an 8B model takes on this machine's GPU. Not a part of CI.

    python trainer_image/benchmarks/export_rate.py            # Llama-8B shape: 16 GB in, 29 GB out, in memory
    python trainer_image/benchmarks/export_rate.py --small    # a tiny one, also without a GPU

Makes a base of random 16-bit weights and a LoRA adapter on all seven matrices, exports merged BF16, Q4_K_M and Q8_0 in
one pass, and measures each encoder alone. Also checks that the device's bytes are the CPU's. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune_api.vocabulary import GgufType
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.file_writer import AppendedFile, FileWriters
from finetune_trainer.export.model_folder import INDEX_NAME
from finetune_trainer.export.safetensors_files import SafetensorsWriter
from finetune_trainer.gguf.file_types import find_file_type
from finetune_trainer.gguf.quantizers import quantize

GIGABYTE = 1e9
MERGED, GGUF = "BF16", ("Q4_K_M", "Q8_0")
RANK, SHARDS = 16, 4
Shapes = dict[str, tuple[int, int] | tuple[int]]


@dataclass(frozen=True)
class Size:
    """The shape of a Llama model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


LARGE, SMALL = Size(4096, 14336, 32, 32, 8, 128256), Size(512, 1024, 4, 8, 2, 1024)


def main() -> None:
    """Run everything; print figures on the way and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, help="where base and results lie (default: memory, else TMPDIR)")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    size = SMALL if arguments.small else LARGE
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "shape": asdict(size),
        "encoders": measure_encoders(device, rows=256 if arguments.small else 8192),
        "equal_to_cpu": compare_with_cpu(device),
    }
    print(json.dumps(found, indent=1))
    with tempfile.TemporaryDirectory(prefix="export-rate-", dir=arguments.folder or choose_folder(size)) as name:
        folder = Path(name)
        found["folder"], found["write_gb_per_s"] = name, measure_writing(folder, device, small=arguments.small)
        began = time.perf_counter()
        base, adapter = make_base(folder / "base", size, device), make_adapter(folder / "adapter", size)
        found["making_base_s"] = round(time.perf_counter() - began, 2)
        rounds = [run(base, adapter, folder / "out", device) for _ in range(arguments.rounds)]
        found["rounds"] = rounds
        found["best_s"] = min(each["seconds"] for each in rounds)
    print(json.dumps(found))


def choose_folder(size: Size) -> Path:
    """Memory, if base and results fit there: the disk is not what is measured."""
    shapes = list_shapes(size)
    needed = 5 * sum(torch.Size(shape).numel() for shape in shapes.values())
    memory = Path("/dev/shm")  # noqa: S108  # the only name that memory has as a folder
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * needed
    return memory if fits else Path(tempfile.gettempdir())


def list_shapes(size: Size) -> Shapes:
    """All tensors by name, in the order of the layers."""
    key = size.hidden // size.heads * size.kv_heads
    inner: dict[str, tuple[int, int]] = {
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (key, size.hidden),
        "self_attn.v_proj": (key, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.inner, size.hidden),
        "mlp.up_proj": (size.inner, size.hidden),
        "mlp.down_proj": (size.hidden, size.inner),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (size.hidden,)
    return shapes | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def make_base(folder: Path, size: Size, device: torch.device) -> Path:
    """A Hugging Face folder of random BF16 weights in shards, with a tokenizer of its own."""
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
    (folder / "config.json").write_text(json.dumps(describe(size)))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def describe(size: Size) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def make_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 300 tokens; the embedding's other rows have none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a text to learn pairs of letters from"] * 10, trainer)
    return tokenizer


def make_adapter(folder: Path, size: Size) -> Path:
    """LoRA on all seven matrices of every layer."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in list_shapes(size).items():
        if "proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[-1], generator=generator) * 0.01
            weights[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.01
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(base: Path, adapter: Path, output: Path, device: torch.device) -> dict[str, Any]:
    """One export: seconds in all, and of each type's encoding."""
    request = ExportRequest(base=base, adapter=adapter, output=output, merged=MERGED, gguf=GGUF, name="model")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    files = export(request, device=device, on_progress=lambda done, total: None)
    seconds = time.perf_counter() - began
    figures: dict[str, Any] = {"seconds": round(seconds, 2)}
    if device.type == "cuda":
        figures["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / GIGABYTE, 2)
    written = sum(file.size for file in files)
    figures["written_gb"], figures["written_gb_per_s"] = (
        round(written / GIGABYTE, 2),
        round(written / seconds / GIGABYTE, 2),
    )
    for kind in (MERGED, *GGUF):
        chosen = [file for file in files if file.type == kind]
        encoding, size = sum(file.seconds for file in chosen), sum(file.size for file in chosen)
        figures[kind] = {
            "encode_s": round(encoding, 3),
            "gb": round(size / GIGABYTE, 2),
            "encoded_gb_per_s": round(size / encoding / GIGABYTE, 2),
        }
    shutil.rmtree(output)
    print(json.dumps(figures), flush=True)
    return figures


def made_weights(rows: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights with thin and with heavy tails."""
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(rows, 4096, generator=generator) * 0.02
    yield "normal", normal.to(device)
    yield "heavy", (normal / torch.rand(rows, 4096, generator=generator).clamp(0.1)).to(device)


def tensor_types() -> list[GGMLQuantizationType]:
    """Every type that a tensor can have."""
    return sorted({find_file_type(kind.value).matrices for kind in GgufType})


def measure_encoders(device: torch.device, *, rows: int) -> dict[str, float]:
    """GB/s of fp32 weights that each encoder takes, from device memory to device memory, best of three."""
    _, weights = next(made_weights(rows, device))
    rates = {}
    for kind in tensor_types():
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            quantize(weights, kind)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        rates[kind.name] = round(weights.nbytes / min(seconds[1:]) / GIGABYTE, 2)
    return rates


def compare_with_cpu(device: torch.device) -> dict[str, bool]:
    """Whether each encoder gives the same bytes here as on the CPU."""
    equal = {}
    for kind in tensor_types():
        equal[kind.name] = all(
            torch.equal(quantize(weights, kind).cpu(), quantize(weights.cpu(), kind))
            for _, weights in made_weights(64, device)
        )
    return equal


def measure_writing(folder: Path, device: torch.device, *, small: bool) -> float:
    """GB/s at which the exporter's threads write to this folder, from the device."""
    data = torch.ones(1 << (24 if small else 32), dtype=torch.uint8, device=device)
    began = time.perf_counter()
    with FileWriters(device) as writers:
        file = AppendedFile(writers, folder / "probe")
        file.append(data)
        file.close()
    seconds = time.perf_counter() - began
    (folder / "probe").unlink()
    return round(data.numel() / seconds / GIGABYTE, 2)


if __name__ == "__main__":
    main()
