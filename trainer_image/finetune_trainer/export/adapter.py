"""A peft LoRA adapter, merged into the base's weights tensor by tensor, in fp32: W' = W + scale * B A.

    scale = alpha / r           LoRA
    scale = alpha / sqrt(r)     rsLoRA
    W' = m * (W + scale * B A) / |W + scale * B A|      DoRA, with the norm of each row

Full copies of a module (`modules_to_save`) replace the base's weights, and rows of new tokens
(`trainable_token_indices`) the base's rows. An adapter that a merge cannot express is
refused: a wrong model that loads is worse than none.

Source: peft's LoraLayer.get_delta_weight; LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.export.base_model.adapter_names import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from finetune_trainer.export.base_model.folder import BaseModel
from finetune_trainer.export.base_model.grown_vocabulary import TRAINED_ROWS, trained_rows_of
from finetune_trainer.export.base_model.json_files import load_json
from finetune_trainer.export.base_model.output_head import EMBEDDING, HEAD
from finetune_trainer.export.errors import InvalidAdapterError
from finetune_trainer.export.expert_adapters import StackLayout, stacked_target
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor, list_tensors

STACK = 3
"""Dimensions of a tensor that stacks experts."""
_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")
_ROWS, ROWS_PART = ".token_adapter.trainable_tokens_delta", "rows"
# Settings with another effect on the forward pass than W + scale * B A.
_NOT_MERGEABLE = (
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
)
# Initialisations that change the base model in memory: the adapter is relative to weights that no longer exist.
_BASE_CHANGING = ("loftq", "pissa", "olora", "corda", "lora_ga")


@dataclass
class _Update:
    """The adapter's tensors for one weight of the base."""

    parts: dict[str, StoredTensor] = field(default_factory=dict)
    """By LoRA's name of the part, such as lora_A."""
    replacement: StoredTensor | None = None
    """A full copy of the weight, of `modules_to_save`."""
    rows: StoredTensor | None = None
    """Rows [n, hidden] that replace the weight's, of `trainable_token_indices`."""
    indices: tuple[int, ...] = ()
    """Their places in the weight."""


