"""What a tiny model of a published family is built from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HIDDEN_SIZE = 256
HEAD_SIZE = 64
SPARE_ROWS = 24  # of the embedding, beyond the tokenizer: published models have some
GLM_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
STRETCHED: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
}
"""Hunyuan's RoPE, with the sizes that the converter insists on."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
)
NAMED_TEMPLATES = [
    {"name": "default", "template": CHAT_TEMPLATE},
    {"name": "tool_use", "template": "{{ tools }}" + CHAT_TEMPLATE},
]


@dataclass(frozen=True)
class FamilyModel:
    """Arguments for the builders of one tiny model and its tokenizer."""

    family: str
    """A key of tiny_families.settings.TINY_FAMILIES."""
    tokenizer: str
    """A key of tiny_tokenizers.KINDS."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the Hugging Face config."""
    ends: Sequence[str] = ()
    """Tokens at which generation stops, for generation_config.json; empty: the tokenizer's end of sequence."""
    template: Any = CHAT_TEMPLATE
    spare_rows: int = SPARE_ROWS
    """Rows of the embedding beyond the tokenizer."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Settings as published files have them where transformers writes others; None: they have none."""
    seed: int = 0
    """Seed of the weights: another one where, on some CPU, too many answers reach two tokens that are as good."""
