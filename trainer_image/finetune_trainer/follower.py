"""A run on several nodes, as every pod but the first has it: it fetches, loads, formats and trains along.

It reports, stores and publishes nothing. It ends when the first pod has done its part, or for one of the causes that
end the whole run.
"""

from dataclasses import dataclass

from finetune_api.failures import FailureReason
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.distributed.group import Group
from finetune_trainer.distributed.nodes.meeting import End, Meeting
from finetune_trainer.distributed.nodes.place import Place
from finetune_trainer.distributed.nodes.same_rows import share_rows
from finetune_trainer.distributed.other_ranks import BaseFiles, OtherRanks
from finetune_trainer.distributed.passes_together import passes_together
from finetune_trainer.distributed.rank_ends import SAME_EVERYWHERE, name_rank
from finetune_trainer.errors import OtherNodeError, RankError, TrainerError
from finetune_trainer.job.outcome import describe_stall, explain
from finetune_trainer.job.run_context import TrainingContext
from finetune_trainer.job.watchdog import Stall, Watchdog
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.data_formatting import DatasetFiles, FormattedData, format_data
from finetune_trainer.stages.fetching import describe_inputs, fetch_base, fetch_evaluation, fetch_rows
from finetune_trainer.stages.model_loading import choose_device, load_base
from finetune_trainer.stages.placement import placement_of, settle_parallelism
from finetune_trainer.stages.training import Prepared, train
from finetune_trainer.stages.training_configuration import configure_training
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.engine import prepare_engine
from finetune_trainer.training.loaded_model import LoadedModel


def follow(context: TrainingContext, place: Place, end: End) -> None:
    """Trains along until the first pod has a result. `end` ends this process, from a thread.

    Raises TrainerError: this pod's own failure, which the first pod is told; OtherNodeError for one of others.
    """
    choose_device(context.config.gpus)
    with Meeting.joined(place, end) as meeting:

        def fail(error: TrainerError) -> None:
            meeting.fail(error)
            end(error)

        part = _Part(context, meeting, fail)
        try:
            part.train_along()
        except BaseException as error:  # noqa: BLE001 (raised again, or told by the first pod)
            _judge(error, part)
        if not meeting.await_end():
            raise OtherNodeError(FailureReason.INTERRUPTED, "the first pod of the run ended without a result")


@dataclass
class _Part:
    """Part of this pod in a run."""

    context: TrainingContext
    meeting: Meeting
    fail: End
    """Ends this process with an error that the first pod is told."""
    is_training: bool = False

    @property
    def group(self) -> Group:
        """This pod's processes among those of the run."""
        return Group(self.context.config.gpus or self.context.settings.cpu_ranks, self.meeting)

    def train_along(self) -> None:
        """Does stages 1 to 5 of the run as the first pod does them. This pod watches over itself until all of them are
        about to train, and the first one from there on."""
        config, settings = self.context.config, self.context.settings
        limit = config.stall
        watchdog = Watchdog(limit, self._end_stalled, is_watched=False) if limit else None
        if watchdog is not None:
            watchdog.start()

        base = fetch_base(self.context)
        config = settle_parallelism(config, base.folder, self.group)
        whole = BaseFiles(folder=base.folder, digest=base.digest, nf4_cache=settings.nf4_cache)
        with OtherRanks.started(config, whole, settings.work, self.group, self.fail) as ranks:
            placement = placement_of(config, base.folder, self.group.first, self.group.size)
            loaded = load_base(whole, config, placement)
            model = inject_adapter(loaded.model, config.adapter, config.training.seed, loaded.new_tokens).model

            source, evaluation = fetch_rows(self.context), fetch_evaluation(self.context)
            files = DatasetFiles(source.files, evaluation.files if evaluation else None)
            data = self._format(loaded, files)
            if watchdog is not None:
                watchdog.close()

            with ranks.joined(data) as world:
                engine = prepare_engine(model, loaded, config, world)
                engine.use_world(world)
                rows = share_rows(world, data, describe_inputs(base, source, evaluation, data))
                evaluates = rows.evaluation is not None
                arguments = configure_training(config, loaded, settings.work / "trl", engine, evaluates=evaluates)

                checkpointed = CheckpointedState.of_rank(config, loaded, rows.evaluation, settings.work)
                self.is_training = True
                prepared = Prepared(model, loaded.tokenizer, rows, engine, arguments)
                train(self.context, prepared, None, checkpointed)
                with passes_together(engine.window, world):
                    pass  # the first pod measures the trained model

    def _end_stalled(self, stall: Stall) -> None:
        self.fail(TrainerError(FailureReason.STALLED, describe_stall(stall)))

    def _format(self, loaded: LoadedModel, files: DatasetFiles) -> FormattedData:
        config = self.context.config
        encoder = ChatEncoder(loaded.tokenizer, config.dataset.train_on, embedding_rows=loaded.embedding_rows)
        return format_data(
            files,
            config.dataset,
            encoder,
            self.context.settings.work / "encoded",
            max_length=config.model.max_sequence_length,
            seed=config.training.seed,
        )


def _judge(error: BaseException, part: _Part) -> None:
    """Raises an error that is this pod's own, once the first pod knows it, and a stop that all have agreed on. Any
    other end that all ranks find at the same step is the first pod's to tell."""
    reason, message = explain(error, part.context.settings.work)
    if not (part.is_training and reason in SAME_EVERYWHERE):
        failure, group = TrainerError(reason, message), part.group
        is_own = part.is_training and not isinstance(error, RankError)
        part.meeting.fail(name_rank(failure, group.first, group.size) if is_own else failure)
        raise error
    if reason is FailureReason.INTERRUPTED:
        raise error  # the first pod stores the checkpoint
