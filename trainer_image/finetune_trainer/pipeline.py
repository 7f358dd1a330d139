"""The whole run, stage by stage: read this file to know what the trainer does."""

from dataclasses import dataclass
from pathlib import Path

from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Stage
from finetune_trainer.artifacts.checkpoints import CheckpointStore, checkpoint_key
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance
from finetune_trainer.documents.write import RunSummary, write_documents
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.job.progress_tracker import ProgressTracker
from finetune_trainer.job.settings import Settings
from finetune_trainer.job.stop_signal import StopSignal
from finetune_trainer.sources import FetchedSource, SourceAccess, fetch_dataset, fetch_model
from finetune_trainer.stages.adapter_injection import inject_adapter
from finetune_trainer.stages.data_formatting import FormattedData, format_data
from finetune_trainer.stages.model_loading import load_model
from finetune_trainer.stages.saving import save_artifacts
from finetune_trainer.stages.training import TrainingOutcome, train
from finetune_trainer.stages.training_configuration import configure_training
from finetune_trainer.storage.object_store import ignore_bytes
from finetune_trainer.training.best_adapter import BestAdapter
from finetune_trainer.training.callback import CheckpointedState
from finetune_trainer.training.engine import prepare_engine
from finetune_trainer.training.loaded_model import LoadedModel
from finetune_trainer.training.samples import Sampler, build_prompts


@dataclass(frozen=True)
class RunContext:
    """What a run works with."""

    config: RunConfig
    settings: Settings
    store: ArtifactStore
    progress: ProgressTracker
    stop_signal: StopSignal


def run(place: RunContext) -> Manifest:
    """Train and publish, beginning in stage ModelLoading.

    Raises TrainerError, InterruptedRunError among them; nothing is published then.
    """
    config, progress, work = place.config, place.progress, place.settings.work

    base = _fetch_model(place)
    loaded = load_model(base.folder, config.model, config.training.precision, gpus=config.gpus)
    progress.resolve(
        model_revision=base.revision,
        architecture=loaded.architecture,
        precision=loaded.precision.value,
        device=loaded.device_name,
    )

    progress.stage(Stage.ADAPTER_INJECTION)
    adapted = inject_adapter(loaded.model, config.adapter, config.training.seed)
    progress.resolve(trainable_parameters=adapted.trainable_parameters, total_parameters=adapted.total_parameters)

    progress.stage(Stage.DATA_FORMATTING)
    source, held_out = _fetch_dataset(place), _fetch_evaluation(place)
    data = _format(place, loaded, source, held_out)

    progress.stage(Stage.TRAINING_CONFIGURATION)
    engine = prepare_engine(adapted.model, loaded, config)
    arguments = configure_training(
        config,
        loaded,
        work / "checkpoints",
        evaluates=data.evaluation is not None,
        recompute=engine.recompute_activations,
        batch=engine.batch,
    )
    progress.resolve(batch_size=engine.batch.size, gradient_accumulation=engine.batch.accumulation)
    checkpoints = _checkpoint_store(place, base, source, held_out)
    checkpointed = _checkpointed_state(config, loaded, data, work)

    progress.stage(Stage.TRAINING)
    outcome = train(
        adapted.model, loaded, data, arguments, engine, progress, checkpoints, place.stop_signal, checkpointed
    )
    progress.resolve(total_steps=outcome.steps)

    progress.stage(Stage.SAVING)
    artifacts = save_artifacts(adapted.model, loaded, base.folder, config, work / "artifacts")
    artifacts += _write_documents(place, base, artifacts, outcome, checkpointed)

    progress.stage(Stage.UPLOADING)
    return _publish(place, artifacts, outcome)


