"""The base model's own dropout is off while adapters train, whatever its family calls it, and a run says so."""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, set_seed

from finetune_api.spec.inputs import ModelSpec
from finetune_api.vocabulary import Precision, Quantization
from finetune_kernels.planning.fused_support import why_not_described
from finetune_test_models.tiny_architectures import VOCABULARY, make_mixture, tiny_config
from finetune_trainer.model.configuration.dropout import describe_dropout, dropout_rates, switch_off_dropout
from finetune_trainer.model.configuration.reading import read_language_model_config, read_published_config
from finetune_trainer.stages.model_loading import load_model

RATE = 0.4
ON: dict[str, tuple[str, ...]] = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neo": ("resid_dropout", "embed_dropout", "attention_dropout"),
    "gpt_neox": ("attention_dropout", "hidden_dropout"),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
    "biogpt": ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop"),
    "falcon": ("hidden_dropout", "attention_dropout"),
    "bloom": ("hidden_dropout", "attention_dropout"),
    "starcoder2": ("residual_dropout", "embedding_dropout", "attention_dropout"),
    "seed_oss": ("residual_dropout", "attention_dropout"),
    "phi": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
    "mixtral": ("router_jitter_noise", "attention_dropout"),
}
"""`model_type` -> every rate by which a model of it is random while it trains."""


def is_random(config: PreTrainedConfig) -> bool:
    """True if a model of the configuration computes something else each time while it trains."""
    set_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).train()
    ids = torch.arange(3, 43)[None] % VOCABULARY
    first, second = (model(input_ids=ids).logits for _ in range(2))
    return not torch.equal(first, second)


@pytest.mark.parametrize(("model_type", "fields"), ON.items(), ids=ON)
def test_a_model_that_trains_computes_the_same_each_time(model_type: str, fields: tuple[str, ...]) -> None:
    config = tiny_config(model_type, **dict.fromkeys(fields, RATE))
    assert is_random(config), "as transformers makes it"
    assert dropout_rates(config) == dict.fromkeys(fields, RATE)
    assert not is_random(switch_off_dropout(config))
    assert dropout_rates(config) == {}


def test_rates_in_a_section_are_found_by_its_name() -> None:
    attention = {"attn_pdrop": RATE, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    config = tiny_config("dbrx", attn_config=attention)
    assert "attn_config.attn_pdrop = 0.4" in str(describe_dropout(dropout_rates(config)))
    assert is_random(config)
    assert not is_random(switch_off_dropout(config))


@pytest.mark.parametrize("model_type", [*ON, "phimoe", "minimax"])
def test_switching_off_changes_no_answer(model_type: str) -> None:
    """Phi-MoE has a rate that its router computes with, whether it trains or not."""
    found = []
    for switch in (deepcopy, switch_off_dropout):
        rates = dict.fromkeys(ON.get(model_type, ("router_jitter_noise", "attention_dropout")), RATE)
        set_seed(0)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(switch(tiny_config(model_type, **rates)), dtype=torch.float32).eval()
        found.append(model(input_ids=torch.arange(3, 43)[None]).logits)
    assert torch.equal(*found)


def test_rates_of_heads_that_are_not_there_and_other_numbers_are_left_alone() -> None:
    config = tiny_config("gpt2", summary_first_dropout=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    assert describe_dropout(dropout_rates(config)) is None
    assert switch_off_dropout(config).summary_first_dropout == 0.3


@pytest.fixture(scope="module")
def seed_oss(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A small Seed-OSS with the rates that it is published with."""
    folder = make_mixture(tmp_path_factory.mktemp("seed-oss"), "seed_oss", texts)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.1, "residual_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_seed_oss_is_fused_as_published(seed_oss: Path) -> None:
    assert why_not_described(read_language_model_config(seed_oss)) is None
    published = read_published_config(seed_oss)
    assert "dropout in the base model" in str(why_not_described(published)), "the kernels know none"


@pytest.mark.parametrize("quantization", list(Quantization))
def test_a_loaded_base_is_the_same_in_training_and_says_what_is_switched_off(
    seed_oss: Path, quantization: Quantization, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spec = ModelSpec.model_validate(
        {"source": f"file://{seed_oss}", "maxSequenceLength": 128, "quantization": quantization}
    )
    model = load_model(seed_oss, spec, Precision.FP32, gpus=0).model
    assert (model.config.attention_dropout, model.config.residual_dropout) == (0.0, 0.0)
    assert "dropout or noise of its own (attention_dropout = 0.1, residual_dropout = 0.1)" in caplog.text

    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
