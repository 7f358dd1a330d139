"""A peft LoRA adapter, and what the weights are with it: W' = W + scale * B A, in fp32.

    scale = alpha / r           LoRA
    scale = alpha / sqrt(r)     rsLoRA
    W' = m * (W + scale * B A) / |W + scale * B A|      DoRA, with the norm of each row

Full copies of a module (`modules_to_save`) replace the base's weights. What a merge cannot express is refused: a
wrong model that loads is worse than none.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.export.base_model.folder import BaseModel
from finetune_trainer.export.errors import InvalidAdapterError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor, list_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")
# Settings whose effect on the forward pass is not W + scale * B A.
_NOT_MERGEABLE = (
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
)
# Initialisations that change the base model in memory: the adapter is a difference to weights we do not have.
_BASE_CHANGING = ("loftq", "pissa", "olora", "corda", "lora_ga")


@dataclass
class _Update:
    """What the adapter holds for one weight matrix."""

    parts: dict[str, StoredTensor] = field(default_factory=dict)
    replacement: StoredTensor | None = None


class LoraWeights:
    """An adapter matched to a base; nothing but headers is read before `merge`."""

    def __init__(self, config: Mapping[str, Any], updates: dict[str, _Update]) -> None:
        self._config = config
        self._updates = updates

    def merge(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The weights of tensor `name` with the adapter: fp32 on the same device, or as they are where the adapter
        does not change them."""
        update = self._updates.get(name)
        if update is None:
            return weights
        weights = weights.to(torch.float32)
        if update.replacement is not None:
            weights = _load(update.replacement, weights)
        if not update.parts:
            return weights
        parts = {kind: _load(stored, weights) for kind, stored in update.parts.items()}
        if "lora_embedding_A" in parts:
            down, up = parts["lora_embedding_B"], parts["lora_embedding_A"]  # rows of the embedding are its inputs
            return torch.addmm(weights, up.T, down.T, alpha=self._scale(name, rank=up.shape[0]))
        down, up = parts["lora_A"], parts["lora_B"]  # [r, in], [out, r]
        merged = torch.addmm(weights, up, down, alpha=self._scale(name, rank=down.shape[0]))
        if "lora_magnitude_vector" in parts:
            merged *= (parts["lora_magnitude_vector"].flatten() / merged.norm(dim=1)).unsqueeze(1)
        return merged

    def _scale(self, name: str, *, rank: int) -> float:
        module = name.removesuffix(".weight")
        patterns: Mapping[str, float] = self._config.get("alpha_pattern") or {}
        alpha = next(
            (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
            self._config["lora_alpha"],
        )
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def open_adapter(folder: Path, base: BaseModel) -> LoraWeights:
    """Read an adapter folder and match every tensor to one of the base; raises InvalidAdapterError saying what does
    not fit."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise InvalidAdapterError(f"{folder} has no {name}: it is not a peft adapter in safetensors")
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    _check_mergeable(config)
    updates: dict[str, _Update] = {}
    for stored in list_tensors(folder / WEIGHTS_NAME, error=InvalidAdapterError):
        target, part = _target(stored.name)
        update = updates.setdefault(target, _Update())
        if part is None:
            update.replacement = stored
        else:
            update.parts[part] = stored
    _check_matches(updates, base, use_dora=bool(config.get("use_dora")))
    return LoraWeights(config, updates)


def _check_mergeable(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InvalidAdapterError(f"adapters of type {config.get('peft_type')} cannot be merged; only LoRA can")
    for setting in _NOT_MERGEABLE:
        if config.get(setting):
            raise InvalidAdapterError(f"an adapter with {setting} cannot be merged; export the adapter alone")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_BASE_CHANGING):
        raise InvalidAdapterError(
            f"the adapter was initialised with {start}, which changed the base weights it was trained on; "
            "convert it to a plain LoRA with peft, or export the adapter alone"
        )


def _target(name: str) -> tuple[str, str | None]:
    """Base tensor and LoRA part of an adapter tensor; part None is a full replacement."""
    name = name.removeprefix(_PREFIX)
    found = _PART.search(name)
    if found:
        return name[: found.start()] + ".weight", found[1]
    return name.replace(".base_layer.", "."), None


def _check_matches(updates: Mapping[str, _Update], base: BaseModel, *, use_dora: bool) -> None:
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())
    for name, update in updates.items():
        if name not in shapes:
            raise InvalidAdapterError(f"the adapter changes {name}, which the base model does not have")
        if base.config.get("tie_word_embeddings") and name in ("model.embed_tokens.weight", "lm_head.weight"):
            raise InvalidAdapterError(
                f"the adapter changes {name}, but the base ties input and output embeddings, which a merge cannot keep"
            )
        if update.replacement is not None and update.replacement.shape != shapes[name]:
            raise InvalidAdapterError(
                f"the adapter's {name} has shape {update.replacement.shape}, the base's {shapes[name]}"
            )
        kinds = set(update.parts)
        if kinds and kinds not in (needed, {"lora_embedding_A", "lora_embedding_B"}):
            raise InvalidAdapterError(f"the adapter has {sorted(kinds)} for {name}; needed are {sorted(needed)}")
        _check_shapes(name, update.parts, shapes[name])


def _check_shapes(name: str, parts: Mapping[str, StoredTensor], shape: tuple[int, ...]) -> None:
    if "lora_A" not in parts:
        return
    down, up = parts["lora_A"].shape, parts["lora_B"].shape
    if len(shape) != 2 or down != (up[-1], shape[1]) or up != (shape[0], down[0]):
        raise InvalidAdapterError(
            f"the adapter's {down} and {up} do not fit {name} of shape {shape}: wrong base model?"
        )


def _load(stored: StoredTensor, like: torch.Tensor) -> torch.Tensor:
    if stored.dtype is torch.uint8:
        raise InvalidAdapterError(f"the adapter's {stored.name} is stored as U8; only F32, F16 and BF16 can be merged")
    values = stored.read().to(like.device, torch.float32)
    if not values.isfinite().all():
        raise InvalidAdapterError(f"the adapter's {stored.name} holds NaN or infinity")
    return values
