"""Tensors of layers that keep a state, as llama.cpp computes with them; a family's row names the changes.

Linear attention has r heads of values to each head of keys. Hugging Face stores the r heads of a key head side by side;
for Qwen3.5, llama.cpp repeats all key heads r times instead, so value heads are reordered to the first of each key
head, the second of each, and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from finetune_trainer.export.gguf.layers.kinds import count_groups

Change = Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]


def decay(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The factor of the state's decay, -exp(x), fp32: Hugging Face stores its logarithm."""
    return -torch.exp(weights.to(torch.float32))


def flat_kernel(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A kernel of one channel each, [channels, 1, width], as [channels, width]."""
    return weights.squeeze(1)


def tile_rows(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Reorder the rows of value heads: all rows, or those after the rows of queries and keys."""
    heads, size = config["linear_num_value_heads"], config["linear_value_head_dim"]
    if weights.shape[0] == heads:
        size = 1  # a number for each head
    others, values = weights[: weights.shape[0] - heads * size], weights[weights.shape[0] - heads * size :]

    by_key = values.reshape(config["linear_num_key_heads"], -1, size, *weights.shape[1:])
    return torch.cat([others, by_key.transpose(0, 1).reshape(values.shape)])


def tile_columns(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Reorder the columns of value heads."""
    return tile_rows(weights.T, config).T


def column(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A number for each head, [heads], as [heads, 1]."""
    return weights.unsqueeze(-1)


def row(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Numbers [heads, 1] as [heads]: undoes `column`."""
    return weights.squeeze(-1)


def by_group(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A norm's weights, [channels], as [groups, channels of a group]: each group has its own mean square."""
    return weights.reshape(count_groups(config), -1)


def ungrouped(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A norm's weights in one row: undoes `by_group`."""
    return weights.flatten()


def all_rows(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The embedding of each layer with rows of zeros for tokens that have none, as no text has (Gemma 3n)."""
    missing = config["vocab_size"] - config["vocab_size_per_layer_input"]
    return torch.cat([weights, weights.new_zeros(missing, weights.shape[1])])


def stored_rows(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The embedding of each layer without the rows of zeros: undoes `all_rows`."""
    return weights[: config["vocab_size_per_layer_input"]]


def only_row(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A bias that is stored as [1, size], as [size] (Ernie 4.5)."""
    return weights.squeeze(0)


def as_row(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A bias [size] as [1, size]: undoes `only_row`."""
    return weights.unsqueeze(0)


def scale_parts(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Rows of Mamba 2's projection times the factor of their part, fp32."""
    return weights.to(torch.float32) * _part_factors(config).to(weights.device)


def divide_parts(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Rows of Mamba 2's projection without the factor of their part, fp32: undoes `scale_parts`."""
    return weights.to(torch.float32) / _part_factors(config).to(weights.device)


def _part_factors(config: Mapping[str, Any]) -> torch.Tensor:
    """Factors of Falcon H1, fp32 [rows, 1]: of gate, values, keys, queries and steps."""
    inner, state = config["mamba_n_heads"] * config["mamba_d_head"], count_groups(config) * config["mamba_d_state"]
    rows = torch.tensor([inner, inner, state, state, config["mamba_n_heads"]])
    return torch.tensor(config["ssm_multipliers"], dtype=torch.float32).repeat_interleave(rows).unsqueeze(-1)


def logarithm(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The logarithm of the state's decay, fp32: undoes `decay`."""
    return torch.log(-weights.to(torch.float32))


def channel_kernel(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A kernel [channels, width] as [channels, 1, width]: undoes `flat_kernel`."""
    return weights.unsqueeze(1)


def group_rows(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The rows of value heads by key heads again: undoes `tile_rows`."""
    heads, size = config["linear_num_value_heads"], config["linear_value_head_dim"]
    if weights.shape[0] == heads:
        size = 1
    others, values = weights[: weights.shape[0] - heads * size], weights[weights.shape[0] - heads * size :]

    tiled = values.reshape(-1, config["linear_num_key_heads"], size, *weights.shape[1:])
    return torch.cat([others, tiled.transpose(0, 1).reshape(values.shape)])


def group_columns(weights: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """The columns of value heads by key heads again: undoes `tile_columns`."""
    return group_rows(weights.T, config).T


CHANGES: dict[str, tuple[Change, Change]] = {
    "all_rows": (all_rows, stored_rows),
    "decay": (decay, logarithm),
    "flat_kernel": (flat_kernel, channel_kernel),
    "column": (column, row),
    "only_row": (only_row, as_row),
    "by_group": (by_group, ungrouped),
    "scale_parts": (scale_parts, divide_parts),
    "tile_rows": (tile_rows, group_rows),
    "tile_columns": (tile_columns, group_columns),
}
"""Each change and what undoes it, by the name that rows give it."""


def projected_parts(weights: torch.Tensor, config: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of queries, keys and values, and rows of the gate, of Qwen3-Next's projection.

    It has the rows of a key head together: those of query, key, values and gates.
    """
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    rows = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    by_head = weights.reshape(heads, 2 * size + 2 * rows, *weights.shape[1:])

    parts = by_head.split_with_sizes([size, size, rows, rows], dim=1)
    queries, keys, values, gates = (part.reshape(-1, *weights.shape[1:]) for part in parts)
    return torch.cat([queries, keys, values]), gates


def join_projected(parts: Sequence[torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
    """Qwen3-Next's projection of both parts: undoes `projected_parts`."""
    heads, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    states, gates = parts
    rows = (states.shape[0] - 2 * heads * size) // heads

    queries, keys, values = states.split_with_sizes([heads * size, heads * size, heads * rows])
    by_head = [part.reshape(heads, -1, *part.shape[1:]) for part in (queries, keys, values, gates)]
    return torch.cat(by_head, dim=1).flatten(0, 1)
