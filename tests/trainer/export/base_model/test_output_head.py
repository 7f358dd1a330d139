"""The output head is what the weight files hold: training, merged weights and GGUF files compute with one head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import InvalidBaseError, UnsupportedArchitectureError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.stages.model_loading import load_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.arange(5, 25).unsqueeze(0)
Weights = dict[str, torch.Tensor]
Tied = Callable[..., Path]


@pytest.fixture
def tied(tmp_path: Path, texts: list[str]) -> Tied:
    """A base that ties by its config, with its weights and config changed."""

    def make(change: Callable[[Weights], object] = lambda weights: None, **config: Any) -> Path:
        base = make_tiny_model(tmp_path / "base", family="qwen2", texts=texts)
        weights = load_file(base / "model.safetensors")
        change(weights)
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(written | config))
        return base

    return make


def own_head(weights: Weights) -> None:
    weights[HEAD] = -weights[EMBEDDING]


def same_head(weights: Weights) -> None:
    weights[HEAD] = weights[EMBEDDING].clone()


def export_all(base: Path, output: Path, adapter: Path | None = None) -> tuple[Path, set[str]]:
    """The merged folder, and the names of the tensors in the GGUF file."""
    request = ExportRequest(base, adapter, output, merged="BF16", gguf=("F16",), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    return output / "merged", {tensor.name for tensor in gguf.GGUFReader(output / "gguf/m-F16.gguf").tensors}


def spec(base: Path, quantization: str) -> ModelSpec:
    return ModelSpec.model_validate({"source": f"file://{base}", "quantization": quantization})


@pytest.mark.parametrize("quantization", ["None", "NF4"])
@torch.no_grad()
def test_a_head_of_its_own_is_trained_merged_and_converted(tied: Tied, tmp_path: Path, quantization: str) -> None:
    base = tied(own_head)
    loaded = load_model(base, spec(base, quantization), Precision.FP32, gpus=0).model
    stored = load_file(base / "model.safetensors")[HEAD].float()
    assert torch.equal(loaded.get_output_embeddings().weight.float(), stored)
    assert loaded.config.tie_word_embeddings is False

    merged, names = export_all(base, tmp_path / "out")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert "output.weight" in names
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()(TOKENS).logits
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(TOKENS).logits, expected
    )


def test_a_stored_copy_of_the_embedding_is_tied(tied: Tied, tmp_path: Path) -> None:
    merged, names = export_all(tied(same_head), tmp_path / "out")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert "output.weight" not in names


def test_a_tie_by_default_is_judged_too(tmp_path: Path, texts: list[str]) -> None:
    """Gemma's published configs do not write the key: their class has it. llama.cpp's Gemma 2 has no other head."""
    base = make_tiny_model(tmp_path / "gemma", family="gemma2", texts=texts)
    weights = load_file(base / "model.safetensors")
    own_head(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    request = ExportRequest(base, None, tmp_path / "out", merged="BF16", gguf=(), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    assert json.loads((tmp_path / "out/merged/config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(UnsupportedArchitectureError, match="a head of their own: export without GGUF"):
        export_all(base, tmp_path / "out")


@pytest.mark.parametrize("difference", ["another type, the same values", "another type, other values"])
def test_heads_of_another_type_are_compared_by_value(tied: Tied, difference: str) -> None:
    def change(weights: Weights) -> None:
        weights[HEAD] = weights[EMBEDDING].float() * (2 if "other values" in difference else 1)

    assert open_base_model(tied(change)).is_tied is ("same values" in difference)


def test_a_difference_in_the_last_row_is_seen(tied: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(weights: Weights) -> None:
        same_head(weights)
        weights[HEAD][-1, -1] += 1

    monkeypatch.setattr("finetune_trainer.export.base_model.output_head.PIECE", 1000)
    assert not open_base_model(tied(change)).is_tied


def test_a_head_that_is_nowhere_is_refused(tied: Tied, tmp_path: Path) -> None:
    """transformers would fill it with random numbers, and train on."""
    base = tied(tie_word_embeddings=False)
    with pytest.raises(InvalidBaseError, match=r"no lm_head\.weight"):
        export_all(base, tmp_path / "out")
    with pytest.raises(TrainerError, match=r"lack lm_head\.weight") as refusal:
        load_model(base, spec(base, "None"), Precision.FP32, gpus=0)
    assert refusal.value.reason == "InvalidConfiguration"


def test_a_layer_that_is_nowhere_is_refused_as_well(tied: Tied) -> None:
    base = tied(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(TrainerError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(base, spec(base, "None"), Precision.FP32, gpus=0)


def test_a_base_in_nf4_with_a_head_of_its_own_keeps_it(tied: Tied, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    base = tied(own_head)
    quantised = tmp_path / "nf4"
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=options).save_pretrained(
        quantised
    )
    for path in base.glob("tokenizer*"):
        shutil.copy(path, quantised)
    written = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": True}))
    assert HEAD in load_file(quantised / "model.safetensors")
    merged, names = export_all(quantised, tmp_path / "out")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert "output.weight" in names


def test_a_merged_head_can_be_replaced_by_an_adapter(tied: Tied, tmp_path: Path) -> None:
    """A full copy of the head (`modules_to_save`) merges into a base whose head is its own."""
    from peft import LoraConfig, get_peft_model

    base = tied(own_head)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.tie_word_embeddings = False  # as load_model does: peft would warn of a tie that is none
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(3)
    adapted.save_pretrained(tmp_path / "adapter")
    merged, _ = export_all(base, tmp_path / "out", tmp_path / "adapter")
    found = load_file(merged / "model.safetensors")[HEAD].float()
    assert torch.allclose(found, 3 * load_file(base / "model.safetensors")[HEAD].float(), rtol=1e-2)
