"""Adapters on experts from loading to merging: what was trained is what the merged files compute, for experts that the
files hold one by one and for stacks; peft itself reads the adapter of a stack."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Precision
from finetune_kernels.experts.replacing import stacked_experts
from finetune_test_models import tiny_runs
from finetune_test_models.references.exact_merges import load_all, merged_in_fp32
from finetune_test_models.tiny_architectures import MIXTURES, STACKED, make_mixture
from finetune_trainer.export.adapter import open_adapter
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import InvalidAdapterError
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.saving import check_saving, save_artifacts
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss

texts, tiny_base, chat_file, run_config = (
    tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file, tiny_runs.run_config,
)  # fmt: skip
HYBRIDS = ("qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "nemotron_h")
"""Types with other mixers beside experts; files of Nemotron H name their layers as transformers does not."""
IDS = torch.randint(3, 500, (1, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits[0].float()
    return found


def job(run_config: tiny_runs.Builder, base: Path, **sections: dict[str, Any]) -> RunConfig:
    fixed: dict[str, dict[str, Any]] = {"model": {"source": f"file://{base}", "quantization": "None"}}
    return run_config(**fixed | {"export": {"merged": "BF16"}} | sections)


def trained(base: Path, config: RunConfig) -> tuple[Any, LoadedModel]:
    """A few steps on one row; every adapter changes."""
    loaded = load_model(base, config.model, Precision.FP32, gpus=0)
    model = inject_adapter(loaded.model, config.adapter, 1).model
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    for _ in range(3):
        supervised_loss(model, {"input_ids": IDS}, IDS, torch.arange(23), None).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, loaded


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("model_type", [*MIXTURES, *HYBRIDS])
def test_merged_files_compute_what_was_trained(
    model_type: str, run_config: tiny_runs.Builder, texts: list[str], tmp_path: Path
) -> None:
    base = make_mixture(tmp_path / "base", model_type, texts)
    config = job(run_config, base)
    model, loaded = trained(base, config)
    check_saving(model, loaded, base, config, tmp_path / "check")
    saved = save_artifacts(model, loaded, base, config, tmp_path)
    assert saved.failed == ()
    adapter, merged = (artifact.path for artifact in saved.artifacts)

    # In fp32, as rounding to BF16 sends tokens near a tie to other experts; the merged files are these values, rounded.
    exact = merged_in_fp32(base, adapter, tmp_path / "exact")
    expected, effect = logits(model), (logits(model) - logits(plain(base))).abs().max()
    assert (logits(plain(exact)) - expected).abs().max() < 1e-3 * effect
    rounded, whole = load_all(merged), load_all(exact)
    assert rounded.keys() == whole.keys() == load_all(base).keys(), "the original's tensors and no others"
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)

    # Without the part of the adapter that is on experts it is another model.
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    attention = {name: value for name, value in factors.items() if ".experts." not in name}
    assert all(name.startswith("base_model.model.model.layers.") for name in factors), "one way to begin a name"
    assert 0 < len(attention) < len(factors)
    save_file(attention, path)
    assert (logits(plain(merged_in_fp32(base, adapter, exact))) - expected).abs().max() > 0.02 * effect


@pytest.mark.parametrize("model_type", STACKED)
def test_peft_reads_the_adapter_of_a_stack(
    model_type: str, run_config: tiny_runs.Builder, texts: list[str], tmp_path: Path
) -> None:
    base = make_mixture(tmp_path / "base", model_type, texts, torch.float32)
    config = job(run_config, base)
    model, loaded = trained(base, config)
    adapter = save_artifacts(model, loaded, base, config, tmp_path).artifacts[0].path
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]

    expected = logits(model)
    found = logits(PeftModel.from_pretrained(plain(base), str(adapter)))
    assert (found - expected).abs().max() < 1e-3 * (expected - logits(plain(base))).abs().max()


# peft looks for the rank of the stack that it makes of gate and up among modules only, and takes it all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_adapters_have_the_files_names_and_peft_reads_them(
    model_type: str, run_config: tiny_runs.Builder, texts: list[str], tmp_path: Path
) -> None:
    base = make_mixture(tmp_path / "base", model_type, texts, torch.float32)
    config = job(run_config, base)
    model, loaded = trained(base, config)
    adapter = save_artifacts(model, loaded, base, config, tmp_path).artifacts[0].path
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        gate = "mlp.experts.3.gate_proj" if model_type == "qwen3_moe" else "block_sparse_moe.experts.3.w1"
        prefix = f"base_model.model.model.layers.1.{gate}"
        assert file.get_slice(f"{prefix}.lora_A.weight").get_shape() == [4, 64]
        assert file.get_slice(f"{prefix}.lora_B.weight").get_shape()[1] == 4
        assert not file.get_tensor(f"{prefix}.lora_A.weight")[2:].any(), "a token goes through 2 experts: rank 2 of 4"
        assert file.get_tensor(f"{prefix}.lora_A.weight")[:2].any(dim=1).all()
    stored = {tensor.name for tensor in open_base_model(base).tensors}
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for name in names} <= stored

    expected = logits(model)
    found = logits(PeftModel.from_pretrained(plain(base), str(adapter)))
    assert (found - expected).abs().max() < 1e-3 * (expected - logits(plain(base))).abs().max()


@pytest.mark.parametrize(("targets", "tensors"), [(["gate_up_proj"], 1), (["down_proj"], 1), (["q_proj"], 0)])
def test_a_part_of_the_experts_can_be_named(
    targets: list[str], tensors: int, run_config: tiny_runs.Builder, texts: list[str], tmp_path: Path
) -> None:
    base = make_mixture(tmp_path / "base", "gpt_oss", texts)
    config = job(run_config, base, adapter={"targetModules": targets, "variant": "RSLoRA"})
    model, loaded = trained(base, config)
    saved = save_artifacts(model, loaded, base, config, tmp_path)
    assert saved.failed == ()
    assert all(len(experts.adapters) == tensors for _, experts in stacked_experts(model))
    expected, effect = logits(model), (logits(model) - logits(plain(base))).abs().max()
    exact = merged_in_fp32(base, saved.artifacts[0].path, tmp_path / "exact")
    assert (logits(plain(exact)) - expected).abs().max() < 1e-3 * effect


def test_a_stack_that_does_not_fit_is_refused(run_config: tiny_runs.Builder, texts: list[str], tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "gpt_oss", texts)
    config = job(run_config, base, export={"merged": "None"})
    model, loaded = trained(base, config)
    adapter = save_artifacts(model, loaded, base, config, tmp_path).artifacts[0].path
    other = make_mixture(tmp_path / "other", "qwen3_moe", texts)
    with pytest.raises(InvalidAdapterError, match="the base holds no stack in that layer: wrong base model"):
        open_adapter(adapter, open_base_model(other))

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(each for each in tensors if "base_layer.lora_A" in each)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)
    with pytest.raises(InvalidAdapterError, match=r"do not fit model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        open_adapter(adapter, open_base_model(base))
