"""Losses of the published weights on the same rows, as lines of the model card."""

from collections.abc import Sequence

from finetune_api.judgement import Judgement
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.store import LocalArtifact


def list_losses(artifacts: Sequence[LocalArtifact], judgement: Judgement | None) -> list[str]:
    """Returns a Markdown table: base, adapter, merged weights and every GGUF file; empty if nothing was judged."""
    if judgement is None:
        return []

    # Merged weights are judged whether they are published or not: GGUF files are measured against them.
    rows: list[tuple[str, float | None, float | None]] = [
        ("base", judgement.base_loss, None),
        ("adapter", judgement.adapter_loss, None),
        ("merged", judgement.merged_loss, _kept(artifacts, ArtifactType.MERGED)),
    ]
    rows += [
        (str(each.quantization), each.loss, each.improvement_kept)
        for each in artifacts
        if each.type is ArtifactType.GGUF
    ]

    tokens = f"{judgement.rows} {judgement.data.lower()} rows, {judgement.tokens:,} supervised tokens"
    lines = [f"Loss of the published weights on the same rows ({tokens}):", ""]
    lines += ["| weights | loss | improvement kept |", "|---|---|---|"]
    return [*lines, *(f"| {name} | {_number(loss)} | {_percent(kept)} |" for name, loss, kept in rows), ""]


def _kept(artifacts: Sequence[LocalArtifact], kind: ArtifactType) -> float | None:
    return next((artifact.improvement_kept for artifact in artifacts if artifact.type is kind), None)


def _number(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.4f}"


def _percent(kept: float | None) -> str:
    return "" if kept is None else f"{kept:.0%}"
