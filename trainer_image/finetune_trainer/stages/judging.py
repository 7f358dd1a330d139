"""Judges what stage 6 saved: the loss of every published file beside those of the base and of the trained model.

A file that lost the training is published all the same, with a warning: the adapter is good, and the file may be what
somebody wants. Nothing that goes wrong here costs the training; whatever could not be judged is said.
"""

import gc
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune_api.judgement import MAX_WARNING_CHARACTERS, Judgement
from finetune_api.spec.output import ExportSpec
from finetune_api.vocabulary import ArtifactType, JudgedRows, MergedType
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.chat.labels import Encoded
from finetune_trainer.distributed.passes_together import passes_together
from finetune_trainer.export.base_model.folder import open_base_model
from finetune_trainer.export.errors import ExportError
from finetune_trainer.export.gguf.families.table import is_read_back
from finetune_trainer.export.judge.measure import Candidates, Losses, measure_losses
from finetune_trainer.export.judge.rows import choose_rows
from finetune_trainer.export.judge.verdict import improvement_kept, warn_of_files, warn_of_merged
from finetune_trainer.stages.data_formatting import FormattedData
from finetune_trainer.stopping import raise_if_requested
from finetune_trainer.training.collator import COLLATORS
from finetune_trainer.training.engine import Engine

log = logging.getLogger(__name__)
DEFECTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""Errors of defects, of torch's kinds: the training is worth more than its judgement."""


@dataclass(frozen=True)
class Trained:
    """The model as it was trained, still in memory."""

    model: Any
    """peft's PeftModel, with the engine's kernels in it."""
    engine: Engine
    device: torch.device
    loss: float | None = None
    """Its loss on the rows to judge by, if it was measured while the other ranks were there."""


@dataclass(frozen=True)
class Judged:
    """The artifacts with their losses, and what those are measured against."""

    artifacts: list[LocalArtifact]
    judgement: Judgement | None = None
    """None if nothing was judged."""


def measure_sharded(trained: Trained, export: ExportSpec, data: FormattedData) -> Trained:
    """Returns `trained` with its loss, if the ranks share the base out: it can be computed only while all are there,
    which take part in `passes_together`. Without a file to judge, and where that fails, it stays as it is."""
    if trained.engine.window is None:
        return trained

    with passes_together(trained.engine.window, trained.engine.world):
        if export.merged is MergedType.NONE and not export.gguf:
            return trained
        try:
            return replace(trained, loss=loss_in_memory(trained, _rows(data, trained.device)))
        except (torch.OutOfMemoryError, *DEFECTS) as error:
            log.warning("the loss of the trained model is not known: %s", type(error).__name__, exc_info=error)
            return trained


def judge_artifacts(
    artifacts: list[LocalArtifact],
    base: Path,
    data: FormattedData,
    trained: Trained,
) -> Judged:
    """Measures merged weights and GGUF files among `artifacts` on evaluation rows, or on training rows without any.

    An adapter alone is not judged: it is what was trained. Raises InterruptedRunError between layers, after a signal.
    """
    candidates = _find_candidates(artifacts, base)
    if candidates.merged is None and not candidates.gguf:
        return Judged(artifacts)
    if not is_read_back(open_base_model(base).full_config):
        log.info("the merged weights are not judged: only families whose GGUF files can be read back are")
        return Judged(artifacts)

    if trained.loss is None and trained.engine.window is not None:
        log.warning("the published weights are not judged: the loss of the trained model is not known")
        return Judged(artifacts)

    began, rows = time.monotonic(), _rows(data, trained.device)
    try:
        adapter_loss = loss_in_memory(trained, rows) if trained.loss is None else trained.loss
        gc.collect()
        torch.cuda.empty_cache()  # nothing on a CPU
        losses = measure_losses(candidates, rows, trained.device)
    except torch.OutOfMemoryError:
        log.warning("the published weights are not judged: a layer of the model does not fit beside the trained one")
        return Judged(artifacts)
    except ExportError as error:
        log.warning("the published weights are not judged: %s", error.message)
        return Judged(artifacts)
    except DEFECTS as error:
        log.warning("the published weights are not judged: %s", type(error).__name__, exc_info=error)
        return Judged(artifacts)

    if not math.isfinite(losses.base):
        log.warning("the published weights are not judged: the base model itself computes no number on these rows")
        return Judged(artifacts)
    kind = JudgedRows.TRAINING if data.evaluation is None else JudgedRows.EVALUATION
    judgement = _judge(losses, adapter_loss, rows, kind)
    for warning in judgement.warnings:
        log.warning("%s", warning)
    log.info("judging took %.1f s", time.monotonic() - began)
    return Judged([_with_loss(artifact, losses, adapter_loss) for artifact in artifacts], judgement)


