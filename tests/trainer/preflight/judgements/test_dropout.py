"""Dropout of the base model itself: said as a warning, with the figures and what to write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.run_config import RunConfig
from finetune_trainer.job.settings import Settings
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.preflight.judgements.dropout import judge_dropout

SAID = "the base model's configuration has dropout or noise of its own (attention_dropout = 0.1), which is switched off"


@pytest.mark.parametrize(
    ("adapters", "way_on"),
    [
        (0.0, "its weights do not train; to have the adapters drop a part of their inputs, write spec.adapter.dropout"),
        (0.05, "its weights do not train; the adapters keep the 0.05 of spec.adapter.dropout"),
    ],
)
def test_the_warning_names_the_rate_and_the_way_on(adapters: float, way_on: str) -> None:
    (warning,) = judge_dropout({"attention_dropout": 0.1}, adapters)
    assert (warning.location, warning.message) == ("spec.model.source", f"{SAID}: {way_on}")


def test_a_model_without_it_is_told_nothing() -> None:
    assert list(judge_dropout({}, 0.1)) == []


def test_preflight_says_it_of_a_published_model(
    tiny_base: Path, tmp_path: Path, run_config: Callable[..., RunConfig], settings: Settings
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    report, _ = run_preflight(run_config(model={"source": f"file://{folder}"}), settings)
    assert [finding.message for finding in report.findings if SAID in finding.message]
    assert not [finding for finding in report.findings if "not fused" in finding.message]
