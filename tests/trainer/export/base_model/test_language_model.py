"""The language model of a checkpoint that reads images, too, comes out as a model of its own, and trains as one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from finetune_api.run_config import RunConfig
from finetune_test_models.tiny_model import train_tokenizer
from finetune_test_models.tiny_runs import Builder
from finetune_trainer.cli.pod import run_job
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.model.description import check_architecture

TOKENS = torch.arange(3, 33).unsqueeze(0)
TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "sliding_window": 64, "query_pre_attn_scalar": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def with_images(tmp_path: Path, texts: list[str]) -> Path:
    """A tiny Gemma 3 with a tower for images; its configuration leaves out defaults, as published ones do."""
    folder = tmp_path / "images"
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=2)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(texts, vocab_size=512).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["text_config"] = TEXT | {"model_type": "gemma3_text"}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def export_to(base: Path, output: Path, *, merged: str | None = None, gguf: tuple[str, ...] = ()) -> Path:
    request = ExportRequest(base, None, output, merged=merged, gguf=gguf, name="g")
    files = export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    return files[0].path


@torch.no_grad()
def test_the_language_model_alone_says_the_same(with_images: Path, tmp_path: Path) -> None:
    whole = Gemma3ForConditionalGeneration.from_pretrained(with_images, dtype=torch.float32).eval()
    text = export_to(with_images, tmp_path / "text", merged="BF16").parent
    assert check_architecture(text) == "Gemma3ForCausalLM"
    alone, info = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), "every tensor has its place, and there is no other"
    assert torch.equal(alone.eval()(TOKENS).logits, whole(input_ids=TOKENS).logits)
    assert alone.config.eos_token_id == 2
    of_images, of_text = (export_to(base, tmp_path / base.name, gguf=("F16",)) for base in (with_images, text))
    assert of_images.read_bytes() == of_text.read_bytes()


def test_it_trains_where_the_whole_is_refused_with_the_way_out(
    with_images: Path, tmp_path: Path, run_config: Builder
) -> None:
    with pytest.raises(TrainerError, match=re.escape("finetune export --base SRC --output DIR --merged BF16")):
        check_architecture(with_images)

    def outcome_of(folder: Path, name: str) -> tuple[str, str | None]:
        config: RunConfig = run_config(model={"source": f"file://{folder}"}, training={"maxSteps": 1})
        settings = Settings(tmp_path / name, "a", output_folder=tmp_path / f"{name}-out")
        outcome = run_job(config, settings, ProgressTracker(), StopSignal())
        return outcome.result.value, outcome.reason

    text = export_to(with_images, tmp_path / "text", merged="BF16").parent
    assert outcome_of(with_images, "whole") == ("Failed", "UnsupportedArchitecture")
    assert outcome_of(text, "alone")[0] == "Succeeded"


@torch.no_grad()
def test_a_head_of_its_own_comes_out_too(with_images: Path, tmp_path: Path) -> None:
    """It stands outside the language model's prefix, and the outer config says that it is not tied."""
    whole = Gemma3ForConditionalGeneration.from_pretrained(with_images, dtype=torch.float32)
    whole.config.tie_word_embeddings = False
    whole.lm_head.weight = torch.nn.Parameter(-whole.lm_head.weight.detach())
    untied = tmp_path / "untied"
    shutil.copytree(with_images, untied)
    whole.to(torch.bfloat16).save_pretrained(untied)
    expected = Gemma3ForConditionalGeneration.from_pretrained(untied, dtype=torch.float32).eval()(input_ids=TOKENS)
    text = export_to(untied, tmp_path / "text", merged="BF16").parent
    assert json.loads((text / "config.json").read_text())["tie_word_embeddings"] is False
    alone = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    assert torch.equal(alone(TOKENS).logits, expected.logits)


def test_a_checkpoint_without_the_prefixes_is_refused(with_images: Path) -> None:
    path = with_images / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"language_model.", b"languageXmodel."))
    with pytest.raises(InvalidBaseError, match=r"no tensor .* begins with language_model\.model"):
        open_base_model(with_images)
