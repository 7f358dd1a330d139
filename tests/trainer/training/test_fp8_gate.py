"""FP8 is tried on the first batch: kept where the loss stays, given up where it does not, and said in the status.
Whole runs on the CPU with layers that only pretend; byte_products/test_gpu_fp8.py has real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from finetune_api.failures import FailureReason
from finetune_api.outcome import Result
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode, Precision
from finetune_kernels.layers.fused_layers import FusedLayers
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages.model_loading import resolve_precision
from finetune_trainer.training.engine import NO_ROOM, Engine
from finetune_trainer.training.losses import supervised_loss
from finetune_trainer.training.memory.loaded_shape import model_shape

Builder = Callable[..., RunConfig]
GIB = 2**30


class Layers:
    """Layers whose loss is off by `error` while they compute in FP8."""

    def __init__(self, error: float) -> None:
        self.error, self.fp8, self.modes = error, False, list[bool]()

    def use_fp8(self) -> None:
        self.fp8 = True

    def use_compute_dtype(self) -> None:
        self.fp8 = False

    def keep_weights(self, count: int) -> None:
        self.fp8 = False

    def set_policies(self, policies: Any) -> None:
        pass

    def move_vocabulary(self) -> None:
        pass

    def loss(self, model: Any, *arguments: Any) -> torch.Tensor:
        self.modes.append(self.fp8)
        return supervised_loss(model, *arguments) * (1 + self.error if self.fp8 else 1)


def plan_for(model: Any, mode: MemoryMode, most: int = 8 * GIB) -> MemoryPlan:
    return plan_memory(model_shape(model), 256, base_bytes=GIB, total_bytes=min(8 * GIB, most), mode=mode)


@pytest.fixture
def run(
    run_config: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Layers], tuple[Resolved, float | None]]:
    """A run of two steps: what it resolved, and its last loss."""

    def start(layers: Layers, mode: MemoryMode = MemoryMode.FASTEST, runs_out_at: int | None = None) -> Any:
        def loss(*arguments: Any) -> torch.Tensor:
            found = layers.loss(*arguments)
            if len(layers.modes) == runs_out_at:
                raise torch.OutOfMemoryError("no memory")
            return found

        def prepare(model: Any, *_: Any) -> Engine:
            return Engine(
                False, loss, MicroBatch(2, 1), plan_for(model, mode), cast(FusedLayers, layers),
                lambda smaller, most: plan_for(model, smaller, most), awaits_fp8_decision=True,
            )  # fmt: skip

        monkeypatch.setattr(pipeline, "prepare_engine", prepare)
        progress, folder = ProgressTracker(), tmp_path / str(id(layers))
        config = run_config(training={"maxSteps": 2, "batchSize": 2, "gradientAccumulation": 1})
        outcome = run_job(config, Settings(folder / "work", "a", output_folder=folder / "out"), progress, StopSignal())
        assert outcome.result is Result.SUCCEEDED, outcome.message
        return progress.resolved, progress.value("loss")

    return start


def test_a_loss_that_stays_keeps_fp8(run: Any) -> None:
    layers = Layers(0.009)
    resolved, _ = run(layers)
    assert resolved.precision == "FP8"
    assert "by 0.90%" in resolved.precision_reason
    assert layers.modes == [False, True, True, True], "tried in both, then two steps"


@pytest.mark.parametrize(("error", "said"), [(0.011, "1.10%"), (-0.5, "50.00%"), (float("nan"), "nan%")])
def test_a_loss_that_moves_returns_to_bf16(run: Any, error: float, said: str) -> None:
    layers = Layers(error)
    resolved, loss = run(layers)
    assert resolved.precision == "BF16"
    assert said in resolved.precision_reason
    assert layers.modes == [False, True, False, False]
    assert loss == run(Layers(0.0))[1]


def test_without_room_for_weights_nothing_is_tried(run: Any) -> None:
    layers = Layers(0.0)
    resolved, _ = run(layers, MemoryMode.SMALLEST)
    assert (resolved.precision, resolved.precision_reason) == ("BF16", NO_ROOM)
    assert layers.modes == [False, False]


def test_memory_that_runs_out_ends_fp8(run: Any) -> None:
    layers = Layers(0.0)
    resolved, _ = run(layers, MemoryMode.FASTEST, 3)
    assert (resolved.precision, resolved.precision_reason) == ("BF16", NO_ROOM)
    assert layers.modes == [False, True, True, False, False]


def test_devices_without_the_type_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str) -> str:
        with pytest.raises(TrainerError) as caught:
            resolve_precision(Precision.FP8, torch.device(device))
        assert caught.value.reason is FailureReason.INVALID_CONFIGURATION
        return str(caught.value)

    assert "FP8 trains on GPUs only" in refused("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert "this GPU has no FP8" in refused("cuda")
    for capability in ((8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, known=capability: known)
        assert resolve_precision(Precision.FP8, torch.device("cuda")) is Precision.BF16