@torch.no_grad()
def loss_in_memory(trained: Trained, rows: Sequence[Encoded]) -> float:
    """Nats per supervised token of the model as it was trained, over all `rows`, each computed alone."""
    was_training = trained.model.training
    trained.model.eval()
    total, count = 0.0, 0
    # As the trainer's own evaluation: fused layers take rows in one form only.
    collate = COLLATORS[trained.engine.batching.kind]

    try:
        for row in rows:
            made = collate([{"input_ids": row.input_ids, "labels": row.labels}]).items()
            batch = {name: each.to(trained.device) if isinstance(each, torch.Tensor) else each for name, each in made}
            labels, positions = batch.pop("labels"), batch.pop("supervised")
            total += trained.engine.loss(trained.model, batch, labels, positions, 1).item()
            count += positions.numel()
            raise_if_requested()
    finally:
        trained.model.train(was_training)
    return total / count


def _rows(data: FormattedData, device: torch.device) -> Sequence[Encoded]:
    """The rows to judge by: of the evaluation, if there is one."""
    return choose_rows(data.train if data.evaluation is None else data.evaluation, device)


def _find_candidates(artifacts: Sequence[LocalArtifact], base: Path) -> Candidates:
    folders = {artifact.type: artifact.path for artifact in artifacts}
    files = {str(each.quantization): each.path for each in artifacts if each.type is ArtifactType.GGUF}
    return Candidates(base, folders.get(ArtifactType.ADAPTER), folders.get(ArtifactType.MERGED), files)


def _judge(losses: Losses, adapter_loss: float, rows: Sequence[Encoded], data: JudgedRows) -> Judgement:
    where = f"{len(rows)} {data.value.lower()} rows"
    warnings = [
        warn_of_merged(losses.base, adapter_loss, losses.merged, where),
        warn_of_files(losses.base, losses.merged, losses.files, where),
    ]

    return Judgement(
        data=data,
        rows=len(rows),
        tokens=sum(row.supervised for row in rows),
        base_loss=round(losses.base, 4),
        adapter_loss=_rounded(adapter_loss),
        merged_loss=_rounded(losses.merged),
        warnings=tuple(text[:MAX_WARNING_CHARACTERS] for text in warnings if text),
    )


def _with_loss(artifact: LocalArtifact, losses: Losses, adapter_loss: float) -> LocalArtifact:
    """The artifact with its loss, if it has weights that were judged; a loss that is no number is left out."""
    found = {ArtifactType.ADAPTER: adapter_loss, ArtifactType.MERGED: losses.merged}.get(artifact.type)
    if artifact.type is ArtifactType.GGUF:
        found = losses.files[str(artifact.quantization)]
    if found is None or not math.isfinite(found):
        return artifact

    trained = losses.merged if artifact.type is ArtifactType.GGUF else adapter_loss
    return replace(artifact, loss=_rounded(found), improvement_kept=improvement_kept(losses.base, trained, found))


def _rounded(loss: float) -> float | None:
    """The loss to 4 decimals; None for NaN and infinity, which JSON does not have."""
    return round(loss, 4) if math.isfinite(loss) else None
