"""The base model as stage 1 loaded it."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.vocabulary import Precision


@dataclass(frozen=True)
class LoadedModel:
    """The base model, its tokenizer, and what was resolved while loading them."""

    model: Any
    """transformers' PreTrainedModel."""
    tokenizer: Any
    """transformers' PreTrainedTokenizerFast."""
    architecture: str
    """Class name in config.json, such as LlamaForCausalLM."""
    precision: Precision
    """Compute type. Never Auto; never FP8 either, which starts as BF16 (see fp8_gate.py)."""
    device: torch.device

    @property
    def embedding_rows(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def device_name(self) -> str:
        """Device for people, such as NVIDIA H200."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
