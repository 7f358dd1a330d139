"""Runs that diverge or learn nothing end with a reason, publish nothing, and keep their last good checkpoint."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_kernels.primitives.master_weights import master_weight
from finetune_test_models import tiny_runs
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.storage.digests import sha256_file
from finetune_trainer.training.divergence import step_watch
from finetune_trainer.training.divergence.loss_scale import FIRST_SCALE, LossScale
from finetune_trainer.training.engine import Engine

texts, tiny_base, chat_file = tiny_runs.texts, tiny_runs.tiny_base, tiny_runs.chat_file
run_config, settings = tiny_runs.run_config, tiny_runs.settings
Builder = tiny_runs.Builder
CPU_AND_GPU = pytest.mark.parametrize("gpus", [0, pytest.param(1, marks=pytest.mark.gpu)])
SILENT = {"loggingSteps": 1000, "batchSize": 1, "gradientAccumulation": 1}
"""Nothing is logged before the run ends, and each step has one pass."""


def run(config: RunConfig, settings: Settings, gpus: int = 0, attempt: str = "a") -> Outcome:
    config = config.model_copy(update={"gpus": gpus})
    own = Settings(work=settings.work / attempt, attempt_id=attempt, output_folder=settings.output_folder)
    return run_job(config, own, ProgressTracker(), StopSignal())


def results(settings: Settings) -> Path:
    assert settings.output_folder is not None
    return settings.output_folder / "tiny"


def stored_steps(settings: Settings) -> list[int]:
    return sorted(json.loads(path.read_text())["step"] for path in results(settings).rglob("checkpoint.json"))


@pytest.fixture
def change_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what the engine's loss returns, pass by pass."""

    def change(factor: Callable[[int], float], patch: pytest.MonkeyPatch = monkeypatch) -> None:
        original = pipeline.prepare_engine

        def prepare(*arguments: Any) -> Engine:
            engine, passes = original(*arguments), 0
            loss = engine.loss

            def changed(*inputs: Any) -> torch.Tensor:
                nonlocal passes
                passes += 1
                return loss(*inputs) * factor(passes)

            engine.loss = changed
            return engine

        patch.setattr(pipeline, "prepare_engine", prepare)

    return change


@CPU_AND_GPU
@pytest.mark.parametrize("broken", [3, 6], ids=["in the middle", "in the last step"])
def test_a_step_that_is_no_number_is_seen_though_nothing_is_logged(
    run_config: Builder, settings: Settings, change_loss: Callable[..., None], broken: int, gpus: int
) -> None:
    change_loss(lambda step: math.nan if step == broken else 1.0)
    config = run_config(training=SILENT | {"maxSteps": 6, "checkpointSteps": 1})
    outcome = run(config, settings, gpus)
    assert (outcome.reason, outcome.exit_code) == ("NonFiniteLoss", 32)
    assert f"at step {broken}" in outcome.message
    assert not (results(settings) / "manifest.json").exists()
    assert stored_steps(settings)[-1] == broken - 1
    for path in results(settings).rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


def test_a_loss_that_explodes_ends_the_run_and_the_next_one_goes_on_from_before(
    run_config: Builder, settings: Settings, change_loss: Callable[..., None]
) -> None:
    """The checkpoint of step 30 holds the update that the loss exploded from, as far as anybody can tell."""
    config = run_config(training=SILENT | {"maxSteps": 60, "checkpointSteps": 10})
    with pytest.MonkeyPatch.context() as patch:
        change_loss(lambda step: 50.0 if step > 30 else 1.0, patch)
        outcome = run(config, settings)
    assert (outcome.reason, outcome.exit_code, outcome.step) == ("LossDiverged", 32, 49)
    assert "far above the run's own best since step 31" in outcome.message
    assert stored_steps(settings) == [20]
    assert outcome.checkpoint_step == 20
    assert not (results(settings) / "manifest.json").exists()

    again = run(config, settings, attempt="b")
    assert (again.result, again.resumed_from_step) == (Result.SUCCEEDED, 20), again.message


