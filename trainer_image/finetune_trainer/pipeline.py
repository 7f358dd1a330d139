"""The whole run, stage by stage: read this file to know what the trainer does."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from trl.trainer.sft_config import SFTConfig

from finetune_api.cost.energy import JOULES_PER_WATT_HOUR
from finetune_api.failures import FailureReason
from finetune_api.outcome import FailedExport
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Parallelism, Stage
from finetune_trainer.artifacts.checkpoints import CheckpointStore, checkpoint_key
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.artifacts.store import LocalArtifact, Provenance
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.distributed.group import Group
from finetune_trainer.distributed.nodes.meeting import Meeting
from finetune_trainer.distributed.nodes.same_rows import share_rows
from finetune_trainer.distributed.other_ranks import BaseFiles, OtherRanks
from finetune_trainer.documents.write import RunSummary, write_documents
from finetune_trainer.errors import TrainerError
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import ExportError
from finetune_trainer.job.disk_needs import DiskNeed, JobSize, describe_lack, plan_disk
from finetune_trainer.job.run_context import RunContext
from finetune_trainer.model.base_models import find_base_model_sign
from finetune_trainer.model.configuration.dropout import describe_dropout, dropout_rates
from finetune_trainer.model.configuration.reading import read_published_config
from finetune_trainer.model.published_weights import PublishedWeights, published_below
from finetune_trainer.sources import FetchedSource
from finetune_trainer.stages.adapter_injection import AdaptedModel, inject_adapter
from finetune_trainer.stages.data_formatting import DatasetFiles, FormattedData, format_data
from finetune_trainer.stages.fetching import describe_inputs, fetch_base, fetch_evaluation, fetch_rows
from finetune_trainer.stages.judging import Judged, Trained, judge_artifacts, measure_sharded
from finetune_trainer.stages.model_loading import choose_device, load_base
from finetune_trainer.stages.placement import placement_of, settle_parallelism
from finetune_trainer.stages.saving import check_saving, companions, save_artifacts
from finetune_trainer.stages.training import Prepared, train
from finetune_trainer.stages.training_configuration import configure_training
from finetune_trainer.storage.disk_faults import free_disk
from finetune_trainer.training.batching.cost import describe_batching
from finetune_trainer.training.checkpointed_state import CheckpointedState
from finetune_trainer.training.engine import Engine, prepare_engine
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.metrics_log import MetricsLog
from finetune_trainer.training.outcome import TrainingOutcome

log = logging.getLogger(__name__)


def run(context: RunContext) -> Manifest:
    """Trains and publishes; the caller has begun stage ModelLoading.

    Raises TrainerError, also as InterruptedRunError; nothing is published then.
    """
    config, settings = context.config, context.settings

    choose_device(config.gpus)  # before anything is downloaded
    local = config.gpus or settings.cpu_ranks
    place = settings.place_among(config.nodes)
    if place is None:
        if config.nodes > 1:
            log.warning("spec.resources.nodes is %d, and this run has one machine: it trains every step", config.nodes)
        return _run_here(context, Group(local))
    with Meeting.opened(place, context.end) as meeting:  # before anything is downloaded, too
        return _run_here(context, Group(local, meeting))


def _run_here(context: RunContext, group: Group) -> Manifest:
    base = fetch_base(context)
    settled = settle_parallelism(context.config, base.folder, group)
    files = BaseFiles(folder=base.folder, digest=base.digest, nf4_cache=context.settings.nf4_cache)
    with OtherRanks.started(settled, files, context.settings.work, group, context.end) as ranks:
        placement = placement_of(settled, base.folder, group.first, group.size)
        return _run(context, base, load_base(files, context.config, placement, makes_copy=True), ranks)


def _run(context: RunContext, base: FetchedSource, loaded: LoadedModel, ranks: OtherRanks) -> Manifest:
    """Runs rank 0 on a base model that is loaded."""
    config, progress, work = context.config, context.progress, context.settings.work
    _report_model(context, base, loaded)

    progress.stage(Stage.ADAPTER_INJECTION)
    adapted = inject_adapter(loaded.model, config.adapter, config.training.seed, loaded.new_tokens)
    _report_adapter(context, adapted)
    published = published_below(base.folder)
    progress.disk_needs = _plan_disk(config, adapted, published)
    check_saving(adapted.model, loaded, base.folder, config, work / "tokenizer")

    progress.stage(Stage.DATA_FORMATTING)
    source, evaluation = fetch_rows(context), fetch_evaluation(context)
    data = _format(context, loaded, source, evaluation)

    progress.stage(Stage.TRAINING_CONFIGURATION)
    checkpoints = _checkpoint_store(context, base, source, evaluation)
    checkpointed = _checkpointed_state(context, base, loaded, data)

    _check_disk(context)

    sign = find_base_model_sign(base.folder, config.model.source)
    with ranks.joined(data) as world:
        engine = prepare_engine(adapted.model, loaded, config, world)
        engine.use_world(world)
        rows = share_rows(world, data, describe_inputs(base, source, evaluation, data))
        arguments = _configure(context, loaded, rows, engine)
        progress.stage(Stage.TRAINING)
        prepared = Prepared(adapted.model, loaded.tokenizer, data, engine, arguments, sign)
        outcome = _with_usage(context, train(context, prepared, checkpoints, checkpointed))
        trained = measure_sharded(Trained(adapted.model, engine, loaded.device), config.export, data)
    if Meeting.running is not None:
        Meeting.running.ignore_losses()
    progress.resolve(total_steps=outcome.steps)

    progress.stage(Stage.SAVING)
    output = work / "artifacts"
    saved = save_artifacts(adapted.model, loaded, base.folder, config, output, progress.disk_needs)
    judged = judge_artifacts(saved.artifacts, base.folder, data, trained)
    documents = _write_documents(context, base, judged, outcome, checkpointed, saved.failed)

    progress.stage(Stage.UPLOADING)
    provenance = Provenance(progress.resolved, outcome.metrics(), judged.judgement, saved.failed, base.version)
    manifest = _publish(context, [*judged.artifacts, *documents], provenance)
    # After a failed export the same job goes on from the last one, with other exports.
    if not config.keep_checkpoints_after_success and not saved.failed:
        checkpoints.remove_all()
    return manifest


def _report_model(context: RunContext, base: FetchedSource, loaded: LoadedModel) -> None:
    context.progress.resolve(
        model_revision=base.revision,
        architecture=loaded.architecture,
        precision=loaded.precision.value,
        device=loaded.device_name,
        base_bytes_per_process=loaded.base_bytes,
    )
    if loaded.new_tokens:
        context.progress.resolve(new_tokens=len(loaded.new_tokens), embedding_rows=loaded.embedding_rows)


def _report_adapter(context: RunContext, adapted: AdaptedModel) -> None:
    context.progress.resolve(
        trainable_parameters=adapted.trainable_parameters,
        total_parameters=adapted.total_parameters,
        expert_rank=adapted.expert_rank,
        adapted_share=round(adapted.coverage.adapted_share, 4),
        quantized_share=round(adapted.coverage.quantized_share, 4),
    )


def _format(
    context: RunContext, loaded: LoadedModel, source: FetchedSource, evaluation: FetchedSource | None
) -> FormattedData:
    config = context.config
    encoder = ChatEncoder(loaded.tokenizer, config.dataset.train_on, embedding_rows=loaded.embedding_rows)
    data = format_data(
        DatasetFiles(source.files, evaluation.files if evaluation else None),
        config.dataset,
        encoder,
        context.settings.work / "encoded",
        max_length=config.model.max_sequence_length,
        seed=config.training.seed,
    )

    context.progress.resolve(
        dataset_digest=source.digest,
        dataset_format=data.format.value,
        rows=len(data.train),
        skipped_rows=data.skipped_rows,
        evaluation_rows=len(data.evaluation) if data.evaluation is not None else None,
        evaluation_digest=evaluation.digest if evaluation else None,
        supervised_tokens=data.supervised_tokens,
    )
    return data


def _configure(context: RunContext, loaded: LoadedModel, data: FormattedData, engine: Engine) -> SFTConfig:
    arguments = configure_training(
        context.config,
        loaded,
        context.settings.work / "checkpoints",
        engine,
        evaluates=data.evaluation is not None,
    )
    context.progress.resolve(batch_size=engine.batch.size, gradient_accumulation=engine.batch.accumulation)

    if not engine.world.is_alone:
        parallelism = Parallelism.REPLICATED if engine.window is None else Parallelism.SHARDED
        context.progress.resolve(world_size=engine.world.size, parallelism=parallelism)
    seed = context.config.training.seed
    context.progress.resolve(**describe_batching(engine.batching, engine.batch, data.train, seed))
    return arguments


def _plan_disk(config: RunConfig, adapted: AdaptedModel, published: PublishedWeights) -> tuple[DiskNeed, ...]:
    """Sizes of what is still to be written, beside the rows."""
    parameters = adapted.total_parameters - adapted.trainable_parameters
    return plan_disk(config, JobSize(parameters, adapted.published_parameters, copied_bytes=published.copied_bytes))


def _check_disk(context: RunContext) -> None:
    """Raises TrainerError (DiskFull) if what is still to be written does not fit: now, not after the training."""
    have = free_disk(context.settings.work, context.config.ephemeral_storage_bytes)
    if (lack := describe_lack(context.progress.disk_needs, have)) is not None:
        raise TrainerError(FailureReason.DISK_FULL, f"{lack} left in {context.settings.work}")


def _checkpoint_store(
    context: RunContext, base: FetchedSource, data: FetchedSource, evaluation: FetchedSource | None
) -> CheckpointStore:
    """Checkpoints of this job, training, model and data; those of any other are never resumed from."""
    config, digest = context.config, f"{data.digest} {evaluation.digest}" if evaluation else data.digest
    key = checkpoint_key(config.job.path, config.training_digest(), base.digest, digest)
    return CheckpointStore(context.store, key)


def _checkpointed_state(
    context: RunContext, base: FetchedSource, loaded: LoadedModel, data: FormattedData
) -> CheckpointedState:
    """The best adapter and the sampler, as far as the job asks for them, the metrics, and what lies beside adapters."""
    config, work = context.config, context.settings.work
    beside = companions(loaded, base.folder, config)
    return replace(
        CheckpointedState.of_rank(config, loaded, data.evaluation, work),
        metrics=MetricsLog(work / "metrics"),
        write_companions=partial(beside.write, tokenizer=loaded.tokenizer),
    )


def _with_usage(context: RunContext, outcome: TrainingOutcome) -> TrainingOutcome:
    """Adds what this pod's GPUs have been held for and have taken, up to now."""
    seconds, joules, config = context.progress.seconds, context.progress.energy_joules, context.config
    gpus = config.gpus * (config.nodes if context.settings.rendezvous else 1)
    return replace(
        outcome,
        gpu_seconds=round(seconds * gpus) if gpus else None,
        energy_watt_hours=None if joules is None else round(joules / JOULES_PER_WATT_HOUR, 3),
    )


