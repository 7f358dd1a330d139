"""Whole runs of a model whose packed documents see each other: gpt-oss, tiny and random."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoTokenizer

from finetune_api.outcome import Outcome, Result
from finetune_api.progress import RunProgress
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Batching
from finetune_test_models.stopped_runs import stopped_after
from finetune_test_models.tiny_architectures import tiny_architecture
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.settings import Settings
from finetune_trainer.preflight.checks import run_preflight
from finetune_trainer.training import engine
from finetune_trainer.training.batching.isolation import BatchingChoice
from finetune_trainer.training.qlora_trainer import QloraTrainer

Builder = Callable[..., RunConfig]
STEPS, STOP_AFTER = 14, 12  # an epoch has 10 steps


@pytest.fixture(scope="module")
def gpt_oss(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    for path in tiny_base.glob("*token*"):
        shutil.copy(path, folder)
    for path in tiny_base.glob("*.jinja"):
        shutil.copy(path, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = tiny_architecture("gpt_oss", vocab_size=len(tokenizer), **ends)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def job(run_config: Builder, gpt_oss: Path) -> Builder:
    def build(**training: Any) -> RunConfig:
        rates = {"batchSize": 2, "gradientAccumulation": 2, "maxSteps": 2, "learningRate": 1e-9, "precision": "FP32"}
        return run_config(
            model={"source": f"file://{gpt_oss}", "quantization": "None"},
            adapter={"targetModules": ["q_proj", "v_proj"]},
            training=rates | training,
        )

    return build


def run(config: RunConfig, work: Path, output: Path, stop_after: int | None = None) -> tuple[Outcome, RunProgress]:
    progress, stop_signal = stopped_after(stop_after)
    settings = Settings(work=work, attempt_id=work.name, output_folder=output)
    return run_job(config, settings, progress, stop_signal), progress.report().finetune


def test_rows_are_padded_and_the_status_says_so(job: Builder, tmp_path: Path) -> None:
    outcome, reported = run(job(), tmp_path / "work", tmp_path / "out")
    assert outcome.result is Result.SUCCEEDED, outcome.message
    resolved = reported.resolved
    assert resolved is not None
    assert (resolved.batching, resolved.batch_size) == (Batching.PADDED, 2)
    assert resolved.padding_share is not None
    assert 0 < resolved.padding_share < 0.3
    assert "GptOssForCausalLM cannot pack documents: they see each other" in str(resolved.batching_reason)
    assert f"{resolved.padding_share:.1%} of the tokens computed are padding" in str(resolved.batching_reason)


class CountReads(TorchDispatchMode):
    """Counts values that Python reads from tensors: on a GPU, each of them waits for all that was launched."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_no_micro_batch_waits_for_the_gpu_to_count_its_tokens(
    job: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, tokens = CountReads(), []
    with counter:
        int(torch.ones(2).sum())
    assert counter.reads == 1, "the control"

    compute_loss, computed_loss = QloraTrainer.compute_loss, engine.supervised_loss

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        with counter:
            return compute_loss(*arguments, **options)

    def unwatched(model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        with _disable_current_modes():
            tokens.append(int(inputs["attention_mask"].sum()))
            return computed_loss(model, inputs, *rest)

    monkeypatch.setattr(QloraTrainer, "compute_loss", watched)
    monkeypatch.setattr(engine, "supervised_loss", unwatched)
    outcome, reported = run(job(), tmp_path / "work", tmp_path / "out")
    assert outcome.result is Result.SUCCEEDED, outcome.message
    trained = tokens[-4:]  # two steps of two micro-batches, after those on which the batching was tried
    assert (counter.reads, reported.trained_tokens) == (1, sum(trained))


def test_preflight_says_so_too_and_counts_unpacked_rows(job: Builder, settings: Settings) -> None:
    config = job(maxSteps=None, epochs=1)
    report, _ = run_preflight(config, settings)
    assert report.optimizer_steps == 10, "40 rows, 4 a step; packed they would be fewer"
    (warning,) = (found for found in report.warnings() if found.location == "spec.dataset.packing")
    assert "documents of a gpt_oss model would see each other" in warning.message


@pytest.fixture
def evaluated(job: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Batching | None], float]:
    """The evaluation loss of a run with a batching of the test's own, or with the run's choice."""

    def evaluate(forced: Batching | None) -> float:
        if forced is not None:
            monkeypatch.setattr(engine, "choose_batching", lambda *_: BatchingChoice(forced, "forced"))
        config = job()
        evaluation = config.dataset.model_validate(
            config.dataset.model_dump(by_alias=True) | {"evaluation": {"fraction": 0.4}}
        )
        name = str(forced)
        config = config.model_copy(update={"dataset": evaluation})
        outcome, reported = run(config, tmp_path / name, tmp_path / f"{name}-out")
        assert outcome.result is Result.SUCCEEDED, outcome.message
        assert reported.eval_loss is not None
        return reported.eval_loss

    return evaluate


def test_the_evaluation_loss_is_that_of_rows_computed_one_by_one(
    evaluated: Callable[[Batching | None], float],
) -> None:
    chosen = evaluated(None)
    assert chosen == pytest.approx(evaluated(Batching.SINGLE), abs=2e-4)
    assert abs(chosen - evaluated(Batching.PACKED)) > 5e-3, "the control: with packed rows it was another loss"


def test_a_padded_run_goes_on_exactly_where_it_was(job: Builder, tmp_path: Path) -> None:
    config = job(maxSteps=STEPS, checkpointSteps=5, learningRate=1e-3)
    whole, _ = run(config, tmp_path / "whole", tmp_path / "whole-out")
    stopped, _ = run(config, tmp_path / "first", tmp_path / "out", stop_after=STOP_AFTER)
    assert (stopped.result, stopped.checkpoint_step) == (Result.INTERRUPTED, STOP_AFTER)
    resumed, _ = run(config, tmp_path / "second", tmp_path / "out")
    assert resumed.resumed_from_step == STOP_AFTER

    one, other = (load_file(Path(ran.artifacts[0].uri) / "adapter_model.safetensors") for ran in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
