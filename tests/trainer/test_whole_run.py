"""The whole workflow without a cluster: what comes out loads; every bad input ends with its reason and no result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune_api.failures import ExitCode
from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_test_models import tiny_runs
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

texts, tiny_base, chat_file = tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file
run_config, settings = tiny_runs.run_config, tiny_runs.settings
Builder = tiny_runs.Builder
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def run(config: RunConfig, settings: Settings) -> Outcome:
    return run_job(config, settings, ProgressTracker(), StopSignal())


def result_folder(settings: Settings) -> Path:
    assert settings.output_folder is not None
    return settings.output_folder / "tiny"


@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.gpu)])
def test_adapter_and_merged_weights_load_and_agree(
    run_config: Builder, settings: Settings, tiny_base: Path, gpus: int
) -> None:
    training = {"maxSteps": 20, "learningRate": 1e-2}
    exported = {"merged": "BF16", "gguf": ["F16"]}
    config = run_config(export=exported, training=training).model_copy(update={"gpus": gpus})
    outcome = run(config, settings)
    assert outcome.result is Result.SUCCEEDED, outcome.message
    manifest = Manifest.decode((result_folder(settings) / "manifest.json").read_bytes())
    kinds = ["Adapter", "Merged", "GGUF", "Modelfile", "ModelCard", "Configuration", "Metrics"]
    assert [artifact.type for artifact in manifest.artifacts] == kinds
    assert outcome.artifacts == tuple(artifact.as_artifact() for artifact in manifest.artifacts)
    card = (Path(manifest.artifacts[4].uri) / "README.md").read_text()
    assert "Of the layers' weights, 100.0% have an adapter; 100.0% were in NF4 while training." in card

    adapter, merged = (Path(artifact.uri) for artifact in manifest.artifacts[:2])
    learned = load_file(adapter / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in learned.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, adapter)
    tokens = torch.arange(1, 33).unsqueeze(0)
    with torch.no_grad():
        expected = with_adapter(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
        unchanged = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(tokens).logits
    rounding = (found - expected).abs().max()
    assert rounding < 0.1 * (unchanged - expected).abs().max()


def test_a_finished_result_is_reused(run_config: Builder, settings: Settings) -> None:
    first = run(run_config(), settings)
    again = run(run_config(job={"uid": "uid-2"}), settings)
    assert again.reused
    assert again.artifacts == first.artifacts
    other = run(run_config(job={"uid": "uid-3"}, training={"seed": 1}), settings)
    assert other.reason == "OutputExists"


def test_new_data_or_a_new_model_is_no_finished_result(
    run_config: Builder, settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    """Without preflight, the trainer compares: the specification is the same, the files behind it are not."""
    model, data = tmp_path / "model", tmp_path / "chat.jsonl"
    shutil.copytree(tiny_base, model)
    data.write_text(json.dumps(CHAT) + "\n")

    def again(uid: str) -> Outcome:
        sources = {"model": {"source": f"file://{model}"}, "dataset": {"source": f"file://{data}"}}
        return run(run_config(job={"uid": uid}, **sources), settings)

    first = again("uid-1")
    assert (first.result, first.reused, again("uid-2").reused) == ("Succeeded", False, True)
    data.write_text(json.dumps(CHAT) + "\n" + json.dumps(CHAT) + "\n")
    changed = again("uid-3")
    assert (changed.reason, changed.reused, changed.step) == ("OutputExists", False, None)
    assert "but the data have changed" in changed.message
    data.write_text(json.dumps(CHAT) + "\n")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())  # as another download would
    assert "but the model has changed" in again("uid-4").message


def model_without(base: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(base, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


BAD_DATA: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a wrong row names its line": (json.dumps(CHAT) + '\n{"messages": 7}\n', {}, "InvalidRow", "rows.jsonl:2"),
    "a wrong role says which are right": (
        '{"messages": [{"role": "usr", "content": "a"}]}',
        {},
        "InvalidRow",
        "write system, user, assistant or tool",
    ),
    "broken JSON names its line": (json.dumps(CHAT) + "\n{\n", {}, "InvalidRow", "rows.jsonl:2: not valid JSON"),
    "a missing column names what is there": ('{"question": "a"}', {}, "MissingColumn", "question"),
    "an empty file": ("\n", {}, "EmptyDataset", "no usable row"),
    "only bad rows, skipped": ('{"messages": 7}', {"onBadRow": "Skip"}, "EmptyDataset", "1 rows were skipped"),
    "no answer within the length": (
        json.dumps({"messages": [{"role": "user", "content": "x " * 400}, CHAT["messages"][1]]}),
        {},
        "NoSupervisedTokens",
        "maxSequenceLength = 128",
    ),
    "one row, and evaluation": (json.dumps(CHAT), {"evaluation": {"fraction": 0.5}}, "EmptyDataset", "at least two"),
}


@pytest.mark.parametrize(("text", "changes", "reason", "part"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_ends_with_its_reason_and_publishes_nothing(
    run_config: Builder, settings: Settings, tmp_path: Path, text: str, changes: dict[str, Any], reason: str, part: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    outcome = run(run_config(dataset={"source": f"file://{path}", **changes}), settings)
    assert (outcome.result, outcome.reason, outcome.exit_code) == (Result.FAILED, reason, ExitCode.DATA)
    assert part in outcome.message
    assert not list(result_folder(settings).rglob("*.*"))


BAD_MODELS: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown architecture": ({"architectures": ["NoSuchLM"]}, "UnsupportedArchitecture", "NoSuchLM"),
    "code of the repository": (
        {"architectures": ["MineLM"], "auto_map": {"AutoModelForCausalLM": "mine.MineLM"}},
        "UnsafeModel",
        "never run",
    ),
    "weights of another quantisation": (
        {"quantization_config": {"quant_method": "gptq"}},
        "InvalidConfiguration",
        "gptq",
    ),
}


@pytest.mark.parametrize(("changes", "reason", "part"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_end_with_their_reason(
    run_config: Builder,
    settings: Settings,
    tiny_base: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
    part: str,
) -> None:
    folder = model_without(tiny_base, tmp_path / "model", **changes)
    outcome = run(run_config(model={"source": f"file://{folder}"}), settings)
    assert outcome.reason == reason
    assert part in outcome.message


def test_pickled_weights_are_not_loaded(
    run_config: Builder, settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    folder = model_without(tiny_base, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    outcome = run(run_config(model={"source": f"file://{folder}"}), settings)
    assert outcome.reason == "UnsafeModel"
    assert "safetensors" in outcome.message


def test_a_broken_template_and_absent_modules_are_named(run_config: Builder, settings: Settings) -> None:
    template = run(run_config(model={"chatTemplate": "{% for %}"}), settings)
    assert template.reason == "InvalidChatTemplate"
    modules = run(run_config(adapter={"targetModules": ["q_proj", "wide_proj"]}), settings)
    assert modules.reason == "InvalidConfiguration"
    assert "wide_proj" in modules.message
    assert "up_proj" in modules.message


def test_a_loss_that_is_no_number_is_never_published(run_config: Builder, settings: Settings) -> None:
    training = {"learningRate": 1.0, "maxSteps": 40, "warmupSteps": 0, "maxGradNorm": 1000, "scheduler": "Constant"}
    outcome = run(run_config(training=training, adapter={"alpha": 4096}), settings)
    assert outcome.reason == "NonFiniteLoss"
    assert not (result_folder(settings) / "manifest.json").exists()
