"""The base model as it was loaded, with its tokenizer and what was decided about it."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.vocabulary import Precision


@dataclass(frozen=True)
class LoadedModel:
    """The base and what was decided about it."""

    model: Any
    """transformers' PreTrainedModel."""
    tokenizer: Any
    """transformers' PreTrainedTokenizerFast."""
    architecture: str
    precision: Precision
    """Compute type; never Auto, nor FP8, which is BF16 until the first batch was tried."""
    device: torch.device

    @property
    def embedding_rows(self) -> int:
        """How many tokens the model knows."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def device_name(self) -> str:
        """Device for people, such as NVIDIA H200."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
