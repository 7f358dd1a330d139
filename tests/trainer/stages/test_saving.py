"""An export that fails after training costs nothing else: all the rest is published, the failure is said with the way
on, and the same job with another export goes on from the finished checkpoint."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_test_models.tiny_runs import Builder
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.cli.export_arguments import add_export_arguments, check_export_arguments
from finetune_trainer.cli.pod import run_job
from finetune_trainer.cli.run import show
from finetune_trainer.errors import InterruptedRunError
from finetune_trainer.export.errors import OverflowingWeightsError, UnsupportedTokenizerError
from finetune_trainer.export.export import ExportedFile, ExportRequest
from finetune_trainer.export.export import export as real_export
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal

Fail = Callable[[Exception, Callable[[ExportRequest], bool]], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make exports fail with an error where a request asks for something."""

    def arrange(error: Exception, when: Callable[[ExportRequest], bool]) -> None:
        def export(request: ExportRequest, **options: Any) -> list[ExportedFile]:
            if when(request):
                raise error
            return real_export(request, **options)

        monkeypatch.setattr("finetune_trainer.stages.saving.export", export)

    return arrange


def run(config: RunConfig, settings: Settings) -> tuple[Outcome, ProgressTracker]:
    progress = ProgressTracker()
    return run_job(config, settings, progress, StopSignal()), progress


def read_manifest(settings: Settings) -> Manifest:
    assert settings.output_folder is not None
    return Manifest.decode((settings.output_folder / "tiny/manifest.json").read_bytes())


def weights_of(outcome: Outcome) -> list[tuple[str, str | None]]:
    wanted = (ArtifactType.ADAPTER, ArtifactType.MERGED, ArtifactType.GGUF)
    return [(each.type.value, each.quantization) for each in outcome.artifacts if each.type in wanted]


def test_a_gguf_file_that_fails_costs_no_other_artifact(
    run_config: Builder, settings: Settings, fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(UnsupportedTokenizerError("no such words"), lambda request: "Q8_0" in request.gguf)
    outcome, _ = run(run_config(export={"merged": "BF16", "gguf": ["F16", "Q8_0"]}), settings)

    assert (outcome.result, outcome.reason, outcome.exit_code) == (
        Result.FAILED, FailureReason.EXPORT_FAILED, ExitCode.EXPORT,
    )  # fmt: skip
    assert weights_of(outcome) == [("Adapter", "F32"), ("Merged", "BF16"), ("GGUF", "F16")]
    assert [(each.type, each.quantization, each.message) for each in outcome.failed_exports] == [
        ("GGUF", "Q8_0", "no such words")
    ]
    assert "the adapter and merged weights are published, but not GGUF Q8_0: no such words" in outcome.message
    manifest = read_manifest(settings)
    assert manifest.failed_exports == outcome.failed_exports
    assert all(Path(artifact.uri).exists() for artifact in manifest.artifacts)
    assert Outcome.decode(outcome.encode()) == outcome

    show(outcome)
    said = capsys.readouterr()
    assert "ExportFailed" in said.err
    assert "Merged" in said.out


def test_the_command_to_go_on_makes_what_is_missing(
    run_config: Builder, settings: Settings, fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from finetune_trainer.cli.export import export_here

    fail(OverflowingWeightsError("too large"), lambda request: request.merged is not None or bool(request.gguf))
    outcome, _ = run(run_config(export={"merged": "BF16", "gguf": ["F16"]}), settings)
    assert weights_of(outcome) == [("Adapter", "F32")]
    words = shlex.split(outcome.message.partition("To go on: ")[2])
    assert words[:2] == ["finetune", "export"]

    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    found, unknown = parser.parse_known_args(words[2:])
    monkeypatch.chdir(tmp_path)
    assert export_here(check_export_arguments(found, unknown)) == 0
    assert (tmp_path / "tiny-export/merged/model.safetensors").is_file()
    assert (tmp_path / "tiny-export/gguf/tiny-F16.gguf").is_file()


def test_another_export_goes_on_from_the_finished_checkpoint(
    run_config: Builder, settings: Settings, fail: Fail
) -> None:
    training = {"maxSteps": 3, "checkpointSteps": 1}
    fail(RuntimeError("a defect"), lambda request: bool(request.gguf))
    first, _ = run(run_config(export={"merged": "BF16", "gguf": ["Q8_0"]}, training=training), settings)
    assert first.reason is FailureReason.EXPORT_FAILED
    assert "RuntimeError, see the trainer's log" in first.message, "the text of a defect may hold a secret"

    other = run_config(job={"uid": "uid-2"}, export={"merged": "BF16", "gguf": []}, training=training)
    second, progress = run(other, replace(settings, work=settings.work / "again", attempt_id="attempt-2"))
    assert second.result is Result.SUCCEEDED, second.message
    assert second.resumed_from_step == 3
    assert not second.reused
    assert progress.value("trained_tokens") is None, "nothing is trained again"
    manifest = read_manifest(settings)
    assert manifest.failed_exports == ()
    assert all(Path(artifact.uri).exists() for artifact in manifest.artifacts)


def test_the_same_job_says_the_same_again(run_config: Builder, settings: Settings, fail: Fail) -> None:
    """Its pod died between the commit and its outcome."""
    fail(OverflowingWeightsError("too large"), lambda request: bool(request.gguf))
    config = run_config(export={"merged": "None", "gguf": ["F16"]})
    first, _ = run(config, settings)
    again, _ = run(config, settings)
    assert again.reused
    assert (again.reason, again.failed_exports) == (FailureReason.EXPORT_FAILED, first.failed_exports)


def test_another_training_does_not_replace_a_result_that_lacks_an_export(
    run_config: Builder, settings: Settings, fail: Fail
) -> None:
    fail(OverflowingWeightsError("too large"), lambda request: bool(request.gguf))
    run(run_config(export={"merged": "None", "gguf": ["F16"]}), settings)
    other, _ = run(run_config(job={"uid": "uid-2"}, training={"seed": 7}), settings)
    assert other.reason is FailureReason.OUTPUT_EXISTS


def test_a_signal_while_saving_is_no_failed_export(run_config: Builder, settings: Settings, fail: Fail) -> None:
    fail(InterruptedRunError("stopped"), lambda request: True)
    outcome, _ = run(run_config(export={"merged": "BF16", "gguf": ["F16"]}), settings)
    assert (outcome.result, outcome.artifacts) == (Result.INTERRUPTED, ())


def test_an_old_manifest_still_reads(run_config: Builder, settings: Settings) -> None:
    run(run_config(), settings)
    written = json.loads(read_manifest(settings).encode())
    del written["trainingDigest"], written["failedExports"]
    assert Manifest.decode(json.dumps(written).encode()).failed_exports == ()
