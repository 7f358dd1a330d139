"""Writes the documents of a run into folders, as artifacts like any other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.judgement import Judgement
from finetune_api.progress import MemoryUse, Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.documents.course import describe_course
from finetune_trainer.documents.event_file import write_event_file
from finetune_trainer.documents.judged_losses import list_losses
from finetune_trainer.documents.loss_plot import render_loss_plot
from finetune_trainer.documents.model_card import PLOT_NAME, CardFacts, write_model_card
from finetune_trainer.documents.resolved import describe_run, write_resolved
from finetune_trainer.model.published_weights import PublishedWeights
from finetune_trainer.training.metrics_log import METRICS_FILE, MetricLine
from finetune_trainer.training.records import LossPoint, SampleLine, write_samples

CARD_NAME = "README.md"
RESOLVED_NAME = "resolved.yaml"


@dataclass(frozen=True)
class RunSummary:
    """Course and figures of a run."""

    metrics: Mapping[str, float]
    history: Sequence[LossPoint] = ()
    """Losses in the order in which they were logged."""
    best_step: int | None = None
    """Step whose adapter is exported, if it is the one with the lowest evaluation loss."""
    memory: MemoryUse | None = None
    samples: Sequence[SampleLine] = ()
    metric_lines: Sequence[MetricLine] = ()
    is_dequantised: bool = False
    """True if the base's weights exist in NF4 only."""
    published: PublishedWeights | None = None
    """The base's weights as they are published; None if that is not known."""
    base_dropout: str | None = None
    """Says which dropout of the base was switched off; None if it has none."""
    judgement: Judgement | None = None
    """None if the published weights were not judged."""
    failed_exports: Sequence[str] = ()
    """What the job asked for and could not be made, each with its cause."""


def write_documents(
    output: Path,
    config: RunConfig,
    resolved: Resolved,
    artifacts: Sequence[LocalArtifact],
    *,
    model_digest: str,
    summary: RunSummary,
) -> list[LocalArtifact]:
    """Writes model card with loss plot, samples, metrics and resolved.yaml below `output`; returns them as artifacts.

    `artifacts` are the ones that the card describes.
    """
    card, configuration = output / "modelcard", output / "configuration"
    card.mkdir(parents=True, exist_ok=True)
    configuration.mkdir(parents=True, exist_ok=True)

    description = describe_run(
        config, resolved, model_digest=model_digest, metrics=summary.metrics, memory=summary.memory
    )
    if summary.history:
        title = f"Loss of {config.job.name}, nats per supervised token"
        (card / PLOT_NAME).write_text(render_loss_plot(title, summary.history, summary.best_step), encoding="utf-8")

    facts = CardFacts(
        config,
        description,
        has_merged=any(artifact.type is ArtifactType.MERGED for artifact in artifacts),
        gguf=[artifact.path.name for artifact in artifacts if artifact.type is ArtifactType.GGUF],
        has_plot=bool(summary.history),
        best_step=summary.best_step,
        samples=summary.samples,
        is_dequantised=summary.is_dequantised,
        published=summary.published,
        base_dropout=summary.base_dropout,
        judged=list_losses(artifacts, summary.judgement),
        warnings=summary.judgement.warnings if summary.judgement else (),
        failed_exports=summary.failed_exports,
        course=describe_course(summary.metric_lines),
    )

    (card / CARD_NAME).write_text(write_model_card(facts), encoding="utf-8")
    (configuration / RESOLVED_NAME).write_text(write_resolved(description), encoding="utf-8")

    return [
        *_write_samples(output / "samples", summary.samples),
        LocalArtifact(ArtifactType.MODEL_CARD, card, "markdown"),
        LocalArtifact(ArtifactType.CONFIGURATION, configuration / RESOLVED_NAME, "yaml"),
        *_write_metrics(output / "metrics", summary.metric_lines, config.job.name),
    ]


def _write_samples(folder: Path, samples: Sequence[SampleLine]) -> list[LocalArtifact]:
    return [LocalArtifact(ArtifactType.SAMPLES, write_samples(folder, samples), "jsonl")] if samples else []


def _write_metrics(folder: Path, lines: Sequence[MetricLine], job: str) -> list[LocalArtifact]:
    """Writes metrics.jsonl, and the same for TensorBoard."""
    if not lines:
        return []

    write_event_file(folder / "tensorboard", lines, job)
    text = "".join(line.model_dump_json(by_alias=True, exclude_none=True) + "\n" for line in lines)
    (folder / METRICS_FILE).write_text(text, encoding="utf-8")
    return [LocalArtifact(ArtifactType.METRICS, folder, "jsonl")]
