"""The model families of transformers that the kernels know, one `Family` row each.

Every family has pre-norm layers with a gated MLP; causal attention, with a window and a softcap at most, without sinks
or biases on scores; and a linear head, with a softcap or not. To add a family, add a row: the layer builder, patching,
packed attention, the loss and the memory plan all ask it, and `test_families.py` builds a small layer of every row and
compares it with transformers. The table imports no torch, as preflight reads it before a GPU is asked for.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Everything the kernels know of one family that the model's own configuration does not say."""

    prefix: str
    """Prefix of the family's classes in transformers: Llama in LlamaForCausalLM, LlamaRMSNorm and LlamaMLP."""
    model_type: str
    """`model_type` of its text configuration."""
    window: Literal["none", "model", "layer"] = "none"
    """Where the attention window is written: nowhere, in the configuration, or in each attention module."""
    activation_field: str = "hidden_act"
    """Field of the configuration that names the MLP's activation."""
    merged_projections: bool = False
    """True if q, k, v are one linear layer, and gate and up another."""
    head_norms: bool = False
    """True if q and k are normed head by head before RoPE."""
    norm_offset: float = 0.0
    """Added to every norm's weight: Gemma stores its weights around zero."""
    second_norms: bool = False
    """True if the outputs of the attention and the MLP block are normed, too."""
    caps_scores: bool = False
    """True if attention scores have a softcap."""
    scales_embedding: bool = False
    """True if the embedding is a module of the family's own, which stays on the GPU."""

    @property
    def architecture(self) -> str:
        """Class of the causal language model."""
        return f"{self.prefix}ForCausalLM"

    @property
    def norm(self) -> str:
        """Class of the root mean square norm."""
        return f"{self.prefix}RMSNorm"

    @property
    def mlp(self) -> str:
        """Class of the gated MLP."""
        return f"{self.prefix}MLP"

    @property
    def attention(self) -> str:
        """Class of the attention module."""
        return f"{self.prefix}Attention"


FAMILIES = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", window="model"),
    Family("Qwen2", "qwen2", window="layer"),
    Family("Qwen3", "qwen3", window="layer", head_norms=True),
    Family("Phi3", "phi3", window="model", merged_projections=True),
    Family(
        "Gemma2", "gemma2", norm_offset=1.0, window="layer", activation_field="hidden_activation", second_norms=True,
        caps_scores=True, scales_embedding=True,
    ),
    Family(
        "Gemma3", "gemma3_text", window="layer", activation_field="hidden_activation", head_norms=True,
        norm_offset=1.0, second_norms=True, scales_embedding=True,
    ),
)  # fmt: skip

NORM_OFFSETS = {family.norm: family.norm_offset for family in FAMILIES}
"""Norm class -> what is added to its weight."""
MLP_FAMILIES = {family.mlp: family for family in FAMILIES}
"""MLP class -> its family."""
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' name of an activation -> the kernels' name."""

FOREIGN_FACTORS = (
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
)
"""Fields of other families' configurations that scale embedding, residual stream, scores or logits. Neither the layers
nor the loss apply them, and a small model of such a family hides it: their defaults are mostly 1."""


def foreign_factor(config: object) -> str | None:
    """Returns the first factor of a model's configuration that the kernels do not apply; None if it has none."""
    return next((name for name in FOREIGN_FACTORS if getattr(config, name, None) is not None), None)


def family_of(causal: object) -> Family | None:
    """Returns the row of a transformers model; None if the kernels do not know its architecture."""
    architecture = type(causal).__name__
    return next((family for family in FAMILIES if family.architecture == architecture), None)


def family_of_type(model_type: str) -> Family | None:
    """Returns the row of a text configuration's `model_type`; None if the kernels do not know it."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)
