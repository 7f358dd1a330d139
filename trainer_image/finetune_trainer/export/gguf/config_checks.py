"""Whether config.json's numbers are numbers, and those of the weights beside it.

A config is written by others: a layer count of 10^9 or a vocabulary of 10^12 would otherwise be believed, and memory
be spent on it, before the first tensor does not fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.export.errors import InvalidBaseError

_COUNTS = (
    "num_hidden_layers",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_LARGEST = 2**31 - 1  # of any number that GGUF stores as 32 bits
EMBEDDING = "model.embed_tokens.weight"


def check_sizes(config: Mapping[str, Any], shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Raise InvalidBaseError where a size in `config` is no number or not that of the tensors `shapes`."""
    wrong = [f"{key}: {config.get(key)!r}" for key in _COUNTS if not _is_count(config.get(key))]
    if wrong:
        raise InvalidBaseError(f"config.json has no usable number for {'; '.join(wrong)}")
    embedding = dict(shapes).get(EMBEDDING)
    expected = (config["vocab_size"], config["hidden_size"])
    if embedding is not None and embedding != expected:
        raise InvalidBaseError(f"{EMBEDDING} has shape {embedding}, but config.json says {expected}")
    if config["num_hidden_layers"] > len(shapes):
        raise InvalidBaseError(
            f"config.json says {config['num_hidden_layers']} layers; there are {len(shapes)} tensors"
        )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _LARGEST
