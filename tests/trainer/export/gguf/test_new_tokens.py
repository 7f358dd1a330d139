"""New tokens in GGUF files: llama.cpp's converter writes the same bytes and vocabulary from the merged folder."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from finetune_api.spec.inputs import ModelSpec
from finetune_api.spec.training import AdapterSpec
from finetune_api.vocabulary import Precision, Quantization
from finetune_test_models.family_models import pre_tokenizer_of
from finetune_test_models.tiny_families.family_model import SPARE_ROWS
from finetune_test_programs.llama_cpp_converter import Conversion, convert
from finetune_trainer.export.base_model.companions import companions_of_training
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model

TYPES = ("F16", "Q8_0")
ROOMY = ["<|note|>", "Zwölfton reihe", "naïveté▁"]
MANY = [f"<new {number}>" for number in range(30)]  # more than the embedding's spare rows
FAMILIES = {"llama-3.1": ROOMY, "llama-2": MANY, "gemma-3": MANY}
"""Byte-level BPE with room for them, SentencePiece without, and a tied head."""


def make_adapter(base: Path, target: Path, tokens: list[str]) -> Path:
    """An adapter that changes rows of new tokens alone, to values that 16 bits hold."""
    spec = ModelSpec(source=f"file://{base}", new_tokens=tuple(tokens), quantization=Quantization.NONE)
    loaded = load_model(base, spec, Precision.FP32, gpus=0)
    model = inject_adapter(loaded.model, AdapterSpec(target_modules=("q_proj",)), 0, loaded.new_tokens).model
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "trainable_tokens" in name:
                weights.copy_((torch.randn_like(weights) / 16).bfloat16())
    model.save_pretrained(target, save_embedding_layers=False)
    companions_of_training(base, loaded.tokenizer, spec).write(target, loaded.tokenizer)
    return target


def conversions(name: str, folder: Path) -> list[Conversion]:
    pre = pre_tokenizer_of(name)
    merged = str(folder / "merged")
    return [Conversion(merged, str(folder / f"theirs-{of}.gguf"), of.lower(), "tiny", pre) for of in TYPES]


def test_the_converter_writes_the_same_from_the_merged_folder(
    family_base: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, tokens in FAMILIES.items():
        base, output = family_base(name), tmp_path / name
        adapter = make_adapter(base, output / "adapter", tokens)
        wanted = ExportRequest(base=base, adapter=adapter, output=output, merged="BF16", gguf=TYPES, name="tiny")
        export(wanted, device=torch.device("cpu"), on_progress=lambda done, total: None)
    convert([each for name in FAMILIES for each in conversions(name, tmp_path / name)])

    for name, tokens in FAMILIES.items():
        before = dict(open_base_model(family_base(name)).shapes)["model.embed_tokens.weight"][0]
        for of in TYPES:
            ours = gguf.GGUFReader(tmp_path / name / "gguf" / f"tiny-{of}.gguf")
            theirs = gguf.GGUFReader(tmp_path / name / f"theirs-{of}.gguf")
            compare(ours, theirs)
            found = ours.fields["tokenizer.ggml.tokens"].contents()
            assert {token.replace("▁", " ") for token in tokens} <= set(found)
            grown = -(-(before - SPARE_ROWS + len(tokens)) // 64) * 64
            assert len(found) == (before if tokens is ROOMY else grown)


def compare(ours: gguf.GGUFReader, theirs: gguf.GGUFReader) -> None:
    """Tensors byte for byte, and the vocabulary."""
    assert [each.name for each in ours.tensors] == [each.name for each in theirs.tensors]
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.tensor_type == other.tensor_type
        assert np.array_equal(mine.data, other.data), mine.name
    for key in ("tokens", "token_type"):
        found, expected = (file.fields[f"tokenizer.ggml.{key}"].contents() for file in (ours, theirs))
        assert found == expected
