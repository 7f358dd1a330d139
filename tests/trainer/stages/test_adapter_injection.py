"""Coverage of an adapter: what preflight tells of a model's files is what the loaded model has."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Quantization
from finetune_test_models.minimal_run import minimal_run
from finetune_test_models.tiny_architectures import tiny_architecture
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.coverage import Coverage
from finetune_trainer.model.planned_weights import PlannedWeights, plan_weights
from finetune_trainer.model.weight_files import list_weights_below
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.expert_loading import adopt_experts, quantization_config

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "vocab_size": 256,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DENSE = ("llama", "phi3", "gemma3_text", "nemotron", "lfm2", "mamba")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "llama4_text", "olmoe", "hunyuan_v1_moe")
UNKNOWN = "afmoe"
"""A mixture whose experts the kernels do not know."""
ALL_LINEAR = ("mamba", "deepseek_v3")
"""Families of which all linear layers are adapted here: Mamba has none of the default ones."""


def make(folder: Path, family: str) -> Path:
    """A tiny random model, without a tokenizer."""
    set_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | (EXPERTS if family in (*MIXTURES, UNKNOWN) else {}))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


def load(folder: Path, quantization: Quantization) -> Any:
    nf4 = quantization_config(folder) if quantization is Quantization.NF4 else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=nf4
    )
    adopt_experts(model, list_weights_below(folder))
    return model


def job(quantization: Quantization, targets: list[str] | None = None) -> RunConfig:
    adapter = {"targetModules": targets} if targets else {}
    run = minimal_run(model={"quantization": quantization.value}, adapter=adapter)
    return run.model_copy(update={"gpus": 0})


def plan(folder: Path, config: RunConfig) -> PlannedWeights:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    planned = plan_weights(list_weights_below(folder), config, model_type, chosen=2)
    assert planned is not None
    return planned


def shares(coverage: Coverage) -> tuple[float, float]:
    return coverage.adapted_share, coverage.quantized_share


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
def test_files_tell_what_the_loaded_model_has(tmp_path: Path, family: str, quantization: Quantization) -> None:
    folder = make(tmp_path, family)
    targets = ["all-linear"] if family in ALL_LINEAR else None
    config = job(quantization, targets)
    planned = plan(folder, config).coverage
    adapted = inject_adapter(load(folder, quantization), config.adapter, 1)
    real = adapted.coverage
    assert not adapted.model.base_model.targeted_parameter_names, "such adapters cannot be merged"
    assert shares(planned) == pytest.approx(shares(real), abs=0.002)
    assert planned.stacked == real.stacked
    assert real.stacked == 0
    assert planned.experts == real.experts
    assert (real.experts > 0) == (family in MIXTURES)
    assert (real.quantized > 0) == (quantization is Quantization.NF4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_a_dense_model_is_covered_whole(tmp_path: Path, family: str) -> None:
    coverage = plan(make(tmp_path, family), job(Quantization.NF4)).coverage
    assert shares(coverage) == (1.0, 1.0)


def test_experts_that_the_files_hold_one_by_one_are_not_counted_as_linear(tmp_path: Path) -> None:
    folder = make(tmp_path, "mixtral")
    names = {tensor.name for tensor in list_weights_below(folder)}
    assert any(name.endswith("experts.0.w1.weight") for name in names), "as published"
    planned = plan(folder, job(Quantization.NF4))
    assert planned.coverage.experts == 2 * 4 * 3 * 64 * 128
    assert planned.coverage.stacked == 0
    assert planned.missing == []
    assert planned.coverage.adapted_share == pytest.approx(0.998, abs=0.001)
    assert planned.coverage.sentence().endswith("; experts are 88.7% of them")


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_bytes_are_those_of_the_loaded_model(tmp_path: Path, family: str, quantization: Quantization) -> None:
    """Experts among them; NF4's tables and the routers' fp32 are the difference."""
    folder = make(tmp_path, family)
    model = inject_adapter(load(folder, quantization), job(quantization).adapter, 1)
    tensors = [*model.model.parameters(), *(module for _, module in model.model.named_buffers())]
    real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    planned = plan(folder, job(quantization))
    assert planned.loaded_bytes == pytest.approx(real, rel=0.03)
    assert planned.adapter_parameters == model.trainable_parameters
    whole = sum(tensor.parameters for tensor in list_weights_below(folder))
    assert model.total_parameters - model.trainable_parameters == pytest.approx(whole, rel=0.001)


def test_weights_that_are_stored_in_nf4_are_counted_as_such(tmp_path: Path) -> None:
    load(make(tmp_path / "base", "llama"), Quantization.NF4).save_pretrained(tmp_path / "packed")
    config = job(Quantization.NONE)  # their files decide
    coverage = plan(tmp_path / "packed", config).coverage
    assert shares(coverage) == (1.0, 1.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"})
    real = inject_adapter(loaded, config.adapter, 1).coverage
    assert (coverage.parameters, coverage.quantized) == (real.parameters, real.quantized)


@pytest.mark.parametrize(
    ("family", "level"), [("llama", logging.INFO), ("mixtral", logging.INFO), ("afmoe", logging.WARNING)]
)
def test_the_log_says_it(tmp_path: Path, family: str, level: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = load(make(tmp_path, family), Quantization.NF4)
    inject_adapter(model, job(Quantization.NF4).adapter, 1)
    record = next(record for record in caplog.records if record.message.startswith("adapters on"))
    assert record.levelno == level
    assert ("the model has no gate_proj, up_proj, down_proj" in record.message) == (family == "afmoe")


def test_layers_beside_unknown_experts_that_peft_would_move_there_are_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path, "afmoe")
    planned = plan(folder, job(Quantization.NONE))
    assert planned.missing == ["gate_proj", "up_proj", "down_proj"]
    assert planned.coverage.stacked > 0
    assert not {"gate_proj", "up_proj", "down_proj"} & set(planned.left_out)
    with pytest.raises(TrainerError, match=r"peft cannot adapt down_proj in this model; choose from .*o_proj"):
        inject_adapter(load(folder, Quantization.NONE), job(Quantization.NONE, ["down_proj"]).adapter, 1)


def adapted_names(folder: Path, targets: list[str]) -> set[str]:
    """Last two parts of the names of the modules with an adapter, each of the experts' parts among them."""
    model = inject_adapter(load(folder, Quantization.NONE), job(Quantization.NONE, targets).adapter, 1).model
    owners = {name.split(".lora_A")[0] for name, value in model.named_parameters() if "lora_A" in name}
    return {".".join(owner.split(".")[-2:]) for owner in owners}


