"""A disk that fills while a run writes: the reason is DiskFull with need and have, and what exists is published.

The disk is a tmpfs in a mount namespace of its own, where this machine lets us make one; it is filled just before the
write that is looked at. The hub is not reached: its copies come first.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import ExitCode
from finetune_api.vocabulary import Quantization
from finetune_test_models.tiny_runs import Builder

MIB = 64
PROGRAM = """
import json
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.failures import exit_code_of
from finetune_api.run_config import RunConfig
from finetune_trainer.artifacts.download import read_manifest
from finetune_trainer.artifacts.hub_push import push_result
from finetune_trainer.cli.pod import run_job
from finetune_trainer.documents.event_file import write_event_file
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.disk_needs import DiskNeed
from finetune_trainer.job.outcome import explain
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages import saving
from finetune_trainer.storage.folder_store import FolderStore
from finetune_trainer.training.metrics_log import MetricLine, MetricsLog

disk, filler = Path("disk").absolute(), Path("disk/filler")


def fill(left=0):
    with filler.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - left))


def filled_before(function, left=0):
    def call(*arguments, **options):
        fill(left)
        return function(*arguments, **options)
    return call


def run(name):
    filler.unlink(missing_ok=True)
    config = RunConfig.from_yaml(Path(f"{name}.yaml").read_text())
    settings = Settings(disk / name, name, output_folder=Path(f"out-{name}").absolute())
    outcome = run_job(config, settings, ProgressTracker(), StopSignal())
    exports = [f"{each.type} {each.quantization}: {each.message}" for each in outcome.failed_exports]
    types = [artifact.type for artifact in outcome.artifacts]
    found[name] = [outcome.reason, int(outcome.exit_code), outcome.message, exports, types]


found = {}
kept = MetricsLog.add
MetricsLog.add = filled_before(kept)
run("metrics")
MetricsLog.add = kept

saving.export = filled_before(saving.export, left=1 << 16)
run("exports")

fill()
try:
    write_event_file(disk / "tensorboard", [MetricLine(step=1, time=datetime.now(UTC), loss=1.0)], "tiny")
except OSError as error:
    reason, message = explain(error, disk, [DiskNeed("adapter", 1 << 20)])
    found["tensorboard"] = [reason, int(exit_code_of(reason)), message, [], []]

store = FolderStore(Path("out-exports/tiny"))
try:
    push_result(object(), store, read_manifest(store), disk / "copies")
except TrainerError as error:
    found["push"] = [error.reason, int(error.exit_code), error.message, [], []]
print(json.dumps(found))
"""


def on_a_small_disk(folder: Path) -> dict[str, Any]:
    """What PROGRAM prints, whose folder `disk` has MIB MiB."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "disk").mkdir()
    script = f"mount -t tmpfs -o size={MIB}m none disk || exit 77; exec {sys.executable} program.py"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace of its own")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_disk_that_fills_at_any_write_is_told_with_need_and_have(run_config: Builder, tmp_path: Path) -> None:
    model = run_config().model.model_copy(update={"quantization": Quantization.NONE})
    config = run_config(training={"maxSteps": 1}, export={"merged": "BF16", "gguf": ["F16"]})
    for name in ("metrics", "exports"):
        (tmp_path / f"{name}.yaml").write_text(config.model_copy(update={"model": model}).to_yaml())
    found = on_a_small_disk(tmp_path)

    need = r"; what the job writes there takes [\d.]+ MiB of disk \((merged BF16|GGUF F16|checkpoints|adapter) .*\)$"
    for name in ("metrics", "tensorboard"):
        reason, code, message, _, published = found[name]
        assert (reason, code, published) == ("DiskFull", ExitCode.DISK_FULL, []), name
        assert re.fullmatch(rf"the disk is full: 0 of {MIB} MiB are free in \S*/disk\S*{need}", message), message

    reason, code, _, failed, published = found["exports"]
    assert (reason, len(failed)) == ("ExportFailed", 2)
    assert ExitCode(code) is ExitCode.EXPORT, "which is not retried"
    assert "Adapter" in published, "what exists is published"
    assert "Merged" not in published
    for message in failed:
        assert re.search(rf"the disk is full: 0 of {MIB} MiB are free in \S*/artifacts{need}", message), message

    reason, _, message, _, _ = found["push"]
    assert reason == "DiskFull"
    assert re.fullmatch(r"[\d.]+ MiB are needed to copy the result, but only 0.0 MiB are free in \S*/copies", message)