def _write_documents(
    context: RunContext,
    base: FetchedSource,
    judged: Judged,
    outcome: TrainingOutcome,
    checkpointed: CheckpointedState,
    failed: Sequence[FailedExport],
) -> list[LocalArtifact]:
    """Writes the model card and what it shows; returns them as artifacts."""
    summary = RunSummary(
        metrics=outcome.metrics(),
        history=outcome.history,
        best_step=outcome.best_step,
        memory=context.progress.memory,
        samples=checkpointed.sampler.lines() if checkpointed.sampler else (),
        metric_lines=checkpointed.metrics.lines() if checkpointed.metrics else (),
        is_dequantised=_is_dequantised(base.folder),
        published=published_below(base.folder),
        base_dropout=describe_dropout(dropout_rates(read_published_config(base.folder))),
        judgement=judged.judgement,
        failed_exports=[f"{export.type} {export.quantization}: {export.message}" for export in failed],
    )
    return write_documents(
        context.settings.work / "artifacts",
        context.config,
        context.progress.resolved,
        judged.artifacts,
        model_digest=base.digest,
        summary=summary,
    )


def _is_dequantised(base: Path) -> bool:
    """True if the base exists in NF4 only. An adapter alone may have been trained on weights that no export reads."""
    try:
        return open_base_model(base).is_dequantised
    except ExportError:
        return False


def _publish(context: RunContext, artifacts: list[LocalArtifact], provenance: Provenance) -> Manifest:
    """Uploads everything, the manifest last: it is the commit point."""
    total = sum(path.stat().st_size for artifact in artifacts for path in artifact.files)
    context.progress.update(uploaded_bytes=0, upload_total_bytes=total)
    return context.store.publish(artifacts, provenance, context.progress.add_uploaded)
