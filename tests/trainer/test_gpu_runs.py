"""Whole runs on a GPU with our engine: samples, the chosen micro-batch and the memory plan handed back."""

import json
from pathlib import Path

import pytest

from finetune_api.vocabulary import MemoryMode
from finetune_test_models import gpu_runs, tiny_runs

pytestmark = pytest.mark.gpu
texts, tiny_base, chat_file = tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file
run_config, trained, run = tiny_runs.run_config, gpu_runs.trained, gpu_runs.run
Builder = tiny_runs.Builder
STEPS = 12
NOISE = 1e-3  # relative; backward passes of attention add up in no fixed order


def differences(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return gpu_runs.largest_difference(one, other)


@pytest.mark.parametrize("memory", ["Fastest", "Smallest"])
def test_samples_change_nothing_and_show_what_was_learned(
    run_config: Builder, tmp_path: Path, trained: list[list[float]], memory: str
) -> None:
    data = {"evaluation": {"fraction": 0.2}}
    common = {"maxSteps": STEPS, "evaluationSteps": 3, "learningRate": 1e-2}
    common |= {"memory": memory}
    for name, samples in (("quiet", None), ("again", None), ("sampled", {"maxTokens": 16})):
        outcome, _ = run(run_config(training=common | {"samples": samples}, dataset=data), tmp_path / name)
    quiet, again, sampled = trained
    noise = differences(quiet, again)
    assert differences(quiet, sampled) <= (NOISE if noise else 0.0)
    folder = next(Path(artifact.uri) for artifact in outcome.artifacts if artifact.type == "Samples")
    lines = [json.loads(line) for line in folder.read_bytes().decode().split("\n") if line]
    assert [line["step"] for line in lines] == [step for step in (0, 3, 6, 9, 12) for _ in range(4)]
    assert {line["answer"] for line in lines if line["step"] == 0} != {
        line["answer"] for line in lines if line["step"] == STEPS
    }


def test_a_batch_left_out_is_chosen_by_the_plan_and_gives_the_same_losses(
    run_config: Builder, tmp_path: Path, trained: list[list[float]]
) -> None:
    common = {"maxSteps": STEPS, "optimizer": "AdamW"}
    written, _ = run(run_config(training=common | {"batchSize": 1, "gradientAccumulation": 8}), tmp_path / "written")
    chosen, told = run(run_config(training=common | {"batchSize": None, "gradientAccumulation": 4}), tmp_path / "auto")
    assert told.resolved is not None
    assert (told.resolved.batch_size, told.resolved.gradient_accumulation) == (8, 1), "a tiny model fits whole"
    assert differences(*trained) < 5e-3  # bf16 products of other shapes
    for outcome, micro_batch in ((written, 1), (chosen, 8)):
        memory = outcome.memory
        assert memory is not None
        assert (memory.mode, memory.micro_batch, memory.fallbacks) == (MemoryMode.FASTEST, micro_batch, ())
        assert memory.measured_peak_bytes is not None
        assert memory.measured_peak_bytes > 0
