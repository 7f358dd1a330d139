"""The sizes of a loaded model with its adapter, counted for the memory plan."""

import math
from dataclasses import replace
from typing import Any

import torch

from finetune_api.vocabulary import Precision
from finetune_kernels.experts.routers import router_paths
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
    linears = _frozen_linears(causal)
    states = [getattr(weight, "quant_state", None) for weight in linears]
    quantized = sum(math.prod(state.shape) for state in states if state is not None)
    counts = ParameterCounts(
        linears=quantized or sum(weight.numel() for weight in linears),
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


def _frozen_linears(causal: Any) -> list[Any]:
    """The weights of the layers' linear layers: without the head, routers, and biases, which experts have in two
    dimensions."""
    head, routers = causal.get_output_embeddings(), tuple(f"{path}." for path in router_paths(causal))
    layers = {
        f"{path}.": module
        for path, module in causal.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    weights = [module.weight for path, module in layers.items() if not path.startswith(routers)]
    return [weight for weight in weights if not weight.requires_grad]
