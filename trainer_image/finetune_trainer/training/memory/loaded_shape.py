"""The sizes of a loaded model with its adapter, counted for the memory plan."""

import math
from dataclasses import replace
from typing import Any

import torch

from finetune_api.vocabulary import Precision
from finetune_kernels.layers.supervised_loss import causal_model
from finetune_kernels.planning.fp16_shape import in_fp16
from finetune_kernels.planning.loaded_weights import let_stream
from finetune_kernels.planning.model_shape import ModelShape, ParameterCounts, build_shape
from finetune_kernels.vocabulary.host_vocabulary import movable_bytes
from finetune_trainer.training.loaded_model import LoadedModel


def loaded_shape(model: Any, loaded: LoadedModel, *, double_quantized: bool) -> ModelShape:
    """Sizes of a peft model over the base `loaded`, with those of weights that are not on the GPU all the time."""
    shape = model_shape(model)
    if loaded.precision is Precision.FP16:
        shape = in_fp16(shape, causal_model(model).config.get_text_config())
    if loaded.window is not None:
        return replace(shape, gathered_bytes=loaded.window.window_bytes)
    if loaded.streamed.limit == shape.layers:
        return let_stream(shape, double_quantized=double_quantized)
    return shape


def model_shape(model: Any) -> ModelShape:
    """Sizes of a peft model."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    dropouts = [part for name, part in causal.named_modules() if "lora_dropout" in name]

    # A packed NF4 weight has two parameters a byte, so its size comes from its quantisation state.
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    vocabulary = {id(getattr(part, "weight", None)) for part in ends}
    of_layers = [weight for weight in causal.parameters() if id(weight) not in vocabulary]
    states = [getattr(weight, "quant_state", None) for weight in of_layers]
    quantized = sum(math.prod(state.shape) for state in states if state is not None)
    frozen = [weight for weight in of_layers if not weight.requires_grad and weight.ndim == 2]
    counts = ParameterCounts(
        linears=quantized or sum(weight.numel() for weight in frozen),
        adapters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        quantized=quantized > 0,
        movable_bytes=movable_bytes(causal),
    )

    return build_shape(
        config,
        counts,
        dropout=any(isinstance(part, torch.nn.Dropout) and part.p for part in dropouts),
        magnitudes=any(getattr(part, "lora_magnitude_vector", None) for part in causal.modules()),
    )
