"""`python -m finetune_trainer.cli.rank TASK.json`: one of the other ranks of a run, started by its rank 0.

It trains along and leaves nothing behind but its part of every step. Its log has errors only: whatever else it would
say, rank 0 says. SIGUSR1 has it write the stacks of all its threads.
"""

import faulthandler
import logging
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

from finetune_trainer.distributed.launched import joined_store
from finetune_trainer.distributed.nodes.same_rows import share_rows
from finetune_trainer.distributed.other_ranks import RankTask, await_ready, connect
from finetune_trainer.distributed.passes_together import passes_together
from finetune_trainer.distributed.rank_ends import SAME_EVERYWHERE, RankFailure, is_lost_connection
from finetune_trainer.errors import TrainerError
from finetune_trainer.job.logging_setup import configure_logging
from finetune_trainer.job.outcome import explain
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.run_context import TrainingContext
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.stages.data_formatting import FormattedData
from finetune_trainer.stopping import finishing

log = logging.getLogger(__name__)

LOST_SECONDS = 60.0


def main() -> None:
    """Runs the rank that the task describes."""
    task = RankTask.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    threading.Thread(target=_end_with_rank_0, name="rank-0", daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    configure_logging(logging.ERROR, task.config.log_format)

    try:
        train_along(task)
    except BaseException as error:  # noqa: BLE001 (whatever it is, rank 0 has to know)
        _fail(task, error)
    os._exit(0)  # a thread still waits for rank 0 to end


def train_along(task: RankTask) -> None:
    """Does stages 1 to 5 of the run as rank 0 does them, without fetching, reporting or storing anything."""
    from finetune_trainer.stages.adapter_injection import inject_adapter
    from finetune_trainer.stages.model_loading import load_base
    from finetune_trainer.stages.placement import placement_of
    from finetune_trainer.stages.training import Prepared, train
    from finetune_trainer.stages.training_configuration import configure_training
    from finetune_trainer.training.checkpointed_state import CheckpointedState
    from finetune_trainer.training.engine import prepare_engine

    config, store = task.config, connect(task)
    training = config.training
    placement = placement_of(config, task.base_model.folder, task.rank, task.size)
    loaded = load_base(task.base_model, config, placement)
    model = inject_adapter(loaded.model, config.adapter, training.seed, loaded.new_tokens).model

    await_ready(store)
    # A stop is begun by the pod's first rank.
    with finishing(), joined_store(store, task.rank, task.size, task.nodes) as world:
        own = pickle.loads(task.rows_file.read_bytes()) if task.nodes > 1 else None  # noqa: S301 (the pod's own file)
        engine = prepare_engine(model, loaded, config, world)
        engine.use_world(world)
        data: FormattedData = share_rows(world, own, None)
        evaluates = data.evaluation is not None
        arguments = configure_training(config, loaded, task.work / "trl", engine, evaluates=evaluates)

        settings = Settings(work=task.work, attempt_id=f"rank-{task.rank}")
        context = TrainingContext(config, settings, ProgressTracker(), StopSignal())
        checkpointed = CheckpointedState.of_rank(config, loaded, data.evaluation, task.work)
        train(context, Prepared(model, loaded.tokenizer, data, engine, arguments), None, checkpointed)
        with passes_together(engine.window, world):
            pass  # rank 0 measures the trained model


def _fail(task: RankTask, error: BaseException) -> None:
    reason, message = explain(error, task.work)
    if reason in SAME_EVERYWHERE:
        os._exit(0)
    if is_lost_connection(error):
        time.sleep(LOST_SECONDS)  # another rank is the cause: rank 0 ends this one, and says which it was

    log.error("rank %d: %s", task.rank, message, exc_info=None if isinstance(error, TrainerError) else error)
    failure = RankFailure(reason=reason, message=message)
    task.failure_file.write_text(failure.model_dump_json(by_alias=True), encoding="utf-8")
    os._exit(1)  # without waiting for the others, who wait for this one


def _end_with_rank_0() -> None:
    while os.read(sys.stdin.fileno(), 1):  # ends when rank 0 does
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
