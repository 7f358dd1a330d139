"""The language model of a checkpoint that also reads images: its GGUF files, its head, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from finetune_test_models.tiny_model import train_tokenizer
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.causal_model import load_causal_model
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.export import ExportRequest, export
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


def test_gguf_files_are_those_of_the_language_model_alone(with_images: Path, tmp_path: Path) -> None:
    alone, _ = load_causal_model(open_base_model(with_images), torch.device("cpu"), torch.bfloat16)
    alone.save_pretrained(tmp_path / "text")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(with_images / name, tmp_path / "text" / name)
    of_images, of_text = (
        export_to(base, tmp_path / f"{base.name}-gguf", gguf=("F16",)) for base in (with_images, tmp_path / "text")
    )
    assert of_images.read_bytes() == of_text.read_bytes()


@torch.no_grad()
def test_without_an_adapter_the_whole_comes_out_as_it_is(with_images: Path, tmp_path: Path) -> None:
    merged = export_to(with_images, tmp_path / "merged", merged="BF16").parent
    assert load_file(merged / "model.safetensors").keys() == load_file(with_images / "model.safetensors").keys()
    before, after = (Gemma3ForConditionalGeneration.from_pretrained(each).eval() for each in (with_images, merged))
    assert torch.equal(before(input_ids=TOKENS).logits, after(input_ids=TOKENS).logits)
    assert after.config.eos_token_id == 2


@torch.no_grad()
def test_a_head_of_its_own_is_the_language_models(with_images: Path, tmp_path: Path) -> None:
    """It stands outside the language model's prefix, and the outer config says that it is not tied."""
    whole = Gemma3ForConditionalGeneration.from_pretrained(with_images, dtype=torch.float32)
    whole.config.tie_word_embeddings = False
    whole.lm_head.weight = torch.nn.Parameter(-whole.lm_head.weight.detach())
    untied = tmp_path / "untied"
    shutil.copytree(with_images, untied)
    whole.to(torch.bfloat16).save_pretrained(untied)
    expected = Gemma3ForConditionalGeneration.from_pretrained(untied, dtype=torch.float32).eval()(input_ids=TOKENS)
    base = open_base_model(untied)
    assert not base.is_tied
    alone, _ = load_causal_model(base, torch.device("cpu"), torch.float32)
    assert torch.equal(alone.eval()(TOKENS).logits, expected.logits)


def test_a_checkpoint_without_the_prefixes_is_refused(with_images: Path) -> None:
    path = with_images / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"language_model.", b"languageXmodel."))
    with pytest.raises(InvalidBaseError, match=r"no tensor .* begins with language_model\.model"):
        open_base_model(with_images)


def test_a_wrapper_that_is_not_known_is_refused_with_the_ones_that_are(with_images: Path) -> None:
    config = json.loads((with_images / "config.json").read_text())
    config |= {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"]}
    (with_images / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainerError, match=r"reads more than text, .* types exaone4_5, .*qwen3_vl") as failure:
        check_architecture(with_images)
    assert failure.value.reason == "UnsupportedArchitecture"
