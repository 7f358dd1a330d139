"""What preflight says of models whose documents cannot be packed, and when it says nothing."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_trainer.preflight.judgements.batching import judge_batching

Builder = Callable[..., RunConfig]
LENGTHS = [10, 20] * 20


def judge(config: RunConfig, model_type: str | None = "gpt_oss", lengths: list[int] = LENGTHS) -> list[Any]:
    return list(judge_batching(model_type, lengths, config))


def test_the_cost_is_told_before_a_gpu_is_taken(run_config: Builder) -> None:
    (warning,) = judge(run_config(training={"batchSize": 4, "gradientAccumulation": 2}))
    assert warning.location == "spec.dataset.packing"
    assert "gpt_oss" in warning.message
    assert "a step has 8 rows, about 120 tokens" in warning.message
    assert "padded to the longest of 4: about 0.0%" not in warning.message

    (even,) = judge(run_config(training={"batchSize": 4, "gradientAccumulation": 2}), lengths=[20] * 40)
    assert "padded to the longest of 4: about 0.0% of the tokens computed are padding" in even.message


SILENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a model that packs": ({"model_type": "llama"}, {}),
    "no model": ({"model_type": None}, {}),
    "no row": ({"lengths": []}, {}),
    "one row a pass, as the job asks": ({}, {"dataset": {"packing": False}, "training": {"batchSize": 1}}),
}


@pytest.mark.parametrize(("asked", "sections"), SILENT.values(), ids=SILENT)
def test_nothing_is_said_where_nothing_is_lost(
    run_config: Builder, asked: dict[str, Any], sections: dict[str, Any]
) -> None:
    assert judge(run_config(**sections), **asked) == []