class LoraWeights:
    """An adapter matched to a base; only headers are read before `merge`."""

    def __init__(self, config: Mapping[str, Any], updates: dict[str, _Update], stacks: StackLayout) -> None:
        """`stacks`: how the base stacks experts."""
        self._config = config
        self._updates = updates
        self._stacks = stacks

    def merge(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The weights [out, in] of tensor `name` with the adapter: fp32, on the same device.

        Weights that the adapter does not change are returned as they are. Raises InvalidAdapterError for NaN and
        infinity in the adapter.
        """
        update = self._updates.get(name)
        if update is None:
            return weights

        weights = weights.to(torch.float32)
        if update.replacement is not None:
            weights = _load(update.replacement, weights)
        if update.rows is not None:
            place = torch.tensor(update.indices, device=weights.device)
            weights = weights.index_copy(0, place, _load(update.rows, weights))
        if not update.parts:
            return weights

        parts = {kind: _load(stored, weights) for kind, stored in update.parts.items()}
        if "lora_embedding_A" in parts:
            # An embedding's rows are its inputs, so the product is transposed: [hidden, r], [r, tokens].
            down, up = parts["lora_embedding_B"], parts["lora_embedding_A"]
            return torch.addmm(weights, up.T, down.T, alpha=self._scale(name, rank=up.shape[0]))

        down, up = parts["lora_A"], parts["lora_B"]  # [r, in], [out, r]
        if weights.ndim == STACK:
            scale = self._scale(name, rank=down.shape[0] // weights.shape[0])
            return self._stacks.merge(weights.clone(), down, up, scale)
        merged = torch.addmm(weights, up, down, alpha=self._scale(name, rank=down.shape[0]))
        if "lora_magnitude_vector" in parts:
            # DoRA: the norm of each row becomes the learnt magnitude.
            merged *= (parts["lora_magnitude_vector"].flatten() / merged.norm(dim=1)).unsqueeze(1)
        return merged

    def _scale(self, name: str, *, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA; `alpha_pattern` gives some modules an alpha of their own."""
        module = name.removesuffix(".weight")
        # peft matches a pattern against the end of the module's name.
        patterns: Mapping[str, float] = self._config.get("alpha_pattern") or {}
        alpha = next(
            (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
            self._config["lora_alpha"],
        )
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def open_adapter(folder: Path, base: BaseModel) -> LoraWeights:
    """Read an adapter folder and match every tensor to one of the base.

    Raises InvalidAdapterError naming the setting or the tensor that does not fit.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise InvalidAdapterError(f"{folder} has no {name}: it is not a peft adapter in safetensors")
    config = load_json(folder / CONFIG_NAME, error=InvalidAdapterError)
    _check_mergeable(config)

    tensors = list_tensors(folder / WEIGHTS_NAME, error=InvalidAdapterError)
    return LoraWeights(config, _match(config, tensors, base), StackLayout.of(base.config))


def check_merge(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: BaseModel) -> None:
    """Raise the InvalidAdapterError of `open_adapter` for an adapter that is yet to train.

    `config` and the names of `shapes` are those with which peft will save it.
    """
    _check_mergeable(config)
    _match(config, [StoredTensor(name, torch.float32, shape, Path(), 0, 0) for name, shape in shapes.items()], base)


def _match(config: Mapping[str, Any], tensors: Iterable[StoredTensor], base: BaseModel) -> dict[str, _Update]:
    """The adapter's tensors by the base tensor that they change; raises InvalidAdapterError if they do not fit."""
    updates: dict[str, _Update] = {}
    shapes = dict(base.shapes)
    for stored in tensors:
        target, part = stacked_target(stored.name, config, shapes) or _target(stored.name)
        target = base.name_of(target)
        update = updates.setdefault(target, _Update())
        if part is None:
            update.replacement = stored
        elif part == ROWS_PART:
            update.rows, update.indices = stored, _indices(config, target)
        else:
            update.parts[part] = stored

    if base.is_tied and base.has_stored_head and EMBEDDING in updates and updates[EMBEDDING].rows is not None:
        updates[HEAD] = updates[EMBEDDING]  # one matrix, stored twice
    _check_matches(updates, base, use_dora=bool(config.get("use_dora")))
    return updates


def _check_mergeable(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InvalidAdapterError(
            f"adapters of peft_type {config.get('peft_type')} cannot be merged, only LORA: export the adapter alone"
        )
    for setting in _NOT_MERGEABLE:
        if config.get(setting):
            raise InvalidAdapterError(f"an adapter with {setting} cannot be merged: export the adapter alone")

    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_BASE_CHANGING):
        raise InvalidAdapterError(
            f"init_lora_weights is {start}, which changed the base's weights before training; "
            "convert it to a plain LoRA with peft, or export the adapter alone"
        )


def _target(name: str) -> tuple[str, str | None]:
    """The base tensor that an adapter tensor changes, and the LoRA part it is; part None is a full copy."""
    name = name.removeprefix(PREFIX)
    found = _PART.search(name)
    if found:
        return name[: found.start()] + ".weight", found[1]
    if name.endswith(_ROWS):
        return name.removesuffix(_ROWS) + ".weight", ROWS_PART
    return name.replace(".base_layer.", "."), None


def _check_matches(updates: Mapping[str, _Update], base: BaseModel, *, use_dora: bool) -> None:
    """Raise InvalidAdapterError unless every update fits a tensor of the base."""
    shapes = dict(base.shapes)
    # Every matrix of a LoRA has both factors, of a DoRA also the magnitudes.
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if use_dora else set())
    for name, update in updates.items():
        if name not in shapes:
            raise InvalidAdapterError(
                f"the adapter changes {name}, which the base model does not have: wrong base model?"
            )
        is_whole = update.replacement is not None or bool(update.parts)
        if name in (EMBEDDING, HEAD) and base.is_tied and is_whole:
            raise InvalidAdapterError(
                f"the adapter changes {name}, but the base ties input and output embeddings, which a merge cannot "
                "keep: export the adapter alone"
            )

        if update.replacement is not None and update.replacement.shape != shapes[name]:
            raise InvalidAdapterError(
                f"the adapter's {name} has shape {update.replacement.shape}, not {shapes[name]}: wrong base model?"
            )

        _check_rows(name, update, shapes[name])
        kinds = set(update.parts)
        if kinds and kinds not in (needed, {"lora_embedding_A", "lora_embedding_B"}):
            raise InvalidAdapterError(f"the adapter has {sorted(kinds)} for {name}, but a merge needs {sorted(needed)}")
        _check_shapes(name, update.parts, shapes[name], StackLayout.of(base.config))


def _indices(config: Mapping[str, Any], target: str) -> tuple[int, ...]:
    """The rows of tensor `target` that the adapter trains."""
    layer = target.removesuffix(".weight").rsplit(".", 1)[-1]
    return tuple(dict(trained_rows_of(config.get(TRAINED_ROWS))).get(layer, ()))


def _check_rows(name: str, update: _Update, shape: tuple[int, ...]) -> None:
    """Raise InvalidAdapterError for rows that have no place in a weight of `shape`."""
    if update.rows is None:
        return
    expected = (len(update.indices), *shape[1:])
    inside = all(0 <= index < shape[0] for index in update.indices)
    if update.rows.shape != expected or not update.indices or not inside:
        raise InvalidAdapterError(
            f"the adapter trains rows of {name} with shape {update.rows.shape}, but {TRAINED_ROWS} names "
            f"{len(update.indices)} of its {shape[0]} rows: get the adapter again, with its tokenizer"
        )


def _check_shapes(name: str, parts: Mapping[str, StoredTensor], shape: tuple[int, ...], stacks: StackLayout) -> None:
    if "lora_A" not in parts:
        return

    down, up = parts["lora_A"].shape, parts["lora_B"].shape
    if len(shape) == STACK:
        fits = stacks.fits(shape, down, up)
    else:
        fits = len(shape) == 2 and down == (up[-1], shape[1]) and up == (shape[0], down[0])
    if not fits:
        raise InvalidAdapterError(
            f"the adapter's lora_A {down} and lora_B {up} do not fit {name} of shape {shape}: wrong base model?"
        )


def _load(stored: StoredTensor, like: torch.Tensor) -> torch.Tensor:
    """Read an adapter tensor as fp32 onto the device of `like`."""
    if stored.dtype is torch.uint8:
        raise InvalidAdapterError(f"the adapter's {stored.name} is stored as U8; only F32, F16 and BF16 can be merged")

    values = stored.read().to(like.device, torch.float32)
    if not values.isfinite().all():
        raise InvalidAdapterError(
            f"the adapter's {stored.name} holds NaN or infinity: train it again, with a lower learning rate"
        )
    return values
