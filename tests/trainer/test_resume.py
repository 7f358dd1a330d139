"""A run that is stopped and resumed is the same run: every later loss is equal, to the last bit, on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_test_models.stopped_runs import run_and_stop
from finetune_trainer.job.settings import Settings

Builder = Callable[..., RunConfig]
STEPS, STOP_AFTER = 8, 4


def with_attempt(settings: Settings, tmp_path: Path, name: str) -> Settings:
    return Settings(work=tmp_path / name, attempt_id=name, output_folder=settings.output_folder)


def final_adapter(outcome: Outcome) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(outcome.artifacts[0].uri) / "adapter_model.safetensors")


@pytest.mark.parametrize(("scheduler", "warmup"), [("Linear", None), ("Cosine", 6), ("Constant", 2)])
def test_a_stopped_run_goes_on_exactly_where_it_was(
    run_config: Builder, tmp_path: Path, scheduler: str, warmup: int | None
) -> None:
    rates = {"scheduler": scheduler, "warmupSteps": warmup}
    config = run_config(training=rates | {"maxSteps": STEPS, "checkpointSteps": 3}, adapter={"dropout": 0.1})
    straight = Settings(work=tmp_path / "straight", attempt_id="a", output_folder=tmp_path / "straight-out")
    expected, whole = run_and_stop(config, straight)
    assert whole.result is Result.SUCCEEDED, whole.message

    settings = Settings(work=tmp_path / "first", attempt_id="a", output_folder=tmp_path / "out")
    before, stopped = run_and_stop(config, settings, stop_after=STOP_AFTER)
    assert (stopped.result, stopped.exit_code, stopped.checkpoint_step) == (Result.INTERRUPTED, 30, STOP_AFTER)
    after, resumed = run_and_stop(config, with_attempt(settings, tmp_path, "second"))
    assert resumed.result is Result.SUCCEEDED, resumed.message
    assert resumed.resumed_from_step == STOP_AFTER
    assert before | after == expected
    for name, value in final_adapter(whole).items():
        assert torch.equal(value, final_adapter(resumed)[name]), name


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "AdamW"])
def test_a_run_in_bfloat16_goes_on_from_its_master_weights(run_config: Builder, tmp_path: Path, optimizer: str) -> None:
    rates = {"optimizer": optimizer, "precision": "BF16", "learningRate": 1e-4}
    config = run_config(training=rates | {"maxSteps": STEPS, "checkpointSteps": 3})
    straight = Settings(work=tmp_path / "straight", attempt_id="a", output_folder=tmp_path / "straight-out")
    expected, whole = run_and_stop(config, straight)
    settings = Settings(work=tmp_path / "first", attempt_id="a", output_folder=tmp_path / "out")
    before, _ = run_and_stop(config, settings, stop_after=STOP_AFTER)
    after, resumed = run_and_stop(config, with_attempt(settings, tmp_path, "second"))

    assert resumed.resumed_from_step == STOP_AFTER
    assert before | after == expected
    adapter = final_adapter(whole)
    for name, value in adapter.items():
        assert torch.equal(value, final_adapter(resumed)[name]), name
    finer = [(value != value.bfloat16().float()).float().mean().item() for value in adapter.values()]
    assert min(finer) > 0.9, "what is published holds more than bfloat16 does"


def test_an_attempt_on_the_same_disk_goes_on_although_the_first_left_its_files(
    run_config: Builder, tmp_path: Path
) -> None:
    config = run_config(training={"maxSteps": STEPS, "checkpointSteps": 3})
    settings = Settings(work=tmp_path / "work", attempt_id="a", output_folder=tmp_path / "out")
    run_and_stop(config, settings, stop_after=STOP_AFTER)
    assert (tmp_path / f"work/checkpoints/checkpoint-{STOP_AFTER}").is_dir()
    again = Settings(work=settings.work, attempt_id="b", output_folder=settings.output_folder)
    _, resumed = run_and_stop(config, again)
    assert (resumed.result, resumed.resumed_from_step) == (Result.SUCCEEDED, STOP_AFTER), resumed.message


def test_without_the_optimiser_state_the_losses_differ(run_config: Builder, tmp_path: Path) -> None:
    config = run_config(training={"maxSteps": STEPS, "checkpointSteps": 3})
    settings = Settings(work=tmp_path / "first", attempt_id="a", output_folder=tmp_path / "out")
    run_and_stop(config, settings, stop_after=STOP_AFTER)
    (index,) = (tmp_path / "out").rglob(f"step-{STOP_AFTER:08d}/checkpoint.json")
    forget_optimiser(index)
    after, resumed = run_and_stop(config, with_attempt(settings, tmp_path, "second"))
    straight = Settings(work=tmp_path / "straight", attempt_id="a", output_folder=tmp_path / "straight-out")
    expected, _ = run_and_stop(config, straight)
    assert resumed.resumed_from_step == STOP_AFTER
    assert any(after[step] != expected[step] for step in range(STOP_AFTER + 2, STEPS + 1))


def forget_optimiser(index: Path) -> None:
    """Rewrite a checkpoint's index as if the optimiser had never been saved."""
    document: dict[str, Any] = json.loads(index.read_text())
    document["files"] = [file for file in document["files"] if not file["path"].endswith("optimizer.pt")]
    index.write_text(json.dumps(document))


def test_an_evaluation_changes_nothing_about_training(run_config: Builder, tmp_path: Path) -> None:
    """bitsandbytes repacks weights in the first evaluation on some CPUs; training on would have wrong gradients."""
    held_out = {"evaluation": {"fraction": 0.2}}
    quiet = run_config(training={"maxSteps": 6}, dataset=held_out)
    evaluating = run_config(training={"maxSteps": 6, "evaluationSteps": 2}, dataset=held_out)
    losses = []
    for name, config in (("quiet", quiet), ("evaluating", evaluating)):
        found, outcome = run_and_stop(config, Settings(tmp_path / name, "a", output_folder=tmp_path / f"{name}-out"))
        assert outcome.eval_loss is not None
        losses.append(found)
    assert losses[0] == losses[1]


def metrics(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("attempts/*/metrics/metrics.jsonl")
    assert len(list(path.parent.glob("tensorboard/events.out.tfevents.*.tiny"))) == 1
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_logged_step_is_there_once_also_after_a_resumption(
    run_config: Builder, settings: Settings, tmp_path: Path
) -> None:
    held_out = {"evaluation": {"fraction": 0.2}}
    config = run_config(training={"maxSteps": 6, "checkpointSteps": 2, "evaluationSteps": 3}, dataset=held_out)
    straight = Settings(work=tmp_path / "straight", attempt_id="a", output_folder=tmp_path / "straight-out")
    _, whole = run_and_stop(config, straight)
    assert "Metrics" in [artifact.type for artifact in whole.artifacts]

    _, stopped = run_and_stop(config, settings, stop_after=STOP_AFTER)
    assert stopped.result is Result.INTERRUPTED
    _, resumed = run_and_stop(config, with_attempt(settings, tmp_path, "second"))
    assert resumed.resumed_from_step == STOP_AFTER

    expected, found = metrics(tmp_path / "straight-out"), metrics(tmp_path / "out")
    assert [line["step"] for line in found if "loss" in line] == [*range(1, 7)]
    assert [line["step"] for line in found if "evalLoss" in line] == [3, 6]
    for line in expected + found:
        for measured in ("time", "tokensPerSecond"):
            line.pop(measured, None)
    assert found == expected
    assert {"loss", "learningRate", "gradNorm", "epoch"} <= set(found[0])
