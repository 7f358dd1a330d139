"""Stage 6: writes the adapter, merged weights and GGUF files to this disk, ready to be published."""

from pathlib import Path
from typing import Any

import torch

from finetune_api.run_config import RunConfig
from finetune_api.spec.sources import Source
from finetune_api.vocabulary import ArtifactType, MergedType
from finetune_kernels.primitives.master_weights import master_weight
from finetune_trainer.artifacts.store import LocalArtifact
from finetune_trainer.export.base_model.companions import Companions, companions_of_training
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.export import ExportRequest, export
from finetune_trainer.export.feasibility import check_export
from finetune_trainer.training.loaded_model import LoadedModel


def save_artifacts(model: Any, loaded: LoadedModel, base: Path, config: RunConfig, output: Path) -> list[LocalArtifact]:
    """Writes every artifact that the job asks for below `output`. Raises ExportError.

    Merged weights and GGUF files are made from the original 16-bit weights in the folder `base`, not from the NF4 ones.
    """
    adapter = output / "adapter"
    # fp32: adapters are small, and merging them later then rounds only once.
    state = {name: value.float() for name, value in _adapter_state(model).items()}
    model.save_pretrained(adapter, safe_serialization=True, state_dict=state, save_embedding_layers=False)
    companions(loaded, base, config).write(adapter, loaded.tokenizer)
    (adapter / "README.md").unlink(missing_ok=True)  # peft's; our model card comes later
    artifacts = [LocalArtifact(ArtifactType.ADAPTER, adapter, "safetensors", "F32")]

    merged = None if config.export.merged is MergedType.NONE else config.export.merged
    types = tuple(kind.value for kind in config.export.gguf)
    # The adapter alone needs no pass over the base weights.
    if merged is None and not types:
        return artifacts

    request = ExportRequest(
        base=base,
        adapter=adapter,
        output=output,
        merged=None if merged is None else merged.value,
        gguf=types,
        name=config.job.name,
        base_name=Source.parse(config.model.source).hub_name,
    )
    files = export(request, device=loaded.device, on_progress=lambda done, total: None)

    if merged is not None:
        artifacts.append(LocalArtifact(ArtifactType.MERGED, output / "merged", "safetensors", merged.value))
    for file in files:
        if file.modelfile is not None:
            artifacts.append(LocalArtifact(ArtifactType.GGUF, file.path, "gguf", file.type))
            artifacts.append(LocalArtifact(ArtifactType.MODELFILE, file.modelfile, "modelfile", file.type))
    return artifacts


def check_saving(model: Any, loaded: LoadedModel, base: Path, config: RunConfig, work: Path) -> None:
    """Raises ExportError before training if the artifacts that the job asks for could not be made after it.

    The tokenizer's files are written below `work`, as they will lie beside the adapter.
    """
    companions(loaded, base, config).write(work, loaded.tokenizer)
    check_export(config.export, base, TokenizerFiles(work), model)


def companions(loaded: LoadedModel, base: Path, config: RunConfig) -> Companions:
    """The files that lie beside the adapter, in checkpoints too."""
    return companions_of_training(base, loaded.tokenizer, has_own_template=config.model.has_own_template())


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that train, with their master weights, in host memory."""
    return {
        name: master_weight(value).detach().cpu() for name, value in model.named_parameters() if value.requires_grad
    }
