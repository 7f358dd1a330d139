"""Tokenizer and ends beside every published adapter and every merged model: the base's own bytes, and a list of ends
that stops every answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.outcome import Result
from finetune_test_models.family_models import make_family_model
from finetune_test_models.tiny_runs import Builder
from finetune_trainer.cli.pod import run_job
from finetune_trainer.export.base_model.ends import template_end
from finetune_trainer.export.base_model.published_tokenizer import tokenizer_of_adapter, write_tokenizer
from finetune_trainer.export.base_model.tokenizer_files import TOKENIZER_FILES, TokenizerFiles
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

Trained = Callable[..., tuple[Path, Path]]
FAMILIES = ("llama-3.1", "qwen2.5", "gemma-2", "phi-4-mini", "mistral-nemo", "phi-3")
MADE_BY_TRANSFORMERS_5 = {"local_files_only", "is_local", "backend"}


@pytest.fixture
def trained(run_config: Builder, settings: Settings, tmp_path: Path, texts: list[str]) -> Trained:
    """A base of a family, and the folder of a job's result trained on it."""

    def train(name: str, **model: Any) -> tuple[Path, Path]:
        base = make_family_model(name, tmp_path / "base", texts)
        spec = {"source": f"file://{base}", "quantization": "None", **model}
        exported = {"merged": "BF16", "gguf": ["F16"]}
        steps = {"maxSteps": 2, "checkpointSteps": 1}
        config = run_config(model=spec, export=exported, training=steps)
        config = config.model_copy(update={"keep_checkpoints_after_success": True})
        outcome = run_job(config, settings, ProgressTracker(), StopSignal())
        assert outcome.result is Result.SUCCEEDED, outcome.message
        assert settings.output_folder is not None
        return base, settings.output_folder / "tiny"

    return train


def tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def published(result: Path) -> list[Path]:
    """Folders with an adapter or merged weights: those of the result, and the checkpoint's."""
    found = [path.parent for name in ("adapter_model.safetensors", "model.safetensors") for path in result.rglob(name)]
    assert len(found) >= 3, found
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_files_are_the_bases_own_bytes(trained: Trained, name: str) -> None:
    base, result = trained(name)
    for folder in published(result):
        assert tokenizer_bytes(folder) == tokenizer_bytes(base), folder


def test_a_template_of_the_job_is_all_that_differs(trained: Trained) -> None:
    base, result = trained("gemma-2", chatTemplateName="Gemma")
    before = json.loads((base / "tokenizer_config.json").read_text())
    for folder in published(result):
        after = json.loads((folder / "tokenizer_config.json").read_text())
        assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {
            "chat_template",
            "eos_token",
        }
        assert after["eos_token"] == "<end_of_turn>"
        text = (folder / "chat_template.jinja").read_text()
        assert "<start_of_turn>" in text
        assert after["chat_template"] == text, "for readers that look only there"
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert AutoTokenizer.from_pretrained(folder).chat_template == text


ENDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a template with an end of its own": ("gemma-2", {"chatTemplateName": "Gemma"}, ["<eos>", "<end_of_turn>"]),
    "a base without a list": ("qwen3", {}, ["<|im_end|>"]),
    "several ends of the base": ("llama-3.1", {}, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
    "a written template with another end": (
        "phi-4-mini",
        {"chatTemplate": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|user|>{% endfor %}"},
        ["<|endoftext|>", "<|end|>", "<|user|>"],
    ),
}


@pytest.mark.parametrize(("name", "model", "expected"), ENDS.values(), ids=ENDS)
def test_every_file_names_the_same_ends(
    trained: Trained, name: str, model: dict[str, Any], expected: list[str]
) -> None:
    _, result = trained(name, **model)
    for folder in published(result):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.convert_tokens_to_ids(expected)
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == (
            ids if len(ids) > 1 else ids[0]
        )
        assert tokenizer.eos_token_id in ids
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            assert config["eos_token_id"] == (ids if len(ids) > 1 else ids[0])
            assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id in (ids, ids[0])

    fields = gguf.GGUFReader(next(result.rglob("*.gguf"))).fields
    found = {key: fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eos", "eot") if
             f"tokenizer.ggml.{key}_token_id" in fields}  # fmt: skip
    assert set(found.values()) <= set(ids)
    assert found["eot"] == template_end(TokenizerFiles(next(result.rglob("merged"))))


def test_generation_stops_at_the_templates_end(trained: Trained) -> None:
    """A model that says nothing but the template's end stops after one token; without the list it would go on."""
    base, result = trained("gemma-2", chatTemplateName="Gemma")
    merged = next(result.rglob("merged"))
    end = AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("<end_of_turn>")

    def answer(folder: Path) -> int:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        only_end = lambda _, scores: torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([end]), 0.0)  # noqa: E731
        prompt = torch.tensor([[3, 4, 5]])
        found = model.generate(prompt, max_new_tokens=9, do_sample=False, logits_processor=[only_end])
        return int(found.shape[1]) - 3

    (base / "generation_config.json").unlink()
    assert answer(merged) == 1
    assert answer(base) == 9
    adapter = next(result.rglob("adapter"))
    assert AutoPeftModelForCausalLM.from_pretrained(adapter).peft_config["default"].r == 4


def test_an_adapter_saved_by_transformers_5_is_exported_with_the_bases_tokenizer(
    tmp_path: Path, texts: list[str]
) -> None:
    base = make_family_model("llama-3.1", tmp_path / "base", texts)
    adapter = tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|eot_id|>"
    tokenizer.save_pretrained(adapter)
    assert json.loads((adapter / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"

    write_tokenizer(tokenizer_of_adapter(base, adapter), tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "out/chat_template.jinja").read_text() == tokenizer.chat_template
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not MADE_BY_TRANSFORMERS_5 & settings.keys()

    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    write_tokenizer(tokenizer_of_adapter(base, adapter), tmp_path / "own")
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "own").get_vocab(), "its own vocabulary stays"
    settings = json.loads((tmp_path / "own/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not MADE_BY_TRANSFORMERS_5 & settings.keys()


def test_an_export_without_training_writes_the_list_too(tmp_path: Path, texts: list[str]) -> None:
    base = make_family_model("gemma-2", tmp_path / "base", texts)
    shutil.copyfile(base / "generation_config.json", tmp_path / "kept.json")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 64}))
    template = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    request = ExportRequest(base, None, tmp_path / "out", merged="BF16", gguf=(), name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
    written = json.loads((tmp_path / "out/merged/generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<end_of_turn>")
    assert written == {"eos_token_id": [1, end], "top_k": 64}
