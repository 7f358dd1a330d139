"""Every row of GGUF_FAMILIES is complete: a list of what a row lacks, by the family's tiny models and by transformers.

Whoever adds a family finds here what is missing: a tiny model, a name of a tensor, a field of the row.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_test_models.family_models import FAMILY_MODELS
from finetune_test_models.tiny_families.settings import TINY_FAMILIES
from finetune_test_models.tiny_tokenizers import KINDS, ByteLevelKind
from finetune_trainer.export.base_model.folder import BaseModel, open_base_model
from finetune_trainer.export.errors import ExportError
from finetune_trainer.export.gguf.config_checks import check_sizes
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES, find_family, is_read_back
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.pre_tokenizers import NAMES
from finetune_trainer.export.gguf.tensors import TensorConverter
from finetune_trainer.export.gguf.tokenizer import read_tokenizer

FamilyBase = Callable[[str], Path]
ADDED_TO_ONE = ("nemotron",)
"""Types whose norms multiply by 1 + weight although transformers begins them with ones."""
SCALING_TENSORS = {MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ROPE_FACTORS_LONG}


def models_of(model_type: str) -> list[str]:
    """Keys of FAMILY_MODELS with this model type."""
    return [name for name, model in FAMILY_MODELS.items() if TINY_FAMILIES[model.family][0] == model_type]


def lacking_in_row(family: GgufFamily, base: BaseModel) -> list[str]:
    """Fields of a row that do not agree with transformers' model of the family, or with the architecture's tensors."""
    config = base.full_config
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    parts = {name.split(".")[-2] for name, _ in base.shapes}
    architecture = set(MODEL_TENSORS[family.architecture])

    expected: dict[str, object] = {
        # Norms that transformers begins with zeros multiply by 1 + weight.
        "norm_offset": float(config["model_type"] in ADDED_TO_ONE) or 1.0 - first_norm(model, family).mean().item(),
        "activation": config.get("hidden_activation") or config.get("hidden_act", "silu"),
        "fixed_scale_layers": "query_pre_attn_scalar" in config,
        "windows": "sliding_attention" in (config.get("layer_types") or []),
    }
    found: dict[str, object] = {
        "norm_offset": family.norm_offset,
        "activation": family.activation,
        "fixed_scale_layers": family.fixed_scale_layers is not None,
        "windows": family.window_pattern or family.window_period is not None,
    }
    wrong = [name for name in expected if found[name] != expected[name]]
    if family.windowed_layers is not None and not expected["windows"]:
        wrong.remove("windows")  # models of other sizes have none

    if family.permuted_heads and not {"q_proj", "k_proj"} <= parts:
        wrong.append("permuted_heads")
    if family.rope_tensors and not architecture & SCALING_TENSORS:
        wrong.append("rope_tensors")
    if family.sliding_window and "sliding_window" not in config:
        wrong.append("sliding_window")
    return wrong


def first_norm(model: Any, family: GgufFamily) -> Any:
    """The weight of a norm of hidden states; 1 for a model whose norms have none (OLMo)."""
    norms = ((name, weight) for name, weight in model.named_parameters() if "norm" in name and name.endswith("weight"))
    return next((weight for name, weight in norms if not name.endswith(family.plain_norms)), torch.ones(1))


def lacking(model_type: str, family_base: FamilyBase) -> list[str]:
    """Everything that the family's row or its tiny models lack."""
    names = models_of(model_type)
    if not names:
        return [f"FAMILY_MODELS has no tiny model of type {model_type}"]

    found = []
    for name in names:
        base = open_base_model(family_base(name))
        config = base.full_config
        try:
            family = find_family(config)
            check_sizes(config, base.shapes)
            converter = TensorConverter(family, config)
            assert [converter.parts(tensor, shape) for tensor, shape in base.shapes]
            read_tokenizer(base.tokenizer, config, base.generation_config)
        except (ExportError, KeyError) as error:
            found.append(f"{name}: {error}")
            continue
        found += [f"{name}: {field}" for field in lacking_in_row(family, base)]
    return found


@pytest.mark.parametrize("model_type", GGUF_FAMILIES)  # some 0.2 s each
def test_a_family_lacks_nothing(model_type: str, family_base: FamilyBase) -> None:
    assert lacking(model_type, family_base) == []


def test_every_family_with_a_tiny_model_has_a_row() -> None:
    assert {model_type for model_type, _ in TINY_FAMILIES.values()} == GGUF_FAMILIES.keys()


def test_every_pre_tokenizer_is_that_of_a_tiny_model() -> None:
    used = {KINDS[model.tokenizer] for model in FAMILY_MODELS.values()}
    assert {kind.name for kind in used if isinstance(kind, ByteLevelKind)} == {*NAMES.values(), "dbrx"}


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms around one": ("gemma2", {"norm_offset": 0.0}, "gemma-2: norm_offset"),
    "no scale": ("gemma3_text", {"fixed_scale_layers": None}, "gemma-3: fixed_scale_layers"),
    "no windows": ("gemma3_text", {"window_period": None}, "gemma-3: windows"),
    "windows of a model without any": ("qwen2", {"window_period": 2}, "layer_types"),
    "another activation": ("gemma2", {"activation": "silu"}, "gemma-2: llama.cpp computes silu"),
    "heads of a fused projection": ("phi3", {"permuted_heads": True}, "phi-4: permuted_heads"),
    "divisors that have no tensor": ("gemma2", {"rope_tensors": True}, "gemma-2: rope_tensors"),
    "another architecture": ("phi3", {"architecture": MODEL_ARCH.LLAMA}, "phi-4: tensor"),
}


@pytest.mark.parametrize(("model_type", "change", "part"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named(
    model_type: str, change: dict[str, Any], part: str, family_base: FamilyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GGUF_FAMILIES, model_type, dataclasses.replace(GGUF_FAMILIES[model_type], **change))
    assert any(part in line for line in lacking(model_type, family_base)), lacking(model_type, family_base)


def test_a_family_without_a_tiny_model_is_named(family_base: FamilyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GGUF_FAMILIES, "nosuch", GgufFamily(MODEL_ARCH.LLAMA))
    assert lacking("nosuch", family_base) == ["FAMILY_MODELS has no tiny model of type nosuch"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "granite"}, True),
        ({"model_type": "qwen3_moe", "num_experts": 4}, True),
        ({"model_type": "gpt_oss", "num_local_experts": 4}, True),
        ({"model_type": "apertus"}, False),
        ({"model_type": "mamba"}, False),
    ],
)
def test_files_that_hold_all_of_the_models_tensors_are_judged(config: dict[str, Any], expected: bool) -> None:
    assert is_read_back(config) is expected
