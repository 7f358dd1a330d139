"""What preflight says of models whose documents cannot be packed, and when it says nothing."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.run_config import RunConfig
from finetune_trainer.preflight.judgements.batching import judge_batching, pads_rows

Builder = Callable[..., RunConfig]
LENGTHS = [10, 20] * 20


def judge(config: RunConfig, model_type: str | None = "gpt_oss", lengths: list[int] = LENGTHS) -> list[Any]:
    model = None if model_type is None else SimpleNamespace(model_type=model_type)
    return list(judge_batching(model, lengths, config))


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


def test_on_a_gpu_the_kernels_attention_keeps_documents_apart_beside_sinks(run_config: Builder) -> None:
    sinks, without = SimpleNamespace(model_type="gpt_oss"), SimpleNamespace(model_type="bloom")
    on_gpu = run_config().model_copy(update={"gpus": 1})
    assert [pads_rows(on_gpu, model) for model in (sinks, without)] == [False, True]
    assert [pads_rows(run_config(), model) for model in (sinks, without)] == [True, True]