@pytest.mark.parametrize(("first", "reason"), [(36, "LossDiverged"), (38, None)])
def test_a_run_that_ends_with_an_exploded_loss_publishes_nothing(
    run_config: Builder, settings: Settings, change_loss: Callable[..., None], first: int, reason: str | None
) -> None:
    change_loss(lambda step: 50.0 if step >= first else 1.0)
    outcome = run(run_config(training=SILENT | {"maxSteps": 40, "checkpointSteps": 1000}), settings)
    assert outcome.reason == reason, outcome.message
    assert (results(settings) / "manifest.json").exists() == (reason is None)


def test_a_run_that_diverges_by_itself_is_seen_though_nothing_is_logged(
    run_config: Builder, settings: Settings
) -> None:
    training = {"learningRate": 1.0, "maxSteps": 40, "warmupSteps": 0, "maxGradNorm": 1000, "scheduler": "Constant"}
    outcome = run(run_config(training=SILENT | training, adapter={"alpha": 4096}), settings)
    assert outcome.reason == "NonFiniteLoss"
    assert not (results(settings) / "manifest.json").exists()


def test_weights_broken_by_the_last_update_are_not_published(
    run_config: Builder, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient are computed before the update, so they tell nothing about it."""
    original = pipeline.train

    def train(context: Any, prepared: Any, *others: Any) -> Any:
        matrix = next(value for name, value in prepared.model.named_parameters() if "lora_B" in name)

        def overflow(parameter: torch.Tensor) -> None:
            master_weight(parameter).data.fill_(math.inf)

        matrix.register_post_accumulate_grad_hook(overflow)
        return original(context, prepared, *others)

    monkeypatch.setattr(pipeline, "train", train)
    outcome = run(run_config(training=SILENT | {"maxSteps": 1}), settings)
    assert outcome.reason == "NonFiniteLoss"
    assert "lora_B" in outcome.message
    assert stored_steps(settings) == []


def poison(settings: Settings, step: int) -> None:
    """Puts NaN into a stored checkpoint as an earlier version could have stored it: its digests are right."""
    (index,) = results(settings).rglob(f"step-{step:08d}/checkpoint.json")
    document = json.loads(index.read_text())
    file = next(file for file in document["files"] if file["path"].endswith("adapter_model.safetensors"))
    path = index.parent / file["path"]
    save_file({name: value * math.nan for name, value in load_file(path).items()}, path)
    file["sha256"], file["bytes"] = sha256_file(path), path.stat().st_size
    index.write_text(json.dumps(document))


def test_a_stored_checkpoint_without_numbers_is_passed_over(
    run_config: Builder, settings: Settings, change_loss: Callable[..., None]
) -> None:
    change_loss(lambda step: math.nan if step == 5 else 1.0)
    config = run_config(training=SILENT | {"maxSteps": 6, "checkpointSteps": 2})
    assert run(config, settings).reason == "NonFiniteLoss"
    assert stored_steps(settings) == [2, 4]
    poison(settings, 4)
    again = run(config, settings, attempt="b")  # its fifth pass would be step 7
    assert again.result is Result.SUCCEEDED, again.message
    assert again.resumed_from_step == 2


@CPU_AND_GPU
@pytest.mark.parametrize("variant", ["LoRA", "DoRA"])
def test_one_step_with_all_defaults_learns(run_config: Builder, settings: Settings, variant: str, gpus: int) -> None:
    """40 short rows are packed into few sequences, and a step takes eight."""
    training = {"maxSteps": None, "batchSize": None, "gradientAccumulation": 4, "learningRate": 2e-4}
    model = {"maxSequenceLength": 2048}
    outcome = run(run_config(training=training, model=model, adapter={"variant": variant}), settings, gpus)
    assert (outcome.result, outcome.total_steps) == (Result.SUCCEEDED, 1), outcome.message
    weights = load_file(Path(outcome.artifacts[0].uri) / "adapter_model.safetensors")
    learned = [value.abs().max().item() for name, value in weights.items() if "lora_B" in name]
    assert min(learned) == pytest.approx(2e-4, rel=0.1), "Adam's first step is the learning rate"


@CPU_AND_GPU
@pytest.mark.parametrize("variant", ["LoRA", "DoRA"])
def test_an_adapter_that_did_not_change_is_a_failure(
    run_config: Builder, settings: Settings, variant: str, gpus: int
) -> None:
    """The rate is too small for any type of the adapter."""
    outcome = run(run_config(training={"learningRate": 1e-60}, adapter={"variant": variant}), settings, gpus)
    assert (outcome.result, outcome.reason, outcome.exit_code) == (Result.FAILED, "NothingLearned", 14)
    assert "every B matrix of the adapter is zero after 3 steps" in outcome.message
    assert not (results(settings) / "manifest.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "AdamW"])
def test_overflows_of_scaled_gradients_do_not_end_a_run_in_fp16(
    run_config: Builder, settings: Settings, optimizer: str
) -> None:
    training = {"precision": "FP16", "maxSteps": 20, "optimizer": optimizer}
    outcome = run(run_config(training=training), settings, 1)
    assert outcome.result is Result.SUCCEEDED, outcome.message


def test_a_step_that_overflows_is_left_out_and_checkpoints_keep_the_scale(
    run_config: Builder, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale of a run in fp16, on a CPU; the third pass overflows, and the fifth ends the run."""
    original, engines = pipeline.prepare_engine, list[Engine]()

    def prepare(*arguments: Any) -> Engine:
        engine, passes = original(*arguments), 0
        loss, is_first = engine.loss, not engines
        engine.loss_scale = LossScale()
        engines.append(engine)

        def planted(*inputs: Any) -> torch.Tensor:
            nonlocal passes
            passes += 1
            found = loss(*inputs)
            if passes == 3 and is_first:
                found.register_hook(lambda gradient: gradient * math.inf)
            return found * math.nan if passes == 5 and is_first else found

        engine.loss = planted
        return engine

    monkeypatch.setattr(pipeline, "prepare_engine", prepare)
    config = run_config(training=SILENT | {"maxSteps": 6, "checkpointSteps": 2})
    outcome = run(config, settings)
    assert (outcome.reason, stored_steps(settings)) == ("NonFiniteLoss", [2, 4]), outcome.message
    assert "FP16, which ends at 65,504" in outcome.message
    scales = [torch.load(path)["scale"] for path in sorted(results(settings).rglob("scaler.pt"))]
    assert scales == [FIRST_SCALE, FIRST_SCALE / 2]

    again = run(config, settings, attempt="b")
    assert (again.result, again.resumed_from_step) == (Result.SUCCEEDED, 4), again.message
    assert engines[-1].loss_scale is not None
    assert engines[-1].loss_scale.value == FIRST_SCALE / 2


def test_a_run_says_itself_what_preflight_would_have_said(
    run_config: Builder, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """`finetune run` has no preflight, and a job can skip it."""
    run(run_config(training={"maxSteps": 1}), settings)
    assert "spec.training.maxSteps: only 1 optimiser step: 40 rows, packed into " in caplog.text
    assert "spec.dataset.source: 40 rows to train on" in caplog.text


def reading_at_once(watch: step_watch.StepWatch, step: int, norm: torch.Tensor) -> None:
    norm.item()


def not_reading(watch: step_watch.StepWatch, step: int, norm: torch.Tensor) -> None:
    pass


@pytest.mark.gpu
def test_the_watch_adds_no_wait_for_the_gpu(
    run_config: Builder, settings: Settings, change_loss: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = 4, 10

    def observe(step: int) -> float:
        if step in (first, last):
            torch.cuda.set_sync_debug_mode("warn" if step == first else "default")
        return 1.0

    change_loss(observe)
    counts = {}
    config = run_config(training=SILENT | {"maxSteps": 12, "checkpointSteps": 1000})
    for name, end_step in (("watched", None), ("blind", not_reading), ("control", reading_at_once)):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if end_step is not None:
                patch.setattr(step_watch.StepWatch, "end_step", end_step)
            own = config.model_copy(update={"job": config.job.model_copy(update={"name": name})})
            outcome = run(own, settings, 1, attempt=name)
        assert outcome.result is Result.SUCCEEDED, outcome.message
        counts[name] = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    assert counts["watched"] == counts["blind"]
    assert counts["control"] == counts["blind"] + last - first
