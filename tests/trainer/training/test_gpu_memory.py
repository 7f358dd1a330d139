"""On a GPU whose memory becomes less while it trains: the next smaller plan takes over, and no loss changes."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finetune_api.progress import MemoryFallback
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import MemoryMode
from finetune_kernels.planning.activation_policy import ActivationPolicy
from finetune_kernels.planning.rates import UNLIMITED
from finetune_test_models import gpu_runs, tiny_runs
from finetune_test_models.tiny_model import make_tiny_model
from finetune_trainer import pipeline
from finetune_trainer.training.engine import Engine, Loss

pytestmark = pytest.mark.gpu
run_config, trained = tiny_runs.run_config, gpu_runs.trained
Run = gpu_runs.Run
GIB = 2**30
STEPS, PASSES = 5, 2
LENGTH = 2048
EMULATED_BYTES = 1.3 * GIB
ACCIDENT = 5  # the second pass of the third step
TOLERANCE = 5e-3
"""Relative; for bf16 products of other shapes, as in test_gpu_runs. On a CPU (512 tokens, two layers) bf16 differed
from fp32 by 3e-4, and 2e-2 was measured where the pass of the accident had learned the opposite."""
# 1.4 GiB between both plans at 4 x 2,048 tokens
WIDE = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 4096}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = (message["content"] for chat in tiny_runs.conversations(60) for message in chat)
    return make_tiny_model(tmp_path_factory.mktemp("llama"), texts=said, **WIDE)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny_runs.conversations(260, words=80))


@pytest.fixture(autouse=True)
def whole_card() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


class Watched:
    """The engine's loss, counted; before one call something happens, or the gradient of that call is the opposite."""

    def __init__(self, loss: Loss, happens: Callable[[], None], *, opposite: bool) -> None:
        self._loss, self._happens, self._opposite = loss, happens, opposite
        self.calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        special = self.calls == ACCIDENT
        self.calls += 1
        if special:
            self._happens()
        loss = self._loss(*arguments)
        return 2 * loss.detach() - loss if special and self._opposite else loss


def shrink_card(engine: Engine) -> None:
    """From now on this process may take what is halfway between the plan and the next smaller one."""
    assert engine.plan is not None
    assert engine.replan is not None
    most, least = engine.plan.peak_bytes, engine.replan(MemoryMode.BALANCED, UNLIMITED).peak_bytes
    assert most - least > GIB, "as much on both sides as a wrong prediction and fragments may take"
    limit = (most + least) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])


def run(config: RunConfig, folder: Path) -> Run:
    gc.collect()  # the model of the run before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return gpu_runs.run(config, folder)


def largest_difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS
    return gpu_runs.largest_difference(found, expected)


class Runs:
    """Whole runs of one configuration, each with something that happens before the pass of the accident."""

    def __init__(self, config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._config, self._folder, self._monkeypatch = config, folder, monkeypatch
        self._prepare = pipeline.prepare_engine
        self.passes: list[int] = []
        self.kept: list[tuple[set[ActivationPolicy], int]] = []
        """What layers keep at the end, and bytes of decoded weights."""

    def __call__(
        self, name: str, happens: Callable[[Engine], None] = lambda engine: None, *, opposite: bool = False
    ) -> Run:
        made: list[tuple[Engine, Watched]] = []

        def prepare(*arguments: Any) -> Engine:
            engine = self._prepare(*arguments)
            engine.loss = watched = Watched(engine.loss, lambda: happens(engine), opposite=opposite)
            made.append((engine, watched))
            return engine

        self._monkeypatch.setattr(pipeline, "prepare_engine", prepare)
        result = run(self._config, self._folder / name)
        ((engine, watched),) = made
        assert engine.layers is not None
        self.passes.append(watched.calls)
        self.kept.append(({layer.policy for layer in engine.layers.layers}, engine.layers.dequantized_bytes))
        return result


@pytest.fixture
def runs(run_config: tiny_runs.Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    training = {"maxSteps": STEPS, "batchSize": 4, "gradientAccumulation": PASSES, "optimizer": "AdamW"}
    training |= {"learningRate": 1e-2, "warmupSteps": 0, "scheduler": "Constant"}
    return Runs(run_config(training=training, model={"maxSequenceLength": LENGTH}), tmp_path, monkeypatch)


def test_training_goes_on_with_less_memory_and_the_same_losses(runs: Runs, trained: list[list[float]]) -> None:
    whole, _ = runs("whole")
    runs("opposite", opposite=True)
    outcome, told = runs("short", shrink_card)
    print(f"losses {trained[0]}, a pass learned the opposite {trained[1]}, memory ran out {trained[2]}")  # `pytest -s`
    print(f"plans {whole.memory} and {outcome.memory}")

    assert whole.memory is not None
    assert (whole.memory.mode, whole.memory.fallbacks) == (MemoryMode.FASTEST, ())
    memory = outcome.memory
    assert memory is not None
    assert memory == told.memory
    fallback = MemoryFallback(step=ACCIDENT // PASSES, from_mode=MemoryMode.FASTEST, to_mode=MemoryMode.BALANCED)
    assert (memory.mode, memory.fallbacks) == (MemoryMode.BALANCED, (fallback,))
    assert told.step == STEPS
    assert runs.passes == [STEPS * PASSES, STEPS * PASSES, STEPS * PASSES + 1], "one pass was made twice"
    assert runs.kept[0][0] == {ActivationPolicy.SAVE_ALL}
    assert runs.kept[0][1] > 0
    assert runs.kept[2] == ({ActivationPolicy.RECOMPUTE_MLP}, 0)

    assert largest_difference(trained[2], trained[0]) < TOLERANCE
    assert largest_difference(trained[1], trained[0]) > TOLERANCE, "a wrong pass is seen"

    documents = {artifact.type: Path(artifact.uri) for artifact in outcome.artifacts}
    card = (documents["ModelCard"] / "README.md").read_text(encoding="utf-8")
    assert f"memory ran out after step {ACCIDENT // PASSES} to Balanced" in card
    described = yaml.safe_load(documents["Configuration"].read_text(encoding="utf-8"))
    fallen = {"step": ACCIDENT // PASSES, "fromMode": "Fastest", "toMode": "Balanced"}
    assert described["memory"]["fallbacks"] == [fallen]


def test_an_emulated_card_gets_a_plan_that_fits_it(runs: Runs) -> None:
    torch.cuda.set_per_process_memory_fraction(EMULATED_BYTES / torch.cuda.mem_get_info()[1])
    outcome, _ = runs("emulated")
    print(f"plan {outcome.memory}")  # `pytest -s`
    assert outcome.memory is not None
    assert outcome.memory.predicted_peak_bytes < EMULATED_BYTES, "on the whole card it is 1.8 GiB"
