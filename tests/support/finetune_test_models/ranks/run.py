"""One process of training runs: stages 1 to 5 without a cluster. Rank 0 writes what it logged.

    python -P -m torch.distributed.run --standalone --nproc-per-node 2 -m finetune_test_models.ranks.run \\
        CONFIG.json WORK OUT.json QloraTrainer [FAULT ...]

CONFIG.json: a RunConfig. Without torchrun it is a run of one process. It is run once with each trainer that is named:
ours, and those of FAULTS, which do what a wrong reduction would do. OUT.json: for each name, what `run` returns, or
{"error": message} of a run that has failed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from finetune_api.run_config import RunConfig
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.distributed.launched import joined_world
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.data_formatting import DatasetFiles, format_data
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.placement import placement_of
from finetune_trainer.stages.training_configuration import configure_training
from finetune_trainer.training.callback import RunCallback
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.engine import prepare_engine
from finetune_trainer.training.qlora_trainer import QloraTrainer


class NoTokenWeights(QloraTrainer):
    """Divides a rank's loss by its own tokens, and takes the mean over ranks: the mean of means."""

    def _get_num_items_in_batch(self, *arguments: Any, **options: Any) -> Any:
        own: Any = super(QloraTrainer, self)._get_num_items_in_batch(*arguments, **options)
        return own.clamp(min=1) * self.world.size  # a rank may be empty in the last step


class UnequalStart(QloraTrainer):
    """Leaves every rank the adapter that it began with."""

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        return super(QloraTrainer, self).create_optimizer(*arguments, **options)


FAULTS: tuple[type[QloraTrainer], ...] = (NoTokenWeights, UnequalStart)
TRAINERS: dict[str, type[QloraTrainer]] = {"QloraTrainer": QloraTrainer} | {kind.__name__: kind for kind in FAULTS}


def run(config: RunConfig, work: Path, world: World, trainer_type: type[QloraTrainer]) -> dict[str, Any]:
    """Trains this rank's share and evaluates.

    Returns {"losses": {"step": loss}, "evaluations": {...}, "norms": {...}, "seconds": s, "tokens": t of this rank}.
    """
    # Ranks that begin with unlike adapters, as other seeds would give them, must end alike all the same.
    training = config.training
    source = Path(config.model.source.removeprefix("file://"))
    placement = placement_of(config, source, world.rank, world.size)
    loaded = load_model(source, config.model, training.precision, gpus=config.gpus, placement=placement)
    model: Any = inject_adapter(loaded.model, config.adapter, training.seed + world.rank, loaded.new_tokens).model
    encoder = ChatEncoder(loaded.tokenizer, config.dataset.train_on, embedding_rows=loaded.embedding_rows)
    files = DatasetFiles((Path(config.dataset.source.removeprefix("file://")),))
    limit = config.model.max_sequence_length
    data = format_data(files, config.dataset, encoder, work, max_length=limit, seed=training.seed)

    engine = prepare_engine(model, loaded, config, world)
    engine.use_world(world)
    evaluates = data.evaluation is not None
    arguments = configure_training(config, loaded, work / "trl", engine, evaluates=evaluates)
    callback = RunCallback(ProgressTracker(), None, StopSignal(), CheckpointedState(), engine)
    trainer = trainer_type(
        model=model,
        engine=engine,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=loaded.tokenizer,
        callback=callback,
    )

    begin = time.monotonic()
    trainer.train()
    return _logged(trainer) | {"seconds": time.monotonic() - begin, "tokens": callback.trained_tokens}


def _logged(trainer: QloraTrainer) -> dict[str, Any]:
    names = {"losses": "loss", "evaluations": "eval_loss", "norms": "grad_norm"}
    history = trainer.state.log_history
    return {
        name: {str(entry["step"]): float(entry[key]) for entry in history if key in entry}
        for name, key in names.items()
    }


def main(arguments: list[str]) -> None:
    """Runs the process that the command line describes."""
    config_file, work, out, *names = arguments
    config = RunConfig.model_validate_json(Path(config_file).read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}

    with joined_world() as world:
        for name in names:
            folder = Path(work) / name / str(world.rank)
            folder.mkdir(parents=True)
            try:
                found[name] = run(config, folder, world, TRAINERS[name])
            except TrainerError as error:
                found[name] = {"error": error.message}
        if world.rank == 0:
            Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
