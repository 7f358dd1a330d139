"""Merging: the same numbers as peft's own merge; bounded memory; nothing left behind by an export that fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.errors import InvalidAdapterError, InvalidBaseError
from finetune_trainer.export.export import ExportedFile, ExportRequest, export

VARIANTS: dict[str, dict[str, Any]] = {"LoRA": {}, "RSLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


def make_adapter(base: Path, target: Path, **options: Any) -> Path:
    """An adapter with random, not zero, B matrices."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.mul_(1.1)
    adapted.save_pretrained(target)
    return target


def run(base: Path, adapter: Path | None, output: Path, **changes: Any) -> list[ExportedFile]:
    options = {"merged": "BF16", "gguf": (), "name": "model"} | changes
    request = ExportRequest(base=base, adapter=adapter, output=output, **options)
    return export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_merged_weights_are_pefts_own_rounded_once(tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **options)
    run(tiny_base, adapter, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "out/merged/model.safetensors")
    assert merged.keys() == load_file(tiny_base / "model.safetensors").keys()
    for name, weights in merged.items():
        expected = reference[name].bfloat16()
        # fp32 sums in another order may round to the neighbouring bfloat16 value, and to no other.
        assert torch.allclose(weights.float(), expected.float(), rtol=2**-7, atol=1e-6), name
        assert (weights != expected).float().mean() < 0.01, name


def test_without_an_adapter_the_weights_are_the_bases(tiny_base: Path, tmp_path: Path) -> None:
    run(tiny_base, None, tmp_path / "out")
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "out/merged", tiny_base))
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_a_sharded_base_stays_sharded_and_loads(tiny_base: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="1MB")
    for path in tiny_base.glob("tokenizer*"):
        shutil.copy(path, sharded)
    run(sharded, None, tmp_path / "out")
    merged = tmp_path / "out/merged"
    assert len(list(merged.glob("*.safetensors"))) > 1
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    original = load_file(tiny_base / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(weights.numel() * 2 for weights in original.values())
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    assert torch.equal(loaded["lm_head.weight"], original["lm_head.weight"])


def test_an_adapter_of_another_model_is_refused(tiny_base: Path, tmp_path: Path, texts: list[str]) -> None:
    other = make_tiny_model(tmp_path / "other", texts=texts, hidden_size=512)
    adapter = make_adapter(other, tmp_path / "adapter")
    with pytest.raises(InvalidAdapterError, match="wrong base model"):
        run(tiny_base, adapter, tmp_path / "out")


def test_an_adapter_with_numbers_that_are_none_is_refused_and_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[-1]
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(TrainerError, match="NaN") as refusal:
        run(tiny_base, adapter, tmp_path / "out", gguf=("F16",))
    assert refusal.value.reason == "InvalidConfiguration"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("outputs", [{"merged": "BF16", "gguf": ()}, {"merged": None, "gguf": ("Q4_K_M",)}])
def test_a_base_with_numbers_that_are_none_is_refused_and_leaves_nothing(
    tiny_base: Path, tmp_path: Path, value: float, outputs: dict[str, Any]
) -> None:
    """Training may not notice: the embedding of a token that no row has."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidBaseError, match=r"model.embed_tokens.weight holds NaN or infinity"):
        run(base, None, tmp_path / "out", **outputs)
    assert not list((tmp_path / "out").iterdir())


def test_pickled_and_damaged_weights_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny_base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InvalidBaseError, match="pickled"):
        run(pickled, None, tmp_path / "out")
    cut = shutil.copytree(tiny_base, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidBaseError, match="damaged"):
        run(cut, None, tmp_path / "out")


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from finetune_trainer.export.export import ExportRequest, export
torch.zeros(1).to(torch.float32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(base):
    base, output = Path(base), Path(sys.argv[3])
    types = ("Q8_0", "Q4_K_M", "F16")
    request = ExportRequest(base=base, adapter=None, output=output, merged="BF16", gguf=types, name="m")
    export(request, device=torch.device("cpu"), on_progress=lambda done, total: None)
run(sys.argv[1])
before = peak()
run(sys.argv[2])
print(peak() - before)
"""


def test_memory_is_a_few_tensors_whatever_the_models_size(tmp_path: Path, texts: list[str]) -> None:
    """24 layers of the same width need no more than 4 layers do: the files are 6 times as large."""
    small = make_tiny_model(tmp_path / "small", texts=texts, num_hidden_layers=4, hidden_size=512)
    large = make_tiny_model(tmp_path / "large", texts=texts, num_hidden_layers=24, hidden_size=512)
    size = (large / "model.safetensors").stat().st_size / 2**20
    arguments = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert size > 90
    assert float(done.stdout) < size / 4
