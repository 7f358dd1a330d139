"""Families that have none of Llama's names get adapters on all linear layers of their blocks by default: those that
preflight names are those that train, each of them learns, and each can be merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.run_config import RunConfig
from finetune_api.spec.training import ALL_LINEAR, DEFAULT_TARGETS, AdapterSpec
from finetune_test_models.sweeps import merge_sweep
from finetune_test_models.tiny_architectures import make_mixture, tiny_architecture
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.settings import Settings
from finetune_trainer.model import adapter_targets
from finetune_trainer.model.adapter_targets import LinearLayers, choose_targets
from finetune_trainer.model.coverage import adapted_layers
from finetune_trainer.model.layer_weights import layer_weights
from finetune_trainer.model.weight_files import list_weights_below
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.table import facts
from finetune_trainer.stages.adapter_injection import inject_adapter

NEOX = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
OWN = {
    "gpt_neox": NEOX,
    "falcon": NEOX,
    "mpt": ["Wqkv", "down_proj", "out_proj", "up_proj"],
    "gpt_bigcode": ["c_attn", "c_fc", "c_proj"],
    "dbrx": ["Wqkv", "out_proj"],
    "mamba": ["in_proj"],
}
"""`model_type` -> its default, some of many: without heads, routers and what kernels read past an adapter."""


def layers_of(model_type: str, *names: str) -> LinearLayers:
    return LinearLayers(frozenset(names), are_transposed=model_type in adapter_targets.TRANSPOSED_TYPES)


def untrained(model: Any) -> list[str]:
    """Names of a peft model's adapters that get no gradient."""
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in adapters.values():
        torch.nn.init.normal_(weight, std=0.1)
    ids = torch.arange(3, 43)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return [name for name, weight in adapters.items() if weight.grad is None or not weight.grad.any()]


@pytest.mark.parametrize(("model_type", "names"), OWN.items(), ids=OWN)
def test_the_default_is_all_linear_layers_of_the_blocks(model_type: str, names: list[str], tmp_path: Path) -> None:
    merge_sweep.write_model(model_type, tmp_path)
    weights = layer_weights(list_weights_below(tmp_path), quantized=False, model_type=model_type)
    layers = LinearLayers.of(weights, model_type)
    assert choose_targets(layers, DEFAULT_TARGETS) == names
    assert layers.missing_defaults(DEFAULT_TARGETS) == []

    model = inject_adapter(AutoModelForCausalLM.from_pretrained(tmp_path), AdapterSpec(), 0).model
    assert set(model.base_model.targeted_module_names) == adapted_layers(weights, names)
    assert untrained(model) == []
    assert merge_sweep.ask(model_type, tmp_path, DEFAULT_TARGETS) == merge_sweep.MergeAnswer(None, None)


def test_layers_that_mamba_reads_past_an_adapter_would_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_targets, "MAMBA_1_BARRED", ())
    model = inject_adapter(tiny_architecture("mamba"), AdapterSpec(), 0).model
    assert {name.split(".")[-4] for name in untrained(model)} == {"dt_proj"}


def test_gpt_j_has_other_names_for_all_of_the_default() -> None:
    model = inject_adapter(tiny_architecture("gptj"), AdapterSpec(), 0)
    assert model.coverage.adapted_share == 1.0


def test_a_name_of_llamas_for_both_ends_of_attention_keeps_the_default() -> None:
    assert choose_targets(layers_of("llama", "q_proj", "o_proj", "strange"), DEFAULT_TARGETS) == ["q_proj", "o_proj"]
    assert choose_targets(layers_of("llama", "q_proj", "strange"), DEFAULT_TARGETS) == ["q_proj", "strange"]


@pytest.mark.parametrize("model_type", adapter_targets.TRANSPOSED_TYPES)
def test_transposed_layers_have_no_default_and_the_refusal_names_them(model_type: str) -> None:
    layers = layers_of(model_type, "c_attn", "c_fc", "c_proj")
    with pytest.raises(TrainerError, match="choose from c_attn, c_fc, c_proj"):
        choose_targets(layers, DEFAULT_TARGETS)


@pytest.mark.parametrize("targets", [("c_attn", "c_fc", "c_proj"), (ALL_LINEAR,)])
def test_transposed_layers_that_a_job_names_train_in_16_bits(targets: tuple[str, ...]) -> None:
    adapted = inject_adapter(tiny_architecture("gpt2"), AdapterSpec(target_modules=targets), 0)
    assert adapted.coverage.adapted_share == 1.0


def test_preflight_names_the_layers_of_a_job_that_names_none(
    tmp_path: Path, texts: list[str], run_config: Callable[..., RunConfig], settings: Settings
) -> None:
    folder = make_mixture(tmp_path / "neox", "gpt_neox", texts)
    report, _ = run_preflight(run_config(model={"source": f"file://{folder}"}), settings)
    assert not [finding for finding in report.findings if "targetModules" in finding.location]
    said = "dense, dense_4h_to_h, dense_h_to_4h, query_key_value, all linear layers, as it has not the default's names"
    assert dict(facts(report))["with an adapter"] == f"100.0% of the layers' weights: {said}"
