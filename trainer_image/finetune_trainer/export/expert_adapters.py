"""Adapters on experts as they are published, and as they are merged.

While they train, the factors of all experts lie in one tensor. They are published under the names of the model's files:
each expert's for itself, as a linear layer's, where the files hold a matrix for each, which vLLM and peft take; else as
peft writes adapters on stacked parameters (`target_parameters`), with the outer wrapper on the down projection:

    <experts>.base_layer.lora_A.weight [E r, in]     gate and up, row e r + i
    <experts>.base_layer.lora_B.weight [out, r E]    column i E + e
    <experts>.lora_A.weight, <experts>.lora_B.weight the down projection, or the only one that has an adapter

Experts train with a rank of their own, and are published with that of the other layers.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune_kernels.planning.expert_families import expert_family_of_type
from finetune_trainer.export.base_model.folder import PREFIXES
from finetune_trainer.export.errors import InvalidAdapterError
from finetune_trainer.model.expert_files import COMMON, LAYER, STACKED_PARTS, StoredExperts, find_experts

PREFIX = "base_model.model."
_TRAINED = re.compile(r"^(?P<path>.*\.experts)\.adapters\.(?P<part>\w+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_WRAPPED = re.compile(r"^(?P<path>.*\.experts)(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight$")
Stored = Mapping[int, StoredExperts]
"""The experts of each layer in the files."""


def stored_of(model: Any) -> Stored:
    """The experts of each layer in the files of a loaded model whose experts are ours; else empty. Where all names of
    layers begin otherwise in files (Nemotron H), these begin as in the loaded model, like those of other adapters."""
    loaded, published = PREFIXES.get(getattr(model.config, "model_type", ""), ("", ""))
    found = {}
    for path, module in model.named_modules():
        stored, layer = getattr(module, "stored_experts", None), LAYER.search(path)
        if stored is not None and layer:
            is_renamed = bool(published) and stored.block.startswith(published)
            block = loaded + stored.block.removeprefix(published) if is_renamed else stored.block
            found[int(layer[1])] = replace(stored, block=block)
    return found


def published_state(
    state: Mapping[str, torch.Tensor], stored: Stored, config: Mapping[str, Any], *, swapped: bool = False
) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names with which they are published, all of the rank in peft's `config`;
    `swapped`: see `is_swapped`."""
    parts = {found["part"] for name in state if (found := _TRAINED.match(name))}
    published: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        found, layer = _TRAINED.match(name), LAYER.search(name)
        if found is None or layer is None:
            published[name] = value
            continue

        experts, part, side = stored[int(layer[1])], found["part"], found["side"]
        value = _filled_up(value, side, config)
        if experts.is_stacked:
            inner = ".base_layer" if part != STACKED_PARTS[-1] and len(parts) > 1 else ""
            if swapped:
                value, side = value.transpose(1, 2), "BA"["AB".index(side)]
            # A [E, r, in] -> [E r, in];  B [E, out, r] -> [out, r E]
            flat = value.flatten(0, 1) if side == "A" else value.permute(1, 2, 0).flatten(1)
            published[f"{found['path']}{inner}.lora_{side}.weight"] = flat.contiguous()
        else:
            for number, matrix in enumerate(value):
                published[f"{PREFIX}{experts.module(part, number)}.lora_{side}.weight"] = matrix.contiguous()
    return published


def _filled_up(value: torch.Tensor, side: str, config: Mapping[str, Any]) -> torch.Tensor:
    """A factor [E, r', in] or [E, out, r'] with zeros up to peft's rank r, and in B the ratio of both ranks' scales: it
    is the same adapter then, without a rank and scale of its own, which serving engines do not read."""
    rank, own = int(config["r"]), value.shape[1 if side == "A" else 2]
    if side == "A":
        return torch.nn.functional.pad(value, (0, 0, 0, rank - own))
    ratio = rank / own
    return torch.nn.functional.pad(value * (math.sqrt(ratio) if config.get("use_rslora") else ratio), (0, rank - own))


