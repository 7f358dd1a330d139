"""A checkpoint that loads badly is passed over: training goes on from the one before it, and the log says why."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.outcome import Outcome, Result
from finetune_api.run_config import RunConfig
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.storage.digests import sha256_file

Builder = Callable[..., RunConfig]
Damage = Callable[[Path], None]


def run(config: RunConfig, folder: Path, attempt: str) -> Outcome:
    settings = Settings(work=folder / f"work-{attempt}", attempt_id=attempt, output_folder=folder / "out")
    return run_job(config, settings, ProgressTracker(), StopSignal())


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshape(path: Path) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3, 5)}, path)


def leave_out(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def forget_moments(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    moments = state["vectors"]["state"][0]["__bnb_optimizer_quant_state__"]
    moments["state1"] = moments["state1"][1:]
    torch.save(state, path)


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "truncated weights": ("adapter_model.safetensors", shorten, "cannot be read"),
    "wrong shapes": ("adapter_model.safetensors", reshape, "of shape"),
    "a tensor too few": ("adapter_model.safetensors", leave_out, "lacks"),
    "a broken history": ("trainer_state.json", shorten, "cannot be read"),
    "a truncated optimiser": ("optimizer.pt", shorten, "cannot be read"),
    "another optimiser": ("optimizer.pt", forget_moments, "instead of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_training_goes_on_from_the_checkpoint_before(
    name: str, run_config: Builder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, damage, why = DAMAGES[name]
    config = run_config(training={"maxSteps": 4, "checkpointSteps": 2})
    config = config.model_copy(update={"keep_checkpoints_after_success": True})
    assert run(config, tmp_path, "a").result is Result.SUCCEEDED
    (tmp_path / "out/tiny/manifest.json").unlink()

    (index,) = (tmp_path / "out").rglob("step-00000004/checkpoint.json")
    document = json.loads(index.read_text())
    (entry,) = (entry for entry in document["files"] if entry["path"].endswith(file))
    path = index.parent / entry["path"]
    damage(path)
    entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}  # it was saved so
    index.write_text(json.dumps(document))

    again = run(config, tmp_path, "b")
    assert (again.result, again.resumed_from_step) == (Result.SUCCEEDED, 2), again.message
    assert re.search(f"checkpoint of step 4 is not used: .*{why}", caplog.text)
