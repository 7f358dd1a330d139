"""A GGUF file becomes the model that it was made from, with and without the base's configuration beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from finetune_test_models.family_models import make_family_model
from finetune_test_models.published.multimodal_models import make_multimodal_model
from finetune_trainer.cli.chat.find_model import BaseSource, FoundModel, Kind
from finetune_trainer.cli.chat.load_model import Workshop, load_speakers
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.adapter_names import publish_names
from finetune_trainer.export.base_model.causal_model import load_causal_model
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.sources import SourceAccess

CPU = torch.device("cpu")
IDS = torch.tensor([[20, 31, 42, 53, 64]])


def make_file(name: str, folder: Path, texts: list[str]) -> tuple[Path, Path]:
    base = make_family_model(name, folder / "base", texts)
    request = ExportRequest(base, None, folder, None, ("F32",), "tiny")
    (file,) = export(request, device=CPU, on_progress=lambda done, total: None)
    return base, file.path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def loaded(found: FoundModel, work: Path) -> Any:
    (speaker,) = load_speakers(found, Workshop(CPU, work, SourceAccess()), compare=False)
    return speaker.model


@pytest.mark.parametrize("name", ["llama-2", "smollm", "mistral-nemo", "qwen2.5", "qwen3", "gemma-2", "phi-4"])
def test_metadata_alone_are_enough_where_they_say_everything(name: str, texts: list[str], tmp_path: Path) -> None:
    base, file = make_file(name, tmp_path, texts)
    model = loaded(FoundModel(Kind.GGUF, file), tmp_path / "work")
    expected = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-3.1", "llama-linear", "qwen2.5-yarn", "gemma-3", "phi-3-long"])
def test_scaled_rope_needs_the_base_and_says_so(name: str, texts: list[str], tmp_path: Path) -> None:
    base, file = make_file(name, tmp_path, texts)
    with pytest.raises(TrainerError, match="--base"):
        loaded(FoundModel(Kind.GGUF, file), tmp_path / "work")
    model = loaded(FoundModel(Kind.GGUF, file, BaseSource(f"file://{base}")), tmp_path / "work")
    expected = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_an_adapter_of_a_model_that_reads_images_answers_text(name: str, texts: list[str], tmp_path: Path) -> None:
    """It is published for the whole checkpoint, and works on the language model alone as it does there."""
    base, adapter = make_multimodal_model(name, tmp_path / "base", texts), tmp_path / "adapter"
    alone, _ = load_causal_model(open_base_model(base), CPU, torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(alone, lora).save_pretrained(adapter)
    publish_names(adapter, base, name)

    found = FoundModel(Kind.ADAPTER, adapter, BaseSource(f"file://{base}"))
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    unchanged = whole(input_ids=IDS).logits
    expected = PeftModel.from_pretrained(whole, adapter).eval()(input_ids=IDS).logits
    assert (expected - unchanged).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded(found, tmp_path / "work")), expected, atol=1e-5, rtol=1e-5)
