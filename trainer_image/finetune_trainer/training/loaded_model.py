"""The base model as stage 1 loaded it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from finetune_api.vocabulary import Precision
from finetune_kernels.experts.replacing import stacked_experts
from finetune_kernels.streaming.frozen_tensors import nf4_tensors
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_kernels.vocabulary.trained_rows import frozen_module

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


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
    window: LayerWindow | None = None
    """The layers' weights, of which this rank keeps a part; None if it keeps all."""
    new_tokens: tuple[int, ...] = ()
    """Ids of the tokens that the job adds, whose rows train; they follow each other."""
    streamed: HostLayers = field(default_factory=lambda: HostLayers([]))
    """The layers whose weights stream from host memory, as many as the memory plan says."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute type."""
        return DTYPES[self.precision]

    @property
    def embedding_rows(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return int(frozen_module(self.model.get_input_embeddings()).num_embeddings)

    @property
    def base_bytes(self) -> int:
        """Bytes of the base model that this process keeps, on its device or in host memory."""
        weights = [weight for weight in self.model.parameters() if not weight.requires_grad]
        tensors = [tensor for weight in weights for tensor in nf4_tensors(weight)]
        tensors += [tensor for _, experts in stacked_experts(self.model) for tensor in experts.buffers()]
        self.streamed.close()
        # Tied weights are one tensor; those of a layer that streams are empty between two uses.
        sizes: dict[int, int] = {
            tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.untyped_storage().nbytes()
        }
        return sum(sizes.values()) + self.streamed.host_bytes + (self.window.kept_bytes if self.window else 0)

    @property
    def device_name(self) -> str:
        """Device for people, such as NVIDIA H200."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
