"""Losses of everything that an export wrote, each read back from its file and decoded by our own decoders."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer.chat.labels import Encoded
from finetune_trainer.export.adapter import open_adapter
from finetune_trainer.export.base_model.folder import BaseModel, open_base_model
from finetune_trainer.export.errors import ExportError
from finetune_trainer.export.judge.streamed_model import StreamedModel
from finetune_trainer.export.judge.weights import Weights

log = logging.getLogger(__name__)
BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Candidates:
    """The weights to judge."""

    base: Path
    """Folder of the base model."""
    adapter: Path | None = None
    merged: Path | None = None
    """Folder of merged weights, if they were written; else base and adapter are merged on the way."""
    gguf: Mapping[str, Path] | None = None
    """GGUF files by type."""


@dataclass(frozen=True)
class Losses:
    """Nats per supervised token, of each on the same rows; NaN where weights cannot be read or compute no number."""

    base: float
    merged: float
    """Equal to `base` if there is no adapter."""
    files: Mapping[str, float]
    """Of the GGUF files, by type."""


def measure_losses(candidates: Candidates, rows: Sequence[Encoded], device: torch.device) -> Losses:
    """Measure base, merged weights and every file on `rows`.

    Raises InvalidBaseError if base or merged weights cannot be read, InterruptedRunError between layers after a signal.
    """
    dtype = choose_dtype(device)
    base = open_base_model(candidates.base, adapter=candidates.adapter)
    model = StreamedModel(base, device, dtype)

    def measure(name: str, weights: Weights) -> float:
        began = time.monotonic()
        loss = model.loss(weights, rows)
        log.info("loss of %s on %d rows: %.4f (%.1f s)", name, len(rows), loss, time.monotonic() - began)
        return loss

    before = after = measure("the base", Weights.of_model(base))
    if candidates.adapter is not None or candidates.merged is not None:
        after = measure("the merged model", _merged_weights(candidates, base))

    files = {}
    for kind, path in (candidates.gguf or {}).items():
        try:
            files[kind] = measure(path.name, Weights.of_gguf(path, base, dtype))
        except ExportError as error:
            log.warning("%s cannot be read back: %s", path.name, error.message)
            files[kind] = math.nan
    return Losses(before, after, files)


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU computes in it, fp32 elsewhere: float16 overflows in some models."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return torch.bfloat16 if capable else torch.float32


def _merged_weights(candidates: Candidates, base: BaseModel) -> Weights:
    if candidates.merged is not None:
        return Weights.of_model(open_base_model(candidates.merged))
    assert candidates.adapter is not None
    return Weights.of_model(base, open_adapter(candidates.adapter, base))
