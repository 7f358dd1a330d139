"""On a GPU: a run whose weights stream has the losses of a resident one, in a fraction of the memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.memory_plan import MemoryPlan
from finetune_test_models import gpu_runs, tiny_runs
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer.preflight.memory import plans
from finetune_trainer.training import engine
from finetune_trainer.training.memory import loaded_shape

pytestmark = pytest.mark.gpu
run_config, trained, chat_file = tiny_runs.run_config, gpu_runs.trained, tiny_runs.chat_file
LAYERS = 12
# 12 MiB a layer in NF4.
WIDE = {"hidden_size": 2048, "num_hidden_layers": LAYERS, "intermediate_size": 2048, "num_attention_heads": 16}
TRAINING = {"maxSteps": 5, "batchSize": 1, "gradientAccumulation": 2, "memory": "Smallest", "evaluationSteps": 5}
BESIDE = 96 << 20
"""Bytes that a plan does not count, such as cuBLAS's workspaces; ten layers that are not on the GPU are 130 MB."""
TOLERANCE = 1e-4
"""Relative difference of losses, at least: attention adds in any order. A layer in another's place changes them by more
than a tenth."""


def run(config: RunConfig, folder: Path) -> gpu_runs.Run:
    gc.collect()  # the model of the run before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return gpu_runs.run(config, folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = (message["content"] for chat in tiny_runs.conversations(60) for message in chat)
    return make_tiny_model(tmp_path_factory.mktemp("llama"), texts=said, **WIDE)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MemoryPlan, int]]:
    """The memory plans of the runs, in their order, with the peak of the loading; from there on another peak is
    measured."""
    found: list[tuple[MemoryPlan, int]] = []
    describe = engine.describe_plan

    def note(plan: MemoryPlan) -> str:
        found.append((plan, torch.cuda.max_memory_allocated()))
        torch.cuda.reset_peak_memory_stats()
        return describe(plan)

    monkeypatch.setattr(engine, "describe_plan", note)
    return found


def test_a_streamed_run_is_a_resident_one_in_less_memory(
    run_config: tiny_runs.Builder, tmp_path: Path, trained: list[list[float]], chosen: list[tuple[MemoryPlan, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = run_config(training=TRAINING, dataset={"evaluation": {"fraction": 0.2}})
    gc.collect()
    held = torch.cuda.memory_allocated()  # by what other tests of this process keep
    _, streamed = run(config, tmp_path / "streamed")

    def stay(shape: Any, **_: Any) -> Any:
        return shape

    for module in (plans, loaded_shape):
        monkeypatch.setattr(module, "let_stream", stay)
    _, resident = run(config, tmp_path / "resident")
    _, again = run(config, tmp_path / "again")

    plans_of_runs, loading = zip(*chosen, strict=True)
    assert [plan.streamed_layers for plan in plans_of_runs] == [LAYERS, 0, 0]
    noise = gpu_runs.largest_difference(trained[2], trained[1])
    difference = gpu_runs.largest_difference(trained[0], trained[1])
    print("differences of two resident runs, and of a streamed one:", noise, difference)
    assert difference <= max(2 * noise, TOLERANCE)

    saved = plans_of_runs[1].peak_bytes - plans_of_runs[0].peak_bytes
    assert saved == pytest.approx((LAYERS - 2) / LAYERS * plans_of_runs[0].streamed_bytes, rel=0.05)
    print("peaks while loading:", loading)
    assert loading[1] - loading[0] > 0.5 * saved, "never whole on the card, while it is loaded either"
    peaks = []
    for each in (streamed, resident, again):
        assert each.memory is not None
        assert each.memory.mode is MemoryMode.SMALLEST
        assert each.memory.measured_peak_bytes is not None
        assert each.memory.measured_peak_bytes <= each.memory.predicted_peak_bytes + BESIDE + held
        peaks.append(each.memory.measured_peak_bytes)
    print("peaks:", peaks, "predicted to save:", saved)
    assert peaks[1] - peaks[0] > 0.8 * saved
