"""Whole runs over a base that streams from host memory: evaluation, samples, a stop, a resumption, export, judging."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.loaded_weights import let_stream
from finetune_kernels.planning.memory_plan import MemoryPlan, plan_memory
from finetune_kernels.planning.micro_batch import MicroBatch
from finetune_kernels.streaming.host_tensors import HostTensors
from finetune_test_models.stopped_runs import stopped_after
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer import pipeline
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.settings import Settings
from finetune_trainer.stages.streamed_loading import InHostMemory
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.losses import supervised_loss
from finetune_trainer.training.memory.loaded_shape import model_shape

Builder = Callable[..., RunConfig]
LAYERS, STREAMED = 5, 4
SECTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"evaluation": {"fraction": 0.2}},
    "training": {
        "maxSteps": 2, "batchSize": 1, "gradientAccumulation": 2, "precision": "FP32", "evaluationSteps": 1,
        "keepBest": True, "samples": {"prompts": ["One?", "Two, and a longer one?"], "maxTokens": 4},
    },
    "export": {"merged": "BF16", "gguf": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), texts=texts, num_hidden_layers=LAYERS)


def run(config: RunConfig, folder: Path, attempt: str, stop_after: int | None = None) -> Outcome:
    progress, stop_signal = stopped_after(stop_after)
    settings = Settings(work=folder / attempt, attempt_id=attempt, output_folder=folder / "out")
    return run_job(config, settings, progress, stop_signal)


def content(outcome: Outcome, kind: str, file: str) -> Path:
    """A file among the artifacts."""
    return next(Path(artifact.uri) for artifact in outcome.artifacts if artifact.type == kind) / file


def test_a_streamed_base_gives_the_result_of_a_resident_one(
    run_config: Builder, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(**SECTIONS | {"model": {"source": f"file://{tiny_base}"}})
    resident = run(config, tmp_path / "resident", "a")
    assert resident.result is Result.SUCCEEDED, resident.message

    # As the memory plan of a card that is too small decides.
    monkeypatch.setattr(pipeline, "placement_of", lambda *_: InHostMemory(STREAMED))
    uses: list[int] = []
    wait = HostTensors.wait
    monkeypatch.setattr(HostTensors, "wait", lambda self: (uses.append(id(self)), wait(self)))
    stopped = run(config, tmp_path / "streamed", "a", stop_after=1)
    assert (stopped.result, stopped.checkpoint_step) == (Result.INTERRUPTED, 1), stopped.message
    assert len(set(uses)) == STREAMED
    streamed = run(config, tmp_path / "streamed", "b")
    assert (streamed.result, streamed.resumed_from_step) == (Result.SUCCEEDED, 1), streamed.message

    assert (streamed.best_step, streamed.best_eval_loss) == (resident.best_step, resident.best_eval_loss)
    for kind, file in (("Adapter", "adapter_model.safetensors"), ("Merged", "model.safetensors")):
        found, expected = (load_file(content(outcome, kind, file)) for outcome in (streamed, resident))
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert content(streamed, "Samples", "").read_text() == content(resident, "Samples", "").read_text()
    assert streamed.judgement == resident.judgement
    assert streamed.judgement is not None


def test_layers_stream_from_where_memory_ran_out(
    run_config: Builder, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest plan takes the layers' weights off the device in the middle of a run, and no number changes."""
    training = {"maxSteps": 2, "batchSize": 1, "gradientAccumulation": 2, "precision": "FP32"}
    config = run_config(training=training, model={"source": f"file://{tiny_base}"})
    resident = run(config, tmp_path / "resident", "a")
    seen: list[tuple[int, int]] = []

    def prepare(model: Any, loaded: LoadedModel, *_: Any) -> Engine:
        shape, calls = let_stream(model_shape(model), double_quantized=True), itertools.count(1)

        def plan_for(mode: MemoryMode, most: int) -> MemoryPlan:
            return plan_memory(shape, 256, base_bytes=1 << 30, total_bytes=min(8 << 30, most), mode=mode)

        def loss(*arguments: Any) -> torch.Tensor:
            call = next(calls)
            seen.append((call, len(loaded.streamed)))
            found = supervised_loss(*arguments)
            if call in (3, 4):  # the second step's first pass, and its repetition
                raise torch.OutOfMemoryError("no memory")
            return found

        layers: Any = SimpleNamespace(set_policies=len, keep_weights=abs, move_vocabulary=list, drop_graphs=bool)
        plan = plan_for(MemoryMode.FASTEST, 8 << 30)
        assert plan.streamed_layers == 0
        return Engine(False, loss, MicroBatch(1, 2), plan, layers, plan_for, streamed=loaded.streamed)

    monkeypatch.setattr(pipeline, "prepare_engine", prepare)
    outcome = run(config, tmp_path / "short", "a")
    assert outcome.result is Result.SUCCEEDED, outcome.message
    assert outcome.memory is not None
    assert (outcome.memory.mode, outcome.memory.streamed_layers) == (MemoryMode.SMALLEST, LAYERS)
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 0), (5, LAYERS), (6, LAYERS)]
    card = content(outcome, "ModelCard", "README.md").read_text()
    assert "GPU memory: plan Smallest, 5 layers streamed from host memory, peak" in card

    file = "adapter_model.safetensors"
    found, expected = (load_file(content(each, "Adapter", file)) for each in (outcome, resident))
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
