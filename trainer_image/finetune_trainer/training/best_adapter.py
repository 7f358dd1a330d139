"""Keeps the adapter with the lowest evaluation loss, and decides when to stop waiting for a lower one.

The adapter lies on this disk, and every checkpoint carries a copy of it with the record of evaluations. So a resumed
run knows exactly what the run that wrote the checkpoint knew, and no checkpoint depends on another one. Rejected:
keeping the whole checkpoint of the best step in S3 as well. Nobody needs its optimiser state, and it would have to be
exempt from the removal of old checkpoints.
"""

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from finetune_api.base import ApiModel
from finetune_api.spec.training import EarlyStoppingSpec
from finetune_kernels.primitives.master_weights import master_weight
from finetune_trainer.training.gradients import trainable_weights

log = logging.getLogger(__name__)
FOLDER, WEIGHTS_NAME, RECORD_NAME = "best", "adapter.safetensors", "record.json"


class EvaluationRecord(ApiModel):
    """Result of the evaluations so far. Pure."""

    best_step: Annotated[int, Field(ge=0)] | None = None
    best_loss: float | None = None
    to_undercut: float | None = None
    """The loss to beat: patience starts again only for a loss that is lower by more than minDelta."""
    waited: Annotated[int, Field(ge=0)] = 0
    """Evaluations in succession that did not beat `to_undercut`."""

    def after(self, step: int, loss: float, min_delta: float = 0.0) -> Self:
        """Returns the record with one more evaluation, of optimiser step `step`."""
        is_best = self.best_loss is None or loss < self.best_loss
        undercuts = self.to_undercut is None or loss < self.to_undercut - min_delta

        return self.model_copy(
            update={
                "best_step": step if is_best else self.best_step,
                "best_loss": loss if is_best else self.best_loss,
                "to_undercut": loss if undercuts else self.to_undercut,
                "waited": 0 if undercuts else self.waited + 1,
            }
        )


class BestAdapter:
    """The best adapter so far, kept below `folder`."""

    def __init__(self, folder: Path, early_stopping: EarlyStoppingSpec | None) -> None:
        self._folder = folder / FOLDER
        self._early_stopping = early_stopping
        self.record = EvaluationRecord()

    @property
    def is_exhausted(self) -> bool:
        """True if `patience` evaluations in succession found no lower loss, so that training should stop."""
        return self._early_stopping is not None and self.record.waited >= self._early_stopping.patience

    def evaluated(self, model: Any, step: int, loss: float) -> None:
        """Records an evaluation, and keeps the model's adapter if it is the best so far."""
        before = self.record
        self.record = before.after(step, loss, self._early_stopping.min_delta if self._early_stopping else 0.0)
        if self.record.best_step == before.best_step:
            return

        self._folder.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that are not contiguous.
        save_file(
            {name: master_weight(weights).detach().contiguous() for name, weights in trainable_weights(model)},
            self._folder / WEIGHTS_NAME,
        )
        log.info("step %d has the lowest evaluation loss so far", step)

    def load(self, model: Any) -> None:
        """Copies the best adapter into the model; does nothing before the first evaluation."""
        if self.record.best_step is None:
            return

        kept = load_file(self._folder / WEIGHTS_NAME)
        with torch.no_grad():
            for name, weights in trainable_weights(model):
                master_weight(weights).copy_(kept[name])
                weights.copy_(kept[name])

    def save_into(self, checkpoint: Path) -> None:
        """Adds the record and the best adapter to a checkpoint's folder."""
        target = checkpoint / FOLDER  # there already if a step is saved twice
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

        (target / RECORD_NAME).write_text(self.record.model_dump_json(by_alias=True), encoding="utf-8")
        if self.record.best_step is not None:
            shutil.copyfile(self._folder / WEIGHTS_NAME, target / WEIGHTS_NAME)

    def restore_from(self, checkpoint: Path) -> None:
        """Takes over record and adapter from a checkpoint."""
        source = checkpoint / FOLDER
        self.record = EvaluationRecord.model_validate_json((source / RECORD_NAME).read_text(encoding="utf-8"))
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(source, self._folder)
