"""Conversion of Hugging Face tensors into those that llama.cpp expects: their names, and changes of their values.

llama.cpp rotates neighbouring dimensions (2i, 2i+1) of q and k for the Llama architecture, Hugging Face dimension i
with i + size/2; the rows of both projections are reordered so that the products are the same. Gemma multiplies by 1 +
weight in its norms, llama.cpp by the weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetune_trainer.export.gguf.family_row import GgufFamily, Split
from finetune_trainer.export.gguf.rope.metadata import rotated_dimensions
from finetune_trainer.export.gguf.state_layers.scales import factors_of
from finetune_trainer.export.gguf.state_layers.tensors import CHANGES, join_projected, projected_parts
from finetune_trainer.export.gguf.tensor_names import Destination, TensorNames

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """A GGUF tensor that a Hugging Face tensor becomes, or one place of a stack."""

    destination: Destination
    shape: tuple[int, ...]
    """Of this part alone."""
    take: Change
    """Hugging Face's values -> the values of this part, as llama.cpp expects them."""


class TensorConverter:
    """Names and transforms the tensors of one model; it holds no weights."""

    def __init__(self, family: GgufFamily, config: Mapping[str, Any]) -> None:
        self._family, self._config = family, config
        self._names = TensorNames(family, config)
        self._heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """The parts of Hugging Face tensor `name`; empty if GGUF leaves it out. Raises as TensorNames."""
        destinations = self._names.destinations(name)
        found = self._names.split(name)
        takes: list[Change] = [partial(self.transform, name)] * len(destinations)
        if found is not None:
            takes = split_parts(found[1], self._config, is_bias=name.endswith("bias"))

        probe = torch.empty(tuple(shape), device="meta")
        return [
            Part(destination, tuple(take(probe).shape), take)
            for destination, take in zip(destinations, takes, strict=True)
        ]

    def transform(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The values that llama.cpp expects for Hugging Face tensor `name`, which is not split.

        They are fp32 if arithmetic was needed, and of the same type otherwise.
        """
        for factor in factors_of(self._family, self._config, name):
            weights = weights.to(torch.float32) * factor

        if self._family.permuted_heads:
            for part, heads in self._heads.items():
                if part in name:  # weight [heads * size, hidden] or bias [heads * size]
                    return self._reorder_turning(interleave_heads, weights, heads)

        if self._has_offset(name):
            return weights.to(torch.float32) + self._family.norm_offset

        for change in self._changes(name):
            weights = CHANGES[change][0](weights, self._config)
        return weights

    def restore(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The values of Hugging Face tensor `name` from those of its parts, in the order of `parts`."""
        found = self._names.split(name)
        if found is not None:
            return join_parts(found[1], self._config, parts, is_bias=name.endswith("bias"))
        return self._undo_transform(name, parts[0])

    def _undo_transform(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        if self._family.permuted_heads:
            for part, heads in self._heads.items():
                if part in name:
                    return self._reorder_turning(separate_heads, weights, heads)

        if self._has_offset(name):
            return weights.to(torch.float32) - self._family.norm_offset

        for change in reversed(self._changes(name)):
            weights = CHANGES[change][1](weights, self._config)
        for factor in reversed(factors_of(self._family, self._config, name)):
            weights = weights.to(torch.float32) / factor
        return weights

    def _reorder_turning(
        self, reorder: Callable[[torch.Tensor, int], torch.Tensor], weights: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """Rows [heads * size, ...] with those reordered that RoPE turns: the first of each head (Bamba: one half)."""
        by_head = weights.reshape(heads, -1, *weights.shape[1:])
        count = rotated_dimensions(self._config)

        turning = reorder(by_head[:, :count].flatten(0, 1), heads).reshape(heads, count, *weights.shape[1:])
        return torch.cat([turning, by_head[:, count:]], dim=1).reshape(weights.shape)

    def _changes(self, name: str) -> tuple[str, ...]:
        return next((changes for end, changes in self._family.changes.items() if name.endswith(end)), ())

    def _has_offset(self, name: str) -> bool:
        is_norm = name.endswith("norm.weight") and not name.endswith(self._family.plain_norms)
        return is_norm and self._family.norm_offset != 0


def split_parts(split: Split, config: Mapping[str, Any], *, is_bias: bool) -> list[Change]:
    """The change that makes each part of a stored tensor, [..., rows, columns], or [..., rows] of a bias."""
    if split.projected:
        return [partial(_take_projected, config=config, index=index) for index in range(len(split.into))]

    if split.per_head:
        sizes = [int(config[key]) for key in split.per_head]
        return [partial(_take_of_heads, sizes=sizes, index=index) for index in range(len(sizes))]

    def take(weights: torch.Tensor, index: int) -> torch.Tensor:
        turned = weights.transpose(-1, -2) if split.transposed else weights
        rows, count = turned.dim() - (1 if is_bias else 2), len(split.into)
        if split.interleaved:
            return turned.movedim(rows, 0)[index::count].movedim(0, rows)
        return turned.chunk(count, dim=rows)[index]

    return [partial(take, index=index) for index in range(len(split.into))]


def join_parts(
    split: Split, config: Mapping[str, Any], parts: Sequence[torch.Tensor], *, is_bias: bool
) -> torch.Tensor:
    """The stored tensor of all its parts: undoes `split_parts`."""
    if split.projected:
        return join_projected(parts, config)

    if split.per_head:
        first, *others = parts  # [heads, columns, its rows]
        return torch.cat([first.transpose(1, 2), *others], dim=1).flatten(0, 1)

    rows = parts[0].dim() - (1 if is_bias else 2)
    joined = torch.stack(list(parts), rows + 1).flatten(rows, rows + 1) if split.interleaved else torch.cat(parts, rows)  # type: ignore[arg-type]
    return joined.transpose(-1, -2) if split.transposed else joined


def _take_projected(weights: torch.Tensor, *, config: Mapping[str, Any], index: int) -> torch.Tensor:
    """Part `index` of Qwen3-Next's projection."""
    return projected_parts(weights, config)[index]


def _take_of_heads(weights: torch.Tensor, *, sizes: Sequence[int], index: int) -> torch.Tensor:
    """Part `index` of every head, [heads, its rows, columns]; the first one [heads, columns, its rows]."""
    heads = weights.reshape(-1, sum(sizes), weights.shape[-1])
    start = sum(sizes[:index])
    part = heads[:, start : start + sizes[index]]
    return part.transpose(1, 2) if index == 0 else part


def interleave_heads(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [heads * size, ...] so that dimensions i and i + size/2 of each head become neighbours."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])  # [heads, 2, size / 2, ...]
    return halves.transpose(1, 2).reshape(weights.shape)


def separate_heads(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [heads * size, ...] so that neighbours of each head are size/2 apart: undoes `interleave_heads`."""
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])  # [heads, size / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(weights.shape)
