"""The result of training, summarised from TRL's log of the run."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.trainer_callback import TrainerState

from finetune_trainer.training.best_adapter import EvaluationRecord
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.records import LossPoint


@dataclass(frozen=True)
class TrainingOutcome:
    """Steps and losses of a finished training, those before a resumption included."""

    steps: int
    loss: float | None
    """Last logged training loss, nats per supervised token."""
    eval_loss: float | None
    """Last evaluation loss, nats per supervised token."""
    history: tuple[LossPoint, ...] = ()
    """Every logged loss: training first, then evaluations."""
    best_step: int | None = None
    """Step of the adapter that is now in the model, if the best one is kept; None: that of the last step."""
    best_eval_loss: float | None = None
    stopped_early: bool = False
    gpu_seconds: int | None = None
    """Seconds since this pod's trainer began, times its GPUs; None for a run on a CPU."""
    energy_watt_hours: float | None = None
    """Energy of these GPUs; None if nothing measures it."""

    def metrics(self) -> dict[str, float]:
        """Figures for the manifest and the model card, under their names there."""
        measured = {
            "steps": float(self.steps),
            "loss": self.loss,
            "evalLoss": self.eval_loss,
            "bestStep": None if self.best_step is None else float(self.best_step),
            "bestEvalLoss": self.best_eval_loss,
            "stoppedEarly": 1.0 if self.stopped_early else None,
            "gpuSeconds": self.gpu_seconds,
            "energyWattHours": self.energy_watt_hours,
        }
        return {name: float(value) for name, value in measured.items() if value is not None}


def summarise_training(
    steps: int, log_history: Sequence[dict[str, float]], checkpointed: CheckpointedState, *, stopped_early: bool
) -> TrainingOutcome:
    """Returns the outcome after `steps` optimiser steps; `log_history` is TrainerState's."""
    losses = [LossPoint(int(entry["step"]), entry["loss"]) for entry in log_history if "loss" in entry]
    evaluations = [
        LossPoint(int(entry["step"]), entry["eval_loss"], True) for entry in log_history if "eval_loss" in entry
    ]
    record = checkpointed.best.record if checkpointed.best is not None else EvaluationRecord()

    return TrainingOutcome(
        steps=steps,
        loss=losses[-1].loss if losses else None,
        eval_loss=evaluations[-1].loss if evaluations else None,
        history=(*losses, *evaluations),
        best_step=record.best_step,
        best_eval_loss=record.best_loss,
        stopped_early=stopped_early,
    )


def is_evaluated(state: TrainerState) -> bool:
    """True if the newest step of the history has an evaluation loss."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