def test_shared_experts_and_dense_layers_get_their_own_adapters(tmp_path: Path) -> None:
    folder = make(tmp_path, "deepseek_v3")
    assert adapted_names(folder, ["down_proj"]) == {"mlp.down_proj", "shared_experts.down_proj", "adapters.down"}


def test_a_router_that_holds_a_linear_layer_is_not_quantised_and_gets_no_adapter(tmp_path: Path) -> None:
    folder = make(tmp_path, "hunyuan_v1_moe")
    model = load(folder, Quantization.NF4)
    router = model.model.layers[0].mlp.gate.wg
    assert router.weight.dtype is torch.float32
    assert model.model.layers[0].mlp.shared_mlp.up_proj.weight.dtype is torch.uint8, "the control"
    adapted = inject_adapter(model, job(Quantization.NF4, ["all-linear"]).adapter, 1)
    assert not [name for name, _ in adapted.model.named_parameters() if "wg" in name and "lora" in name]
    planned = plan(folder, job(Quantization.NF4, ["all-linear"]))
    assert planned.adapter_parameters == adapted.trainable_parameters


def test_only_experts_can_be_named_by_their_own_names(tmp_path: Path) -> None:
    folder = make(tmp_path, "mixtral")
    both = adapted_names(folder, ["w1", "w3"])
    assert both == adapted_names(folder, ["gate_proj", "up_proj"]) == {"adapters.gate", "adapters.up"}
    assert {"self_attn.q_proj", "adapters.down"} < adapted_names(folder, ["all-linear"])


@pytest.mark.parametrize(
    ("family", "adapter", "message"),
    [
        ("mixtral", {"variant": "DoRA"}, r"DoRA cannot be put on the experts of this model: write LoRA or RSLoRA, or"),
        (
            "gpt_oss",
            {"targetModules": ["q_proj", "up_proj"]},
            r"up_proj of this model's experts lies in one tensor with",
        ),
        ("mixtral", {"targetModules": ["w4"]}, r"the model has no layer w4; choose from .*w1, w2, w3"),
    ],
)
def test_what_experts_cannot_have_is_refused(
    tmp_path: Path, family: str, adapter: dict[str, Any], message: str
) -> None:
    folder, config = make(tmp_path, family), job(Quantization.NONE)
    spec = type(config.adapter).model_validate(adapter)
    with pytest.raises(TrainerError, match=message):
        inject_adapter(load(folder, Quantization.NONE), spec, 1)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    planned = plan_weights(
        list_weights_below(folder), config.model_copy(update={"adapter": spec}), model_type, chosen=2
    )
    assert planned is None, "preflight says it, too"


def test_a_layer_that_peft_refuses_in_a_mamba_is_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path, "mamba")
    with pytest.raises(TrainerError, match="peft cannot adapt out_proj in this model; choose from in_proj"):
        inject_adapter(load(folder, Quantization.NONE), job(Quantization.NONE, ["out_proj"]).adapter, 1)


@pytest.mark.filterwarnings("ignore")  # the Mamba kernels are not installed
def test_linear_layers_that_are_named_as_a_decoder_layer_is_get_no_adapter(tmp_path: Path) -> None:
    tiny_architecture("zamba2").save_pretrained(tmp_path)
    model = load(tmp_path, Quantization.NONE)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert any(name.endswith("adapter_list.1.0") for name in names), "layers.0 is a decoder layer"
    adapted = inject_adapter(model, job(Quantization.NONE, ["all-linear"]).adapter, 1)
    owners = {name.split(".lora_A")[0] for name, _ in adapted.model.named_parameters() if "lora_A" in name}
    assert {"0", "1"}.isdisjoint(owner.rpartition(".")[2] for owner in owners)
    assert any(owner.endswith("q_proj") for owner in owners)
    with pytest.raises(TrainerError, match="peft cannot adapt 0 in this model; choose from"):
        inject_adapter(load(tmp_path, Quantization.NONE), job(Quantization.NONE, ["0"]).adapter, 1)