def adapted_parts(model: Any) -> list[str]:
    """The parts of the experts that have an adapter, in the files' order."""
    for _, module in model.named_modules():
        if getattr(module, "stored_experts", None) is not None:
            return [part for part in module.stored_experts.parts if part in module.adapters]
    return []


def expert_targets(config: Mapping[str, Any], parts: Sequence[str], stored: Stored) -> dict[str, Any]:
    """The settings of peft's `config` that name its targets, those on `parts` of the experts included."""
    # peft stands in for a list without entries by a word.
    linear = [] if isinstance(config["target_modules"], str) else list(config["target_modules"])
    first = next(iter(stored.values()))
    if first.is_stacked:
        return {"target_modules": sorted(linear), "target_parameters": [f"experts.{COMMON[part]}" for part in parts]}
    return {"target_modules": sorted({*linear, *(first.leaf(part) for part in parts)})}


def publish_experts(folder: Path, model: Any) -> None:
    """Rewrites the adapter below `folder`, as peft saved it, with the published names of adapters on experts."""
    parts, stored = adapted_parts(model), stored_of(model)
    if not parts:
        return

    weights = folder / "adapter_model.safetensors"
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    state = published_state(load_file(weights), stored, config, swapped=is_swapped(model.config.to_dict()))
    save_file(state, weights, metadata={"format": "pt"})
    config |= expert_targets(config, parts, stored)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def stacked_target(
    name: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """The base tensor that a tensor of an adapter on stacked experts changes, and its part; None for another tensor.

    `shapes`: those of the base's tensors. Raises InvalidAdapterError if the base has no such experts.
    """
    found, layer = _WRAPPED.match(name.removeprefix(PREFIX)), LAYER.search(name)
    wrapped = [str(target).rsplit(".", 1)[-1] for target in config.get("target_parameters") or ()]
    if found is None or layer is None or not wrapped:
        return None

    experts = find_experts(shapes.items()).get(int(layer[1]))
    if experts is None or not experts.is_stacked:
        raise InvalidAdapterError(
            f"the adapter changes {name}, stacked experts, but the base holds no stack in that layer: wrong base model?"
        )

    names = {COMMON[part]: part for part in STACKED_PARTS}
    # With both, gate and up lie inside.
    kind = wrapped[0] if len(wrapped) == 1 else COMMON["gate_up" if found["inner"] else "down"]
    if kind not in names:
        raise InvalidAdapterError(f"target_parameters of the adapter names {kind}, which is no matrix of experts")
    return f"{experts.block}.{experts.leaf(names[kind])}", f"lora_{found['side']}"


@dataclass(frozen=True)
class StackLayout:
    """The order of rows and columns in a family's stacks, and in which peft takes them."""

    is_transposed: bool
    """True for [in, out]."""
    is_swapped: bool
    """True if peft takes [in, out] for [out, in], so that A and B change their roles."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "StackLayout":
        """The layout of a model of this config."""
        family = expert_family_of_type(str(config.get("model_type")))
        return cls(family is not None and family.is_transposed, is_swapped(config))

    def as_stored(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Experts, and rows and columns of the matrix that B A is added to."""
        experts, rows, columns = shape
        return (experts, columns, rows) if self.is_transposed and not self.is_swapped else (experts, rows, columns)

    def fits(self, shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        """True if A [E r, columns] and B [rows, r E], as published, fit a stack of this shape."""
        experts, rows, columns = self.as_stored(shape)
        return a[0] == b[1] and a[0] % experts == 0 and a[1] == columns and b[0] == rows

    def merge(self, weights: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """Adds scale B A to each matrix of `weights`, in fp32 and in place, and returns them."""
        experts = weights.shape[0]
        a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
        transposes = self.is_transposed and not self.is_swapped
        for number, matrix in enumerate(weights):
            (matrix.T if transposes else matrix).addmm_(b[:, :, number], a[number], alpha=scale)
        return weights


def is_swapped(config: Mapping[str, Any]) -> bool:
    """True if peft takes the stacks of this family for [out, in] though they are [in, out]: Llama 4's module has no
    mark of transformers' common make that says it."""
    family = expert_family_of_type(str(config.get("model_type")))
    return family is not None and family.is_transposed and family.scales_input
