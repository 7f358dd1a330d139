"""Describes and runs the job that one measurement is, as a pod would."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import Result
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.spec.location import attempt_name, attempt_prefix
from finetune_trainer.cli.pod import run_job
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.training.metrics_log import METRICS_FILE, MetricLine

NAME, ATTEMPT, UID = "held-out", "a", "u"


@dataclass(frozen=True)
class Rows:
    """Files of rows to train on, and of rows that are held out."""

    train: Path
    held_out: Path


@dataclass(frozen=True)
class Finished:
    """A run that has succeeded."""

    resolved: Resolved
    """What it has chosen, for the status."""
    work: Path
    """Its scratch folder, with the encoded rows."""
    results: Path
    """What it has published."""

    @property
    def held_out_loss(self) -> float:
        """The last evaluation of the training itself, in nats a supervised token."""
        lines = (self.results / "metrics" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        found = [line.eval_loss for line in map(MetricLine.model_validate_json, lines) if line.eval_loss is not None]
        return found[-1]


def job(base: Path, template: str, rows: Rows, training: Mapping[str, Any], *, merged: str = "None") -> RunConfig:
    """Returns a job that trains the Hugging Face folder `base` on a GPU, if there is one."""
    return RunConfig.model_validate(
        {
            "job": {"namespace": "default", "name": NAME, "uid": UID},
            "model": {
                "source": f"file://{base.resolve()}",
                "maxSequenceLength": 512,
                "chatTemplateName": template,
            },
            "dataset": {
                "source": f"file://{rows.train.resolve()}",
                "packing": False,
                "evaluation": {"source": f"file://{rows.held_out.resolve()}"},
            },
            "adapter": {},
            "training": {"batchSize": 4, "gradientAccumulation": 1, **training},
            "export": {"merged": merged, "gguf": []},
            "output": {"s3": {"bucket": "none"}},
            "outputPrefix": "default/held-out",
            "checkpointsToKeep": 1,
            "terminationGracePeriodSeconds": 60,
            "gpus": int(torch.cuda.is_available()),
        }
    )


@contextmanager
def finished(config: RunConfig) -> Iterator[Finished]:
    """Runs the job; what it leaves on the disk goes at the end. Raises RuntimeError if it does not succeed."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        progress = ProgressTracker()
        outcome = run_job(config, Settings(work, ATTEMPT, output_folder=work / "out"), progress, StopSignal())
        if outcome.result is not Result.SUCCEEDED:
            raise RuntimeError(outcome.message)
        results = work / "out" / NAME / attempt_prefix(attempt_name(UID, ATTEMPT))
        yield Finished(progress.resolved, work, results)
