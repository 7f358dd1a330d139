"""Stage 6: writes the adapter, merged weights and GGUF files to this disk, ready to be published."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune_api.outcome import MAX_EXPORT_MESSAGE, FailedExport
from finetune_api.run_config import RunConfig
from finetune_api.spec.sources import Source
from finetune_api.vocabulary import ArtifactType, MergedType
from finetune_kernels.primitives.master_weights import master_weight
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.export.base_model.adapter_names import publish_names
from finetune_trainer.export.base_model.companions import Companions, companions_of_training
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.expert_adapters import publish_experts
from finetune_trainer.export.export import ExportedFile, ExportRequest, export
from finetune_trainer.export.feasibility import check_export
from finetune_trainer.job.disk_needs import DiskNeed
from finetune_trainer.job.outcome import explain
from finetune_trainer.model.description import read_written_config
from finetune_trainer.model.multimodal import is_multimodal
from finetune_trainer.training.gradients import trainable_weights
from finetune_trainer.training.loaded_model import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """Artifacts on this disk, and those that could not be made."""

    artifacts: list[LocalArtifact]
    failed: tuple[FailedExport, ...] = ()


def save_artifacts(
    model: Any, loaded: LoadedModel, base: Path, config: RunConfig, output: Path, needs: Sequence[DiskNeed] = ()
) -> Saved:
    """Writes every artifact that the job asks for below `output`. An export that fails costs no other artifact.

    Merged weights and GGUF files are made from the original 16-bit weights in the folder `base`, not from the NF4 ones.
    `needs` are what the job writes to that disk, for the message if it is full.
    """
    adapter = output / "adapter"
    # fp32: adapters are small, and merging them later then rounds only once.
    state = {name: value.float() for name, value in _adapter_state(model).items()}
    model.save_pretrained(adapter, safe_serialization=True, state_dict=state, save_embedding_layers=False)
    publish_experts(adapter, model)
    written = read_written_config(base)
    if is_multimodal(written):
        publish_names(adapter, base, written["model_type"])
    companions(loaded, base, config).write(adapter, loaded.tokenizer)
    (adapter / "README.md").unlink(missing_ok=True)  # peft's; our model card comes later
    artifacts = [LocalArtifact(ArtifactType.ADAPTER, adapter, "safetensors", "F32")]

    merged = None if config.export.merged is MergedType.NONE else config.export.merged
    types = tuple(kind.value for kind in config.export.gguf)
    # The adapter alone needs no pass over the base weights.
    if merged is None and not types:
        return Saved(artifacts)

    request = ExportRequest(
        base=base,
        adapter=adapter,
        output=output,
        merged=None if merged is None else merged.value,
        gguf=types,
        name=config.job.name,
        base_name=Source.parse(config.model.source).hub_name,
    )
    files, failed = export_what_works(request, loaded.device, needs)

    if merged is not None and any(file.kind == "merged" for file in files):
        artifacts.append(LocalArtifact(ArtifactType.MERGED, output / "merged", "safetensors", merged.value))
    for file in files:
        if file.modelfile is not None:
            artifacts.append(LocalArtifact(ArtifactType.GGUF, file.path, "gguf", file.type))
            artifacts.append(LocalArtifact(ArtifactType.MODELFILE, file.modelfile, "modelfile", file.type))
    return Saved(artifacts, tuple(failed))


def export_what_works(
    request: ExportRequest, device: torch.device, needs: Sequence[DiskNeed]
) -> tuple[list[ExportedFile], list[FailedExport]]:
    """Makes all outputs in one pass; if that fails, each by itself. Raises InterruptedRunError only."""
    try:
        return export(request, device=device, on_progress=lambda done, total: None), []
    except InterruptedRunError:
        raise
    except Exception as error:  # noqa: BLE001 (the training is finished: whatever goes wrong here must not cost it)
        parts = _single_outputs(request)
        if len(parts) == 1:
            return [], [_failed_export(parts[0], error, needs)]

    files: list[ExportedFile] = []
    failed: list[FailedExport] = []
    for part in parts:
        made, missing = export_what_works(part, device, needs)
        files += made
        failed += missing
    return files, failed


def _single_outputs(request: ExportRequest) -> list[ExportRequest]:
    """One request for each output."""
    merged = [replace(request, gguf=())] if request.merged is not None else []
    return merged + [replace(request, merged=None, gguf=(kind,)) for kind in request.gguf]


def _failed_export(request: ExportRequest, error: Exception, needs: Sequence[DiskNeed]) -> FailedExport:
    """The failure of a single output; a defect is logged with its traceback."""
    kind = ArtifactType.MERGED if request.merged is not None else ArtifactType.GGUF
    quantization = request.merged or request.gguf[0]
    _, message = explain(error, request.output, needs)
    traceback = None if isinstance(error, TrainerError) else error
    log.error("%s %s could not be made: %s", kind.value, quantization, message, exc_info=traceback)
    return FailedExport(type=kind, quantization=quantization, message=message[:MAX_EXPORT_MESSAGE])


def check_saving(model: Any, loaded: LoadedModel, base: Path, config: RunConfig, work: Path) -> None:
    """Raises ExportError before training if the artifacts that the job asks for could not be made after it.

    The tokenizer's files are written below `work`, as they will lie beside the adapter.
    """
    companions(loaded, base, config).write(work, loaded.tokenizer)
    check_export(config.export, base, TokenizerFiles(work), model)


def companions(loaded: LoadedModel, base: Path, config: RunConfig) -> Companions:
    """The files that lie beside the adapter, in checkpoints too."""
    return companions_of_training(base, loaded.tokenizer, config.model)


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that train, with their master weights, in host memory."""
    return {name: master_weight(weight).detach().cpu() for name, weight in trainable_weights(model)}
