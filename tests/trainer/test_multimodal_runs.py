"""Checkpoints that also read images train their language model on text, and stay what they are: merged results load as
the original does, with every other tensor byte for byte, and the adapter loads on the original."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Mxfp4Config

from finetune_api.outcome import Result
from finetune_test_models import tiny_runs
from finetune_test_models.published.multimodal_models import (
    AS_TRANSFORMERS_4,
    TRAINED,
    make_multimodal_model,
    turn_stored_stacks,
)
from finetune_test_models.published.packed_models import write_fp8, write_mxfp4
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.model.multimodal import language_model_names

texts, tiny_base, chat_file = tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file
run_config, settings = tiny_runs.run_config, tiny_runs.settings
TOKENS = torch.arange(3, 43).unsqueeze(0)
WITH_GGUF = ("gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl_moe")


@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_trains_on_text_and_stays_whole(
    name: str, gpus: int, tmp_path: Path, texts: list[str], run_config: tiny_runs.Builder, settings: Settings
) -> None:
    base = make_multimodal_model(name, tmp_path / "base", texts)
    config = run_config(
        model={"source": f"file://{base}"},
        export={"merged": "BF16", "gguf": ["F16"] if name in WITH_GGUF else []},
        training={"maxSteps": 3, "learningRate": 2e-2},
    )
    config = config.model_copy(update={"gpus": gpus})
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message

    manifest = Manifest.decode((tmp_path / "out" / "tiny" / "manifest.json").read_bytes())
    adapter, merged = (Path(artifact.uri) for artifact in manifest.artifacts[:2])
    assert not changed_tensors(base, merged)
    assert architectures(merged) == architectures(base)
    assert (merged / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    compare_logits(base, adapter, merged)


@pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["gemma4_moe", "qwen3_vl_moe", "qwen3_vl_moe_resaved"])
def test_a_mixture_that_reads_images_merges_its_experts_as_peft_does(
    name: str, gpus: int, tmp_path: Path, texts: list[str], run_config: tiny_runs.Builder, settings: Settings
) -> None:
    """To the bit. Logits say less: rounding sends tokens of these small models to other experts."""
    base = make_multimodal_model(name, tmp_path / "base", texts)
    config = run_config(
        model={"source": f"file://{base}"}, export={"merged": "BF16"}, training={"maxSteps": 2, "learningRate": 2e-2}
    ).model_copy(update={"gpus": gpus})
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message

    manifest = Manifest.decode((tmp_path / "out" / "tiny" / "manifest.json").read_bytes())
    adapter, merged = (Path(artifact.uri) for artifact in manifest.artifacts[:2])
    assert not changed_tensors(base, merged)
    ours, before = (load_file(folder / "model.safetensors") for folder in (merged, base))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in before.items()}
    if name in AS_TRANSFORMERS_4:
        turn_stored_stacks(merged)  # as transformers has them in memory
    in_memory = load_file(merged / "model.safetensors")
    peft: Any = PeftModel.from_pretrained(load_whole(base), adapter)
    theirs = peft.merge_and_unload().state_dict()
    assert [key for key, value in in_memory.items() if not torch.equal(value, theirs[key].to(value.dtype))] == []

    changed = {key.split("layers.")[1].replace(".mlp.", ".") for key in ours if not torch.equal(ours[key], before[key])}
    assert {f"{layer}.experts.{part}_proj" for layer in (0, 1) for part in ("gate_up", "down")} <= changed
    assert not [key for key in changed if "router" in key or key.endswith(".gate.weight")]


def compare_logits(base: Path, adapter: Path, merged: Path) -> None:
    """The adapter on the original, by peft, against the merged checkpoint, both loaded as the original is."""
    before = load_whole(base)
    unchanged = logits(before)
    adapted = PeftModel.from_pretrained(before, adapter).eval()
    assert not [n for n, _ in adapted.named_parameters() if "lora" in n and ("vision" in n or "visual" in n)]
    expected, found = logits(adapted), logits(load_whole(merged))
    difference, change = (found - expected).abs().max(), (unchanged - expected).abs().max()
    print(f"difference {difference:.2e}, change {change:.2e}")
    assert change > 0.1
    assert difference < 0.1 * change  # BF16 rounds merged weights: 0.7 to 6.2 % were measured (most: Qwen 3.5)


def architectures(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "config.json").read_text())["architectures"]
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits  # type: ignore[no-any-return]


def load_whole(folder: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def changed_tensors(base: Path, merged: Path) -> list[str]:
    """Names of the tensors beside the language model whose bytes, type or shape differ; all names must be the same."""
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(merged / "model.safetensors", "pt") as new:
        names = set(old.keys())
        assert set(new.keys()) == names
        rest = names - language_model_names(names).keys()
        assert rest
        pairs = {name: (old.get_tensor(name), new.get_tensor(name)) for name in rest}
        return [name for name, (a, b) in pairs.items() if a.dtype != b.dtype or not torch.equal(a, b)]


def test_a_checkpoint_in_fp8_comes_out_in_16_bits(
    tmp_path: Path, texts: list[str], run_config: tiny_runs.Builder, settings: Settings
) -> None:
    """As Ministral 3 is published: one scale for each matrix, and a tower in 16 bits."""
    base = make_multimodal_model("ministral3", tmp_path / "base", texts)
    decoded = write_fp8(base, tmp_path / "fp8", block=None)
    config = run_config(
        model={"source": f"file://{tmp_path / 'fp8'}"}, export={"merged": "BF16"}, training={"maxSteps": 2}
    )
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message

    manifest = Manifest.decode((tmp_path / "out" / "tiny" / "manifest.json").read_bytes())
    files = {artifact.type: Path(artifact.uri) for artifact in manifest.artifacts}
    merged = load_file(files["Merged"] / "model.safetensors")
    assert merged.keys() == load_file(base / "model.safetensors").keys(), "no scales are left"
    assert not changed_tensors(base, files["Merged"])
    assert "quantization_config" not in json.loads((files["Merged"] / "config.json").read_text())
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    assert 0 < (merged[name].float() - decoded[name]).abs().max() < 0.1
    load_whole(files["Merged"])
    card = (files["ModelCard"] / "README.md").read_text()
    assert "this model also reads images; its language model trains on text, and the rest (0.3 MiB) is copied" in card
    assert "its weights are published in FP8: they are decoded tensor by tensor, and merged weights have" in card
    assert "model = AutoModelForImageTextToText.from_pretrained(folder" in card


def test_a_model_in_mxfp4_trains_beside_its_experts(
    tmp_path: Path, texts: list[str], run_config: tiny_runs.Builder, settings: Settings
) -> None:
    base = write_mxfp4(tmp_path / "oss", texts)
    config = run_config(
        model={"source": f"file://{base}"}, export={"merged": "BF16"}, training={"maxSteps": 2, "learningRate": 2e-2}
    )
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    assert outcome.result is Result.SUCCEEDED, outcome.message
    manifest = Manifest.decode((tmp_path / "out" / "tiny" / "manifest.json").read_bytes())
    adapter, merged = (Path(artifact.uri) for artifact in manifest.artifacts[:2])

    decoder = Mxfp4Config(dequantize=True)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=decoder).eval()
    unchanged, expected = logits(whole), logits(PeftModel.from_pretrained(whole, adapter).eval())
    found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval())
    # Rounding to 16 bits sends a token whose experts are almost tied to another one: such a token differs by 1.7, here
    # one of 40, which one depends on the CPU; all others by 0.04 at most, and without training by 1 to 4.
    error, trained = ((one - expected).abs().amax(-1).flatten() for one in (found, unchanged))
    assert error.quantile(0.9) < 0.06 * trained.median()


def test_a_changed_tensor_of_the_tower_is_found(tmp_path: Path, texts: list[str]) -> None:
    base = make_multimodal_model("gemma3", tmp_path / "base", texts)
    shutil.copytree(base, tmp_path / "other")
    weights = bytearray((base / "model.safetensors").read_bytes())
    with safe_open(base / "model.safetensors", "pt") as file:
        last = max(file.keys(), key=lambda name: file.get_slice(name).get_shape() and name)
    weights[-1] ^= 64
    (tmp_path / "other" / "model.safetensors").write_bytes(weights)
    assert changed_tensors(base, tmp_path / "other") == [last]
