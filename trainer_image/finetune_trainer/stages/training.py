"""Stage 5: trains the adapter with TRL's loop, from the newest checkpoint on, and stops in order after a signal."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState
from trl.trainer.sft_config import SFTConfig

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_trainer.artifacts.checkpoints import CheckpointStore
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.run_context import TrainingContext
from finetune_trainer.preflight.judgements.training import PlannedTraining, judge_training
from finetune_trainer.preflight.steps import run_length
from finetune_trainer.stages.data_formatting import FormattedData
from finetune_trainer.stopping import finishing
from finetune_trainer.training.callback import RunCallback
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.divergence.checkpoint_content import STATE_NAME, find_damage
from finetune_trainer.training.divergence.loss_history import LossHistory
from finetune_trainer.training.divergence.trained_adapter import check_trained_adapter
from finetune_trainer.training.engine import Engine
from finetune_trainer.training.outcome import TrainingOutcome, is_evaluated, summarise_training
from finetune_trainer.training.qlora_trainer import QloraTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Results of stages 1 to 4: everything that training starts from."""

    model: Any
    """peft's PeftModel, with the engine's kernels in it."""
    tokenizer: Any
    """transformers' PreTrainedTokenizerFast."""
    data: FormattedData
    engine: Engine
    arguments: SFTConfig
    base_model: str | None = None
    """Sign that the model was never trained on conversations; None without one."""


def train(
    context: TrainingContext, prepared: Prepared, checkpoints: CheckpointStore | None, checkpointed: CheckpointedState
) -> TrainingOutcome:
    """Trains to the end and leaves the adapter to export in the model: the best one if that is kept, else the last.

    Goes on from the newest of `checkpoints`, if there is one; None: writes and reads no checkpoints.
    Raises InterruptedRunError after a signal, with a checkpoint stored, and TrainerError (NonFiniteLoss,
    NothingLearned, ...).
    """
    progress, stop_signal = context.progress, context.stop_signal
    callback = RunCallback(progress, checkpoints, stop_signal, checkpointed, prepared.engine)
    trainer = QloraTrainer(
        model=prepared.model,
        engine=prepared.engine,
        args=prepared.arguments,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.evaluation,
        processing_class=prepared.tokenizer,
        callback=callback,
    )
    callback.report_memory()
    for finding in judge_training(_plan(context.config, prepared, trainer)):
        log.warning("%s: %s", finding.location, finding.message)

    world, output = prepared.engine.world, Path(str(prepared.arguments.output_dir))
    resumed = world.copy_folder(_restore_newest(checkpoints, output, prepared.model), output)
    if resumed is not None:
        checkpointed.restore_from(resumed)
        progress.update(resumed_from_step=int(resumed.name.rpartition("-")[2]))

    # A signal waits for this: the callback ends the loop after the step, with a checkpoint.
    with finishing(), _dropping_bad_checkpoints(callback.watch.history, checkpoints, progress):
        _train_on(trainer, resumed, checkpointed)
        callback.watch.catch_up()
        if not stop_signal.requested:
            callback.watch.finish(trainer.state.global_step)
    callback.report_memory()

    state = trainer.state
    progress.update(step=state.global_step, total_steps=state.max_steps)
    if stop_signal.requested:
        is_stored = checkpoints is not None and callback.watch.history.bad_since is None
        stored = f"checkpoint of step {state.global_step} is stored" if is_stored else "without a checkpoint"
        raise InterruptedRunError(f"stopped after step {state.global_step} of {state.max_steps}; {stored}")

    stopped_early = checkpointed.stops_early and state.global_step < state.max_steps
    progress.update(stopped_early=stopped_early or None)
    return _finish(trainer, checkpointed, stopped_early=stopped_early)


@contextmanager
def _dropping_bad_checkpoints(
    history: LossHistory, checkpoints: CheckpointStore | None, progress: ProgressTracker
) -> Iterator[None]:
    """Takes back the checkpoints that a loss has exploded from: the update before the first bad step made it bad."""
    try:
        yield
    except TrainerError as error:
        if error.reason is FailureReason.LOSS_DIVERGED and checkpoints is not None and history.bad_since is not None:
            with suppress(TrainerError):
                checkpoints.remove_from(history.bad_since - 1)
                progress.update(checkpoint_step=checkpoints.latest())
        raise


def _plan(config: RunConfig, prepared: Prepared, trainer: Any) -> PlannedTraining:
    """The training as it is about to run, for the judgements of preflight: `finetune run` and `preflight: Skip` have
    had none."""
    dataset = config.dataset.model_copy(update={"packing": bool(prepared.arguments.packing)})
    return PlannedTraining(
        config=config.model_copy(update={"dataset": dataset}),
        size=run_length(len(prepared.data.train), len(trainer.train_dataset), config.training),
        layout=prepared.data.format,
        has_template=prepared.tokenizer.chat_template is not None,
        base_model=prepared.base_model,
    )


def _restore_newest(checkpoints: CheckpointStore | None, output: Path, model: Any) -> Path | None:
    """Downloads the newest usable checkpoint; returns its folder below `output`, or None."""
    if checkpoints is None:
        return None
    step = checkpoints.restore_newest(output / "checkpoint-restored", lambda folder: find_damage(folder, model))
    if step is None:
        return None

    log.info("resuming from the checkpoint of step %d", step)
    target = output / f"checkpoint-{step}"
    shutil.rmtree(target, ignore_errors=True)  # an attempt before this one may have left it on the same disk
    return (output / "checkpoint-restored").rename(target)


def _train_on(trainer: QloraTrainer, resumed: Path | None, checkpointed: CheckpointedState) -> None:
    """Runs TRL's loop from the checkpoint in `resumed`, or from the start."""
    if resumed is not None:
        # A checkpoint from the end of training is only loaded: the loop would make one step more.
        state = TrainerState.load_from_json(str(resumed / STATE_NAME))
        _make_up(trainer, resumed, checkpointed, state)
        if state.global_step >= state.max_steps or checkpointed.stops_early:
            trainer.load_adapter(resumed, state)
            return
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)


def _make_up(trainer: QloraTrainer, resumed: Path, checkpointed: CheckpointedState, state: TrainerState) -> None:
    """Takes the samples and the evaluation of the checkpoint's step, if a signal kept the former run from them."""
    evaluates = trainer.is_evaluation_due(state)
    if not evaluates and not checkpointed.are_samples_due(state.global_step):
        return

    trainer.load_adapter(resumed, state)
    checkpointed.take_due_samples(trainer.model, state.global_step, trainer.world)
    if evaluates:
        trainer.evaluate()
        world = trainer.world
        if world.rank == 0:
            state.save_to_json(str(resumed / STATE_NAME))  # TRL's loop takes the history from there
        world.gather_numbers(0)  # on every rank, which all wait until it is there


def _finish(trainer: QloraTrainer, checkpointed: CheckpointedState, *, stopped_early: bool) -> TrainingOutcome:
    """Evaluates the last step if that was not done yet, loads the best adapter, and takes samples of it."""
    state = trainer.state
    if trainer.eval_dataset is not None and not is_evaluated(state):
        trainer.evaluate()
    outcome = summarise_training(state.global_step, state.log_history, checkpointed, stopped_early=stopped_early)

    if checkpointed.best is not None:
        checkpointed.best.load(trainer.model)
    check_trained_adapter(trainer.model, state.global_step)

    if checkpointed.sampler is not None:
        step = state.global_step if outcome.best_step is None else outcome.best_step
        checkpointed.sampler.take(trainer.model, step, trainer.world)
    return outcome
