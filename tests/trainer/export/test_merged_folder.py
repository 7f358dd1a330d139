"""Merged folders of every family: transformers loads them, and their logits are peft's for the adapter on its base, but
for the rounding of the weights to bfloat16. The folder is laid out like the base's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_test_models.family_models import make_family_model
from finetune_test_models.tiny_architectures import make_mixture
from finetune_trainer.export.export import ExportRequest, export

NAMES = ("llama-3.1", "mistral", "qwen2.5", "qwen3", "gemma-2", "gemma-3", "phi-3", "phi-4")
PROMPT = torch.tensor([[3 + 13 * place % 400 for place in range(90)]])
INDEX = "model.safetensors.index.json"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(PROMPT).logits[0]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path: Path, texts: list[str]) -> Path:
    """A base in shards, with named chat templates and a generation config."""
    whole = make_family_model(request.param, tmp_path / "whole", texts)
    folder = shutil.copytree(whole, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    return folder


def make_adapter(base: Path, target: Path) -> Path:
    torch.manual_seed(1)
    adapted = get_peft_model(load(base), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(target)
    return target


def test_merged_weights_say_what_the_adapter_says(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    request = ExportRequest(base, adapter, tmp_path / "out", merged="BF16", gguf=(), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    adapted = PeftModel.from_pretrained(load(base), adapter)
    expected, without = logits(adapted), logits(load(base))
    found = logits(load(tmp_path / "out/merged"))

    rounded = adapted.merge_and_unload()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    rounding = (logits(rounded) - expected).abs()
    # What rounding peft's own merge costs is what ours may cost; sums in another order round a few weights otherwise.
    assert 0 < (found - expected).abs().mean() < 1.1 * rounding.mean()
    assert (found - expected).abs().max() < 1.5 * rounding.max()
    assert (without - expected).abs().mean() > 10 * rounding.mean(), "the adapter changes too little to judge"


def test_the_merged_folder_is_laid_out_like_the_base(base: Path, tmp_path: Path) -> None:
    request = ExportRequest(base, None, tmp_path / "out", merged="BF16", gguf=(), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    merged = tmp_path / "out/merged"
    indices = [json.loads((folder / INDEX).read_text()) for folder in (base, merged)]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert len(set(indices[1]["weight_map"].values())) > 1
    listed = [{p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} for folder in (base, merged)]
    assert listed[0] == listed[1]
    for name in listed[0] - {INDEX, "config.json"} - set(indices[0]["weight_map"].values()):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(merged).chat_template["tool_use"] == "{{ tools }}"
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id is not None


def test_the_own_layers_of_an_older_family_are_merged_and_its_causal_masks_left_out(
    tmp_path: Path, texts: list[str]
) -> None:
    """Pythia's files hold a mask in each layer, which transformers makes itself."""
    base = make_mixture(tmp_path / "base", "gpt_neox", texts)
    stored = load_file(base / "model.safetensors")
    masks = {f"gpt_neox.layers.{layer}.attention.bias": torch.ones(1, 1, 8, 8).bool() for layer in range(2)}
    save_file(stored | masks, base / "model.safetensors", metadata={"format": "pt"})

    adapter = make_adapter(base, tmp_path / "adapter")
    request = ExportRequest(base, adapter, tmp_path / "out", merged="BF16", gguf=(), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    assert set(load_file(tmp_path / "out/merged/model.safetensors")) == set(stored)

    expected, without = logits(PeftModel.from_pretrained(load(base), adapter)), logits(load(base))
    error = (logits(load(tmp_path / "out/merged")) - expected).abs().mean()
    assert 0 < 10 * error < (without - expected).abs().mean(), "bfloat16's rounding, and no more"
