"""Model types that cannot be trained are refused by name, without a traceback, before a GPU is taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.settings import Settings
from finetune_trainer.model.architectures import ENCODER, PART, why_untrainable
from finetune_trainer.model.description import check_architecture
from finetune_trainer.preflight.checks import run_preflight

REFUSED = {
    "a type newer than transformers": ({"model_type": "qwen9"}, "does not know the model type qwen9"),
    "an unknown type with a class of its own": (
        {"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"]},
        "does not know the model type qwen9",
    ),
    "Bert": ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, ENCODER),
    "Roberta": ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"]}, ENCODER),
    "Whisper": ({"model_type": "whisper", "architectures": ["WhisperForCausalLM"]}, PART),
    "Bart": ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, PART),
    "T5": ({"model_type": "t5", "architectures": ["T5ForCausalLM"]}, PART),
    "a vision model": ({"model_type": "vit", "architectures": ["LlamaForCausalLM"]}, "no causal language model"),
}


def model_with(base: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of `base` with changes to its config.json."""
    shutil.copytree(base, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(("changes", "part"), REFUSED.values(), ids=REFUSED)
def test_preflight_names_the_type_in_one_line(
    run_config: Callable[..., RunConfig],
    settings: Settings,
    tiny_base: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    part: str,
) -> None:
    folder = model_with(tiny_base, tmp_path / "model", changes)
    report, _ = run_preflight(run_config(model={"source": f"file://{folder}"}), settings)
    (error,) = report.errors()
    assert (error.location, error.reason) == ("spec.model.source", FailureReason.UNSUPPORTED_ARCHITECTURE)
    assert changes["model_type"] in error.message
    assert part in error.message
    assert "\n" not in error.message


BROKEN: dict[str, dict[str, Any]] = {
    "a field of another type": {"hidden_size": "many"},
    "no model type": {"model_type": None},
    "heads that do not fit": {"num_attention_heads": 7},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_a_configuration_that_its_own_class_refuses_is_an_invalid_one(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = model_with(tiny_base, tmp_path / "model", changes)
    with pytest.raises(TrainerError, match=r"config\.json") as failure:
        check_architecture(folder)
    assert failure.value.reason is FailureReason.INVALID_CONFIGURATION


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt_oss", "mamba2", "falcon_h1", "gpt2"])
def test_decoders_are_not_refused(model_type: str) -> None:
    assert why_untrainable(model_type) is None


@pytest.mark.parametrize(
    ("model_type", "nature"),
    [("xlnet", "in any order"), ("trocr", PART), ("musicgen", PART), ("gemma4_assistant", "draft model")],
)
def test_models_that_only_look_like_decoders_are_refused(model_type: str, nature: str) -> None:
    assert nature in str(why_untrainable(model_type))