def _format(
    place: RunContext, loaded: LoadedModel, source: FetchedSource, held_out: FetchedSource | None
) -> FormattedData:
    config, progress, work = place.config, place.progress, place.settings.work
    data = format_data(
        source.files,
        config.dataset,
        loaded.tokenizer,
        work / "encoded",
        max_length=config.model.max_sequence_length,
        seed=config.training.seed,
        held_out=held_out.files if held_out else None,
        embedding_rows=loaded.embedding_rows,
    )
    progress.resolve(
        dataset_digest=source.digest,
        dataset_format=data.format.value,
        rows=len(data.train),
        skipped_rows=data.skipped_rows,
        evaluation_rows=len(data.evaluation) if data.evaluation is not None else None,
        evaluation_digest=held_out.digest if held_out else None,
        supervised_tokens=data.supervised_tokens,
    )
    return data


def _checkpointed_state(config: RunConfig, loaded: LoadedModel, data: FormattedData, work: Path) -> CheckpointedState:
    """What goes along with training, as far as the job asks for it."""
    training = config.training
    best = BestAdapter(work, training.early_stopping) if training.keeps_best() else None
    if training.samples is None:
        return CheckpointedState(best)
    limit = config.model.max_sequence_length
    prompts = build_prompts(training.samples, loaded.tokenizer, data.evaluation, limit, loaded.embedding_rows)
    sampler = Sampler(prompts, training.samples, loaded.tokenizer, training.seed, work / "samples")
    return CheckpointedState(best, sampler, training.evaluation_steps)


def _write_documents(
    place: RunContext,
    base: FetchedSource,
    artifacts: list[LocalArtifact],
    outcome: TrainingOutcome,
    checkpointed: CheckpointedState,
) -> list[LocalArtifact]:
    summary = RunSummary(
        metrics=outcome.metrics(),
        history=outcome.history,
        best_step=outcome.best_step,
        memory=place.progress.memory,
        samples=checkpointed.sampler.lines() if checkpointed.sampler else (),
        is_dequantised=open_base_model(base.folder).is_dequantised,
    )
    return write_documents(
        place.settings.work / "artifacts",
        place.config,
        place.progress.resolved,
        artifacts,
        model_digest=base.digest,
        summary=summary,
    )


def _publish(place: RunContext, artifacts: list[LocalArtifact], outcome: TrainingOutcome) -> Manifest:
    total = sum(path.stat().st_size for artifact in artifacts for path in artifact.files)
    place.progress.update(uploaded_bytes=0, upload_total_bytes=total)
    provenance = Provenance(place.progress.resolved, outcome.metrics())
    return place.store.publish(artifacts, provenance, place.progress.add_uploaded)


def _fetch_model(place: RunContext) -> FetchedSource:
    spec = place.config.model
    access = _access(place, "model", place.settings.model_mount)
    return fetch_model(spec.source, spec.revision, place.settings.work / "base", access, ignore_bytes)


def _fetch_dataset(place: RunContext) -> FetchedSource:
    spec = place.config.dataset
    access = _access(place, "dataset", place.settings.dataset_mount)
    return fetch_dataset(spec.source, spec.split, place.settings.work / "data", access, ignore_bytes, spec.subset)


def _fetch_evaluation(place: RunContext) -> FetchedSource | None:
    """Data to evaluate on, read as those to train on."""
    source = place.config.dataset.evaluation_source()
    if source is None:
        return None
    access = _access(place, "dataset", place.settings.dataset_mount)
    subset = place.config.dataset.evaluation_subset()
    return fetch_dataset(*source, place.settings.work / "evaluation", access, ignore_bytes, subset)


def _access(place: RunContext, use: str, mount: Path | None) -> SourceAccess:
    s3 = place.config.output.s3
    return SourceAccess(place.settings.credentials_of(use), s3.endpoint_url, s3.region, mount)


def _checkpoint_store(
    place: RunContext, base: FetchedSource, data: FetchedSource, held_out: FetchedSource | None
) -> CheckpointStore:
    digest = f"{data.digest} {held_out.digest}" if held_out else data.digest
    return CheckpointStore(place.store, checkpoint_key(place.config.spec_digest(), base.digest, digest))
