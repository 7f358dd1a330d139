"""Factors of config.json that llama.cpp has inside the weights (Falcon H1's multipliers). Needs no PyTorch."""

from collections.abc import Mapping
from typing import Any

from finetune_trainer.export.errors import UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily

EMBEDDING, HEAD = ".embed_tokens.weight", "lm_head.weight"


def factors_of(family: GgufFamily, config: Mapping[str, Any], name: str) -> list[float]:
    """The factors that the values of tensor `name` are multiplied by, in order."""
    found = next((each for end, each in family.scales.items() if name.endswith(end)), ())
    return [float(config[each] if isinstance(each, str) else config[each[0]][each[1]]) for each in found]


def check_scales(family: GgufFamily, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedArchitectureError for factors that weights cannot have inside."""
    factors = {end: factors_of(family, config, end) for end in family.scales}
    without = [end for end, found in factors.items() if 0.0 in found]
    if without:
        raise UnsupportedArchitectureError(
            f"config.json multiplies {', '.join(without)} by 0, which leaves nothing of these weights in a GGUF file: "
            "export without GGUF"
        )

    if config["tie_word_embeddings"] and factors.get(EMBEDDING) != factors.get(HEAD):
        raise UnsupportedArchitectureError(
            f"llama.cpp has one tensor for the embedding and the output head, but config.json multiplies the embedding "
            f"by {factors.get(EMBEDDING)} and the head by {factors.get(HEAD)}: export without GGUF"
        )
