"""Base models of which each rank keeps a part: a layer's NF4 weights are shared out as soon as it is loaded.

transformers reads and quantises one tensor after the other, in the order of the layers, and puts each into its module.
torch tells of every parameter that a module gets, so a layer is known to be complete, and all but this rank's part of
it is dropped before the next one is read: no rank ever holds the whole base, nor does its host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from finetune_api.failures import FailureReason
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_kernels.streaming.sharded_tensors import ShardedTensors
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.loaded_model import scales_of


@dataclass(frozen=True)
class Share:
    """This rank's part of every layer: one of `ranks`."""

    rank: int
    ranks: int


@dataclass
class SharedLayers:
    """Layers whose weights are shared out, as they come."""

    share: Share
    _parents: dict[nn.Module, nn.Module] = field(default_factory=dict)
    _loading: dict[nn.Module, dict[nn.Module, nn.Parameter]] = field(default_factory=dict)
    """Of each layer that is not complete: the weights that are there, by their linear layer."""
    _layers: dict[nn.Module, ShardedTensors] = field(default_factory=dict)

    def remember_parent(self, parent: nn.Module, _: str, child: nn.Module | None) -> None:
        """Takes note of a module that another one gets."""
        if child is not None:
            self._parents[child] = parent

    def take(self, module: nn.Module, _: str, parameter: nn.Parameter | None) -> None:
        """Takes note of a weight in NF4 that a linear layer gets; shares its decoder layer out if it is the last."""
        layer = self._layer_of(module)
        if layer is None or not isinstance(module, Linear4bit) or not _is_loaded(parameter):
            return

        weights = self._loading.setdefault(layer, {})
        weights[module] = parameter  # type: ignore[assignment]  # not None: it is loaded
        if len(weights) == sum(isinstance(part, Linear4bit) for part in layer.modules()):
            tensors = [tensor for weight in self._loading.pop(layer).values() for tensor in nf4_tensors(weight)]
            self._layers[layer] = ShardedTensors(tensors, self.share.rank, self.share.ranks)

    def window(self, model: Any) -> LayerWindow:
        """Returns the window on the layers of the loaded model, which use it from now on.

        Raises TrainerError (InvalidConfiguration) if a layer has weights that were not shared out.
        """
        modules = list(model.get_decoder().layers)
        if missing := [index for index, module in enumerate(modules) if module not in self._layers]:
            message = (
                f"spec.training.parallelism: Sharded needs linear layers in NF4, and layer {missing[0]} of "
                f"{type(model).__name__} has none: write Replicated"
            )
            raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

        window = LayerWindow()
        window.attach([self._layers[module] for module in modules], modules)
        return window

    def _layer_of(self, module: nn.Module) -> nn.Module | None:
        """The decoder layer that a module is part of: the outermost one that stands in a list."""
        found, parent = None, self._parents.get(module)
        while parent is not None:
            found = module if isinstance(parent, nn.ModuleList) else found
            module, parent = parent, self._parents.get(parent)
        return found


@contextmanager
def sharing_out(share: Share) -> Iterator[SharedLayers]:
    """Shares out the layers of the model that is loaded inside."""
    layers = SharedLayers(share)
    hooks = [
        register_module_module_registration_hook(layers.remember_parent),
        register_module_parameter_registration_hook(layers.take),
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def nf4_tensors(weight: Any) -> list[torch.Tensor]:
    """The tensors of one of bitsandbytes' weights whose sizes grow with it: codes, scales, and scales of scales."""
    return [weight, *scales_of(weight)]


def _is_loaded(parameter: Any) -> bool:
    return parameter is not None and not parameter.is_meta and getattr(parameter, "quant_state", None) is not None
