"""Write the documents into folders, as artifacts like any other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.documents.loss_plot import LossPoint, render_loss_plot
from finetune_trainer.documents.model_card import PLOT_NAME, CardFacts, write_model_card
from finetune_trainer.documents.resolved import describe_run, write_resolved

CARD_NAME = "README.md"
RESOLVED_NAME = "resolved.yaml"


def write_documents(
    output: Path,
    config: RunConfig,
    resolved: Resolved,
    artifacts: Sequence[LocalArtifact],
    *,
    model_digest: str,
    metrics: Mapping[str, float],
    history: Sequence[LossPoint],
) -> list[LocalArtifact]:
    """Card with plot, and resolved.yaml, below `output`. `artifacts` are those that the card speaks of."""
    card, configuration = output / "modelcard", output / "configuration"
    card.mkdir(parents=True, exist_ok=True)
    configuration.mkdir(parents=True, exist_ok=True)
    description = describe_run(config, resolved, model_digest=model_digest, metrics=metrics)
    if history:
        plot = render_loss_plot(f"Loss of {config.job.name}, nats per supervised token", history)
        (card / PLOT_NAME).write_text(plot, encoding="utf-8")
    facts = CardFacts(
        config,
        description,
        has_merged=any(artifact.type is ArtifactType.MERGED for artifact in artifacts),
        gguf=[artifact.path.name for artifact in artifacts if artifact.type is ArtifactType.GGUF],
        has_plot=bool(history),
    )
    (card / CARD_NAME).write_text(write_model_card(facts), encoding="utf-8")
    (configuration / RESOLVED_NAME).write_text(write_resolved(description), encoding="utf-8")
    return [
        LocalArtifact(ArtifactType.MODEL_CARD, card, "markdown"),
        LocalArtifact(ArtifactType.CONFIGURATION, configuration / RESOLVED_NAME, "yaml"),
    ]
