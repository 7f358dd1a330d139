"""Whole runs that are evaluated: early stopping, the best adapter, samples, interruption, and data of their own."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune_api.outcome import Outcome, Result
from finetune_api.progress import RunProgress
from finetune_api.run_config import RunConfig
from finetune_test_models import chat_data
from finetune_test_models.stopped_runs import stopped_after
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.settings import Settings

Builder = Callable[..., RunConfig]
HELD_OUT = {"evaluation": {"fraction": 0.2}}
# Learns fast and then too much: the evaluation loss falls at first and rises after it.
OVERFITTING = {
    "maxSteps": 40,
    "learningRate": 3e-2,
    "scheduler": "Constant",
    "warmupSteps": 0,
    "evaluationSteps": 2,
    "checkpointSteps": 5,
    "earlyStopping": {"patience": 2},
    "samples": {"maxTokens": 8},
}


@dataclass
class Ran:
    """A run that has ended."""

    outcome: Outcome
    reported: RunProgress
    folder: Path

    def artifact(self, kind: str) -> Path:
        return next(Path(artifact.uri) for artifact in self.outcome.artifacts if artifact.type == kind)

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.artifact("Adapter") / "adapter_model.safetensors")

    def metrics(self) -> dict[str, float]:
        """As resolved.yaml has them."""
        described: dict[str, Any] = yaml.safe_load(self.artifact("Configuration").read_text())
        return dict(described["metrics"])

    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.artifact("Samples").read_bytes().decode().split("\n") if line]


def run(config: RunConfig, folder: Path, attempt: str = "a", stop_after: int | None = None) -> Ran:
    """An attempt of the job whose results are in `folder`; a SIGTERM arrives after `stop_after` steps."""
    progress, stop_signal = stopped_after(stop_after)
    settings = Settings(work=folder / f"work-{attempt}", attempt_id=attempt, output_folder=folder / "out")
    outcome = run_job(config, settings, progress, stop_signal)
    return Ran(outcome, progress.report().finetune, folder)


def assert_equal_adapters(first: Ran, second: Ran) -> None:
    one, other = first.adapter(), second.adapter()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """The run that stops early, made once."""
    return {}


@pytest.fixture
def stopped(run_config: Builder, straight: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    if not straight:
        config = run_config(training=OVERFITTING, dataset=HELD_OUT)
        straight["run"] = run(config, tmp_path_factory.mktemp("straight"))
    return straight["run"]


def test_training_stops_early_and_the_best_adapter_is_exported(
    stopped: Ran, run_config: Builder, tmp_path: Path
) -> None:
    outcome = stopped.outcome
    assert outcome.result is Result.SUCCEEDED, outcome.message
    assert outcome.stopped_early
    assert outcome.best_step is not None
    assert outcome.step is not None
    assert outcome.best_step + 4 == outcome.step < 40, "two evaluations in vain, two steps apart"
    assert outcome.best_eval_loss is not None
    assert outcome.eval_loss is not None
    assert outcome.best_eval_loss < outcome.eval_loss
    told = stopped.reported
    assert (told.best_step, told.best_eval_loss) == (outcome.best_step, outcome.best_eval_loss)
    assert told.stopped_early

    plain = {key: OVERFITTING[key] for key in ("learningRate", "scheduler", "warmupSteps")}
    ended = run(run_config(training=plain | {"maxSteps": outcome.best_step}, dataset=HELD_OUT), tmp_path)
    assert ended.outcome.best_step is None
    assert_equal_adapters(stopped, ended)  # neither evaluations nor samples change anything


def test_documents_say_what_is_exported_and_show_samples(stopped: Ran) -> None:
    card = (stopped.artifact("ModelCard") / "README.md").read_text()
    best = stopped.outcome.best_step
    assert f"Exported is step {best}, with the lowest evaluation loss, after which training stopped early" in card
    assert f"exported: step {best}" in (stopped.artifact("ModelCard") / "loss.svg").read_text()
    assert "## Samples" in card
    assert stopped.metrics()["bestStep"] == best
    lines = stopped.samples()
    last = stopped.outcome.step
    assert last is not None
    assert [line["step"] for line in lines] == [step for step in range(0, last + 1, 2) for _ in range(4)]
    assert all(line["reference"] for line in lines)
    answers = {step: [line["answer"] for line in lines if line["step"] == step] for step in (0, best)}
    assert answers[0] != answers[best]


def test_no_row_of_the_data_reaches_status_or_outcome(stopped: Ran) -> None:
    told = stopped.outcome.model_dump_json() + stopped.reported.model_dump_json()
    texts = [line[name].strip() for line in stopped.samples() for name in ("prompt", "answer", "reference")]
    assert not [text for text in texts if len(text) > 8 and (text in told or json.dumps(text)[1:-1] in told)]


@pytest.mark.parametrize("place", ["before the best step", "with it", "after it", "with the step that ends training"])
def test_a_run_that_is_interrupted_ends_alike(stopped: Ran, run_config: Builder, tmp_path: Path, place: str) -> None:
    best, last = stopped.outcome.best_step, stopped.outcome.step
    assert best is not None
    assert last is not None
    stop_after = {"before the best step": best - 1, "with it": best, "after it": best + 1}.get(place, last)
    config = run_config(training=OVERFITTING, dataset=HELD_OUT)
    first = run(config, tmp_path, "a", stop_after)
    if first.outcome.result is Result.SUCCEEDED:
        assert stop_after == stopped.outcome.step, "a run that is over anyway is not interrupted"
        second = first
    else:
        assert (first.outcome.exit_code, first.outcome.checkpoint_step) == (30, stop_after)
        second = run(config, tmp_path, "b")
        assert second.outcome.resumed_from_step == stop_after
    for name in ("step", "best_step", "best_eval_loss", "eval_loss", "stopped_early"):
        assert getattr(second.outcome, name) == getattr(stopped.outcome, name), name
    assert_equal_adapters(stopped, second)
    assert second.samples() == stopped.samples()


@pytest.mark.parametrize("training", [OVERFITTING, {"maxSteps": 4, "checkpointSteps": 2}])
def test_a_pod_that_dies_after_training_does_not_train_on(
    run_config: Builder, tmp_path: Path, training: dict[str, Any]
) -> None:
    config = run_config(training=training, dataset=HELD_OUT)
    config = config.model_copy(update={"keep_checkpoints_after_success": True})  # as if it had died before they went
    first = run(config, tmp_path, "a")
    last, kept, metrics = first.outcome.step, first.adapter(), first.metrics()
    (tmp_path / "out/tiny/manifest.json").unlink()
    again = run(config, tmp_path, "b")
    assert again.outcome.result is Result.SUCCEEDED, again.outcome.message
    assert again.outcome.resumed_from_step == last
    assert again.metrics() == metrics
    assert all(torch.equal(value, kept[name]) for name, value in again.adapter().items())


def test_without_what_checkpoints_carry_the_best_is_forgotten(
    stopped: Ran, run_config: Builder, tmp_path: Path
) -> None:
    """The control of the test above: between best step and end, only the checkpoint knows of it."""
    config = run_config(training=OVERFITTING, dataset=HELD_OUT)
    assert stopped.outcome.best_step is not None
    place = stopped.outcome.best_step + 1
    run(config, tmp_path, "a", stop_after=place)
    (index,) = (tmp_path / "out").rglob(f"step-{place:08d}/checkpoint.json")
    document = json.loads(index.read_text())
    for file in document["files"]:
        if file["path"].endswith("best/record.json"):
            path = index.parent / file["path"]
            path.write_text("{}")
            file |= {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    index.write_text(json.dumps(document))
    second = run(config, tmp_path, "b")
    assert second.outcome.best_step != stopped.outcome.best_step


def test_data_of_their_own_are_evaluated_on_and_never_trained_on(
    run_config: Builder, chat_file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "held-out.jsonl"
    shutil.copyfile(chat_data.write_jsonl(tmp_path / "more.jsonl", 50), own)
    own.write_text("\n".join(own.read_text().splitlines()[40:]) + "\n")
    training = {"maxSteps": 2}
    quiet = run(run_config(training=training), tmp_path / "quiet")
    evaluation = {"evaluation": {"source": f"file://{own}"}}
    ran = run(run_config(training=training, dataset=evaluation), tmp_path / "evaluated")
    assert ran.outcome.eval_loss is not None
    assert ran.reported.resolved is not None
    assert (ran.reported.resolved.rows, ran.reported.resolved.evaluation_rows) == (40, 10)
    assert ran.reported.resolved.evaluation_digest not in (None, ran.reported.resolved.dataset_digest)
    assert_equal_adapters(quiet, ran)

    own.write_text('{"messages": 7}\n')
    refused = run(run_config(training=training, dataset=evaluation), tmp_path / "refused").outcome
    assert refused.reason == "InvalidRow"
    assert "held-out.jsonl:1" in refused.message
