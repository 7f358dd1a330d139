"""Names of the tensors in GGUF files, from those in Hugging Face's. Needs no PyTorch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import get_tensor_name_map

from finetune_trainer.export.errors import InvalidBaseError, UnsupportedArchitectureError
from finetune_trainer.export.gguf.family_row import GgufFamily, Split

# Buffers that old checkpoints carry: llama.cpp computes them, and every converter leaves them out.
COMPUTED_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.masked_bias|self_attn\.bias)$")
LAYER = re.compile(r"(?:model|backbone)\.layers\.(\d+)\.")
OUTPUT_HEAD = "lm_head.weight"
DRAFTING = ("mtp.", "model.mtp_")
"""Beginnings of the names of layers that draft more tokens at once, where they stand apart (Qwen, Ernie 4.5)."""
STACKED = re.compile(r"\.(experts|norms|altup_projections|altup_unembed_projections)\.(\d+)\.")
"""Experts, norms of single heads and projections of Gemma 3n's streams are stored one by one, and stacked in GGUF."""
SPELLINGS = {
    ".e_score_correction_bias": ".e_score_correction.bias",
    ".expert_bias": ".expert_bias.bias",
    ".sinks": ".sinks.weight",
    ".dt_bias": ".dt_proj.bias",
    ".experts.gate_up_proj": ".experts.gate_up_proj.weight",
    ".experts.down_proj": ".experts.down_proj.weight",
    ".correct_output_scale": ".correct_output_scale.weight",
    ".layer_scalar": ".layer_scalar.weight",
    ".experts.down_proj_bias": ".experts.down_proj.bias",
    ".block_sparse_moe.output_linear.weight": ".mlp.experts.down_proj.weight",
    ".shared_mlp.output_linear.weight": ".mlp.shared_expert.down_proj.weight",
}
"""Ends of names that the table of the `gguf` package has in another spelling."""


SCALES = {
    "router.scale": ("router.scale", "router.proj.weight"),
    "router.per_expert_scale": ("router.per_expert_scale", "experts.down_proj"),
}
"""Scales of Gemma 4, by the end of their names, with the weight beside which GGUF has them."""


@dataclass(frozen=True)
class Destination:
    """The place of a tensor, or of a part of it, in the file."""

    name: str
    slot: int | None = None
    """The place in a stack; None: it is the whole tensor."""


class TensorNames:
    """The names of one model's tensors."""

    def __init__(self, family: GgufFamily, config: Mapping[str, Any]) -> None:
        self._family = family
        self._names = get_tensor_name_map(family.architecture, config["num_hidden_layers"])
        self._layers = int(config["num_hidden_layers"])
        self._spellings = SPELLINGS | dict(family.spellings)
        self._is_tied = bool(config["tie_word_embeddings"])

    def split(self, name: str) -> tuple[str, Split] | None:
        """Find how the row splits Hugging Face tensor `name`, by the end of the name; None: it does not."""
        return next(((end, split) for end, split in self._family.splits.items() if name.endswith(end)), None)

    def destinations(self, name: str) -> tuple[Destination, ...]:
        """The places of Hugging Face tensor `name`; empty if GGUF leaves it out, or has it as metadata.

        Raises InvalidBaseError if the architecture has no such tensor, UnsupportedArchitectureError if that is a head.
        """
        # Layers beyond the model's own draft more tokens at once (DeepSeek V3, GLM 4.5; Qwen3-Next and 3.5 have them
        # apart); transformers drops them, too.
        layer = LAYER.match(name)
        is_left_out = (
            COMPUTED_BUFFERS.search(name) or name.startswith(DRAFTING) or name.endswith(tuple(self._family.arrays))
        )
        is_left_out = is_left_out or (layer is not None and int(layer[1]) >= self._layers)
        if is_left_out or (self._is_tied and name == OUTPUT_HEAD):
            return ()

        found = self.split(name)
        if found is not None:
            end, split = found
            return tuple(Destination(self._rename(name.removesuffix(end) + part)) for part in split.into)

        stacked = STACKED.search(name)
        if stacked is None:
            return (Destination(self._rename(name)),)
        # Single norms have their stack's name without the word.
        group = "." if stacked[1] == "norms" else f".{stacked[1]}."
        return (Destination(self._rename(name.replace(stacked[0], group)), int(stacked[2])),)

    def _rename(self, name: str) -> str:
        scale = SCALES.get(".".join(name.split(".")[-2:]))
        if scale is not None:
            return f"{self._rename(name.removesuffix(scale[0]) + scale[1]).removesuffix('.weight')}.scale"

        spelt = next((name.removesuffix(end) + new for end, new in self._spellings.items() if name.endswith(end)), name)
        renamed = self._names.get_name(spelt, try_suffixes=(".weight", ".bias"))

        # Mixtral's experts are in the table without their folder.
        renamed = renamed or self._names.get_name(
            spelt.replace("model.layers.", "layers.").replace(".block_sparse_moe.", ".feed_forward."),
            try_suffixes=(".weight", ".bias"),
        )

        # Nemotron H's experts are in the table under `model` only.
        renamed = renamed or self._names.get_name(
            spelt.replace("backbone.layers.", "model.layers."), try_suffixes=(".weight",)
        )

        if renamed is None and name == OUTPUT_HEAD:
            raise UnsupportedArchitectureError(
                "llama.cpp uses the embedding as output head of this architecture, but the weights hold a head of "
                "their own: export without GGUF"
            )
        if renamed is None:
            raise InvalidBaseError(
                f"tensor {name!r} has no name in GGUF's {self._family.architecture.name} architecture; "
                "is this a plain checkpoint of that family?"
            )
        return renamed
