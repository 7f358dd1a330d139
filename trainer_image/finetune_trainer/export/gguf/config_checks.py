"""Checks of config.json's numbers: that they are numbers, and that they agree with the weights.

Others write the config. Without these checks a layer count of 10^9 or a vocabulary of 10^12 would be believed, and
memory be spent on it, before the first tensor does not fit.
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
_MAX_COUNT = 2**31 - 1  # GGUF stores these numbers in 32 bits
Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""Name and shape of every tensor of a model."""
EMBEDDING = "model.embed_tokens.weight"


def check_sizes(config: Mapping[str, Any], shapes: Shapes | None) -> None:
    """Raise InvalidBaseError if a size in `config` is no positive number or disagrees with the tensors `shapes`.

    None: the tensors are not known.
    """
    wrong = [f"{key}: {config.get(key)!r}" for key in _COUNTS if not _is_count(config.get(key))]
    if wrong:
        raise InvalidBaseError(f"config.json must have a whole number from 1 to {_MAX_COUNT} for {'; '.join(wrong)}")

    if shapes is None:
        return

    embedding = dict(shapes).get(EMBEDDING)
    expected = (config["vocab_size"], config["hidden_size"])
    if embedding is not None and embedding != expected:
        raise InvalidBaseError(
            f"{EMBEDDING} has shape {embedding}, but config.json's vocab_size and hidden_size are {expected}"
        )

    if config["num_hidden_layers"] > len(shapes):
        raise InvalidBaseError(
            f"config.json says num_hidden_layers {config['num_hidden_layers']}, which are more layers than the "
            f"{len(shapes)} tensors of the weight files can make"
        )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_COUNT
