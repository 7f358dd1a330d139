"""Base models whose layers leave the GPU as soon as they are loaded: shared out among the ranks, or into host memory.

transformers reads and quantises one tensor after the other, in the order of the layers, and puts each into its module.
torch tells of every parameter that a module gets, so a layer is known to be complete, and it is taken away before the
next one is read: no GPU ever holds the whole base, and of one that is shared out no host does.
"""

import os
from collections.abc import Iterator, Sequence
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
from transformers import modeling_utils

from finetune_api.failures import FailureReason
from finetune_kernels.streaming.frozen_tensors import nf4_tensors
from finetune_kernels.streaming.host_layers import HostLayers
from finetune_kernels.streaming.host_tensors import HostTensors, storage_key
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_kernels.streaming.sharded_tensors import ShardedTensors
from finetune_trainer.errors import TrainerError

READS_ALONG = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' variable against threads that bring tensors to the GPU ahead of what is done with them."""


@dataclass(frozen=True)
class Share:
    """A base of which this rank keeps one of `ranks` parts of every layer."""

    rank: int
    ranks: int


@dataclass(frozen=True)
class InHostMemory:
    """A base whose first `layers` layers stream from host memory."""

    layers: int


Placement = Share | InHostMemory
"""Where a base lies that no GPU holds whole."""


@dataclass
class TakenLayers:
    """Layers whose weights were taken off the GPU, as they came."""

    placement: Placement
    _parents: dict[nn.Module, nn.Module] = field(default_factory=dict)
    _loading: dict[nn.Module, dict[nn.Module, nn.Parameter]] = field(default_factory=dict)
    """Of each layer that is not complete: the weights that are there, by their linear layer."""
    _shards: dict[nn.Module, ShardedTensors] = field(default_factory=dict)
    _in_host_memory: dict[nn.Module, HostTensors] = field(default_factory=dict)

    def remember_parent(self, parent: nn.Module, _: str, child: nn.Module | None) -> None:
        """Takes note of a module that another one gets."""
        if child is not None:
            self._parents[child] = parent

    def take(self, module: nn.Module, _: str, parameter: nn.Parameter | None) -> None:
        """Takes note of a weight in NF4 that a linear layer gets; takes its decoder layer away if it is the last."""
        layer = self._layer_of(module)
        if layer is None or not isinstance(module, Linear4bit) or not _is_loaded(parameter):
            return

        weights = self._loading.setdefault(layer, {})
        weights[module] = parameter  # type: ignore[assignment]  # not None: it is loaded
        if len(weights) < sum(isinstance(part, Linear4bit) for part in layer.modules()):
            return
        tensors = [tensor for weight in self._loading.pop(layer).values() for tensor in nf4_tensors(weight)]
        if isinstance(self.placement, Share):
            self._shards[layer] = ShardedTensors(tensors, self.placement.rank, self.placement.ranks)
        elif self._place_of(layer) < self.placement.layers:
            self._in_host_memory[layer] = HostTensors(tensors)

    def window(self, model: Any) -> LayerWindow | None:
        """Returns the window on the layers of the loaded model that the ranks share, which use it from now on; None if
        they do not share it.

        Raises TrainerError (InvalidConfiguration) if a layer has weights that were not shared out.
        """
        if not isinstance(self.placement, Share):
            return None
        modules = decoder_layers(model)
        _check_taken(model, modules, self._shards, "spec.training.parallelism: Sharded", "write Replicated")
        window = LayerWindow()
        window.attach([self._shards[module] for module in modules], modules)
        return window

    def host_layers(self, model: Any) -> HostLayers:
        """Returns the layers of the loaded model that stream from host memory, from now on.

        Raises TrainerError (InvalidConfiguration) if a layer has weights that cannot.
        """
        streamed = HostLayers(decoder_layers(model))
        if isinstance(self.placement, InHostMemory):
            modules = decoder_layers(model)[: self.placement.layers]
            _check_taken(model, modules, self._in_host_memory, "a base that no GPU holds", "use a larger GPU")
            streamed.adopt([self._in_host_memory[module] for module in modules])
        return streamed

    def content_of(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the content of one of the loaded model's tensors: on the CPU, if it waits in host memory."""
        keys = {layer.storage_key: layer for layer in self._in_host_memory.values()}
        layer = keys.get(storage_key(value))
        return value if layer is None else layer.content_of(value)

    def _layer_of(self, module: nn.Module) -> nn.Module | None:
        """The decoder layer that a module is part of: the outermost one that stands in a list."""
        found, parent = None, self._parents.get(module)
        while parent is not None:
            found = module if isinstance(parent, nn.ModuleList) else found
            module, parent = parent, self._parents.get(parent)
        return found

    def _place_of(self, layer: nn.Module) -> int:
        """The layer's place among its model's."""
        return next(place for place, module in enumerate(self._parents[layer].children()) if module is layer)


@contextmanager
def taking_layers(placement: Placement) -> Iterator[TakenLayers]:
    """Takes the layers of the model that is loaded inside off its GPU, one after the other."""
    layers = TakenLayers(placement)
    hooks = [
        register_module_module_registration_hook(layers.remember_parent),
        register_module_parameter_registration_hook(layers.take),
    ]
    try:
        with _one_by_one():
            yield layers
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model; none if they are not a list of that name."""
    return list(getattr(model.get_decoder(), "layers", ()))


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Keeps transformers from bringing tensors to the GPU ahead of those that are taken away, and from reserving memory
    for the whole model there."""
    variable, warm_up = os.environ.get(READS_ALONG), modeling_utils.caching_allocator_warmup
    os.environ[READS_ALONG] = "1"
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up
        del os.environ[READS_ALONG]
        if variable is not None:
            os.environ[READS_ALONG] = variable


def _check_taken(model: Any, modules: Sequence[nn.Module], taken: dict[nn.Module, Any], what: str, remedy: str) -> None:
    """Raises TrainerError (InvalidConfiguration) if a layer was not taken."""
    if missing := [index for index, module in enumerate(modules) if module not in taken]:
        message = f"{what} needs linear layers in NF4, and layer {missing[0]} of {type(model).__name__} has none"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"{message}: {remedy}")


def _is_loaded(parameter: Any) -> bool:
    return parameter is not None and not parameter.is_meta and getattr(parameter, "quant_state", None) is not None
