"""The table of model families is that of the installed transformers: every type has a row, and a sample is asked again.

`make architectures` writes all rows anew.
"""

from dataclasses import replace

import pytest
from gguf import MODEL_ARCH_NAMES

from finetune_api.vocabulary import Batching
from finetune_test_models.sweeps.architecture_sweep import types
from finetune_test_models.sweeps.family_table import differences, find_family
from finetune_trainer.export.gguf.families.table import GGUF_FAMILIES
from finetune_trainer.model import architectures
from finetune_trainer.model.architectures import FIRST_STEP, why_untrainable
from finetune_trainer.model.family_table import LANGUAGE_MODEL, ModelFamily, model_families

SAMPLE = ("bert", "qwen3", "mixtral", "lfm2")
STALE = "out of date: run `make architectures MODEL_TYPES=...`"


def test_every_type_of_transformers_has_a_row() -> None:
    assert set(model_families()) == set(types()), STALE


def test_the_rows_become_the_gguf_files_that_the_export_writes() -> None:
    written = {name: MODEL_ARCH_NAMES[family.architecture] for name, family in GGUF_FAMILIES.items()}
    assert {name: family.gguf for name, family in model_families().items() if family.gguf} == written, STALE


@pytest.mark.filterwarnings("ignore")  # families warn of kernels that are not installed
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_row_is_what_a_tiny_model_shows(model_type: str) -> None:
    assert differences(model_families()[model_type], find_family(model_type)) == [], STALE


CHANGES: dict[str, ModelFamily] = {
    "batching": replace(model_families()["qwen3"], batching=Batching.PADDED),
    "adapted": replace(model_families()["qwen3"], adapted=0.5),
    "gguf": replace(model_families()["qwen3"], gguf=None),
    "not_fused": replace(model_families()["qwen3"], not_fused="the kernels do not know it"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_row_that_is_out_of_date_is_named(field: str) -> None:
    (found,) = differences(CHANGES[field], model_families()["qwen3"])
    assert found.startswith(f"{field}: ")


def test_a_type_whose_first_step_fails_is_refused_with_the_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ModelFamily("Qwen3ForCausalLM", refused=f"{FIRST_STEP} (RuntimeError: shapes differ)")
    monkeypatch.setattr(architectures, "model_families", lambda: {"qwen3": failed})
    reason = str(why_untrainable("qwen3"))
    assert "RuntimeError: shapes differ" in reason
    assert "take a model of another type" in reason


def test_no_other_row_refuses_a_decoder() -> None:
    refused = {name: family.refused for name, family in model_families().items() if family.refused}
    for name, why in refused.items():
        wraps = why.startswith(LANGUAGE_MODEL)
        assert wraps == (why_untrainable(name) is None), name
